"""What every peer script shares: its arguments, its rows, its clock and its output.

    python peers/NAME.py --model DIR --prompts FILE --out FILE --dtype bf16

FILE has one line a row: id, messages, prompt_token_ids, max_new_tokens, ignore_eos. A peer writes one
line a row (id, text, completion_tokens) and prints one JSON line: load_sec, generate_sec, version.
The end-of-sequence token is not counted, in any peer.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

STARTED = time.perf_counter()  # imports are part of loading
Row = dict[str, Any]
Loaded = TypeVar("Loaded")
Done = tuple[Row, str, int]  # row, text, completion tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--eager", action="store_true", help="vllm: do not compile")
    parser.add_argument("--avx2", action="store_true", help="as on a CPU with nothing newer")
    parser.add_argument("--converted", type=Path, help="the model in the peer's own format")
    return parser.parse_args()


def run(
    package: str,
    load: Callable[[argparse.Namespace, list[Row]], Loaded],
    generate: Callable[[argparse.Namespace, Loaded, list[Row]], Iterable[Done]],
) -> None:
    """Load, generate, write each row as it comes, and print how long both took."""
    args = arguments()
    rows = [json.loads(line) for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    loaded = load(args, rows)
    ready = time.perf_counter()
    with args.out.open("w", encoding="utf-8") as out:
        for row, text, count in generate(args, loaded, rows):
            out.write(json.dumps({"id": row["id"], "text": text, "completion_tokens": count}) + "\n")
            out.flush()
    done = time.perf_counter()
    times = {"load_sec": ready - STARTED, "generate_sec": done - ready}
    try:
        release = f"{package} {version(package)}"
    except PackageNotFoundError:  # not a Python package
        release = package
    print(json.dumps({**times, "version": release}), flush=True)


def has_bf16(args: argparse.Namespace) -> bool:
    """Say whether this CPU computes in bf16 itself, and may."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text(encoding="utf-8").split()) if info.exists() else set[str]()
    return not args.avx2 and bool(flags & {"avx512_bf16", "amx_bf16"})


def cut(token_ids: list[int], row: Row, eos: set[int]) -> list[int]:
    """The tokens that the row asked for: at most max_new_tokens, and those before the end of sequence."""
    token_ids = token_ids[: row["max_new_tokens"]]
    if row["ignore_eos"]:
        return token_ids
    return token_ids[: next((i for i, token in enumerate(token_ids) if token in eos), len(token_ids))]


def batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]
