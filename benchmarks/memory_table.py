"""Predicted beside measured memory: `python benchmarks/memory_table.py [MODEL_FOLDER]`

Runs a job for each quantization and number of rows, each in its own process, and prints what stats.json
says as a Markdown table. Growth is over the bare process. --quants, --rows choose.

    --shape llama1b    random weights in the shape of a model of conf/, in a temporary folder
    --architectures    what is counted from a config beside tiny models of every architecture, no jobs
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

QUANTS = ("none", "bf16", "int8", "nf4")
ROWS = (8, 64)
NEW_TOKENS = 8
WORDS = ("data", "model", "river", "stone", "light", "paper", "green", "window", "music", "garden")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--shape")
    parser.add_argument("--architectures", action="store_true")
    chosen = parser.parse_args()
    if chosen.architectures:
        import memory_architectures

        print(memory_architectures.table())
    elif chosen.shape:
        import memory_shapes

        with tempfile.TemporaryDirectory() as folder:
            memory_shapes.write_checkpoint(chosen.shape, Path(folder) / chosen.shape, Path(chosen.model))
            jobs(str(Path(folder) / chosen.shape), chosen.quants, chosen.rows)
    else:
        jobs(chosen.model, chosen.quants, chosen.rows)


def jobs(model: str, quants: Iterable[str], row_counts: Iterable[int]) -> None:
    """Print a line for each quantization and number of rows."""
    print("| quant | rows | weights | state | KV cache | load peak | mapped | run peak | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for quant in quants:
        for rows in row_counts:
            print(line(quant, rows, job(model, quant, rows)), flush=True)
    print("\nMB, predicted / measured (error)")


def job(model: str, quant: str, rows: int) -> dict[str, Any]:
    """stats.json of a job on `rows` prompts of about 100 tokens, all in flight at once."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": prompt(i)}) + "\n" for i in range(rows)))
        arguments = [
            f"model.name={model}", f"quant={quant}", f"prompts={prompts}", f"outputs_dir={folder}/outputs",
            f"engine.max_rows={rows}", "generation.ignore_eos=true", f"generation.max_new_tokens={NEW_TOKENS}",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "pipeline", *arguments], check=True, capture_output=True)
        (stats,) = Path(folder).glob("outputs/*/*/stats.json")
        return dict(json.loads(stats.read_text()))


def prompt(row: int) -> str:
    """Some 60 words that no other row begins with."""
    return f"{row}. " + " ".join(WORDS[(row * 7 + i * i) % len(WORDS)] for i in range(60))


def line(quant: str, rows: int, stats: dict[str, Any]) -> str:
    memory = stats["memory"]
    cells = [
        cell(*(memory[side][f"{part}_bytes"] for side in ("predicted", "measured")), error)
        for part, error in memory["error_percent"].items()
    ]
    return f"| {quant} | {rows} | {' | '.join(cells)} | {stats['tokens_per_sec']:.1f} |"


def cell(predicted: int | None, measured: int | None, error: float | None) -> str:
    sizes = " / ".join("-" if size is None else f"{size / 1e6:.1f}" for size in (predicted, measured))
    return sizes if error is None else f"{sizes} ({error:+.1f} %)"


if __name__ == "__main__":
    main()
