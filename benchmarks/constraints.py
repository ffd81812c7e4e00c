"""Time what a constraint adds to a step: the same texts with and without one, in turns, and its parts by themselves.

    python benchmarks/constraints.py                                      # SmolLM2 in models/, bf16
    python benchmarks/constraints.py --rows 32 --rounds 5 --model models/SmolLM2-135M-Instruct
    GOMP_SPINCOUNT=0 python benchmarks/constraints.py                     # where others use the cores, too

The regex allows every text, so that the tokens are the same. CPU time counts all threads of this process, and is
what to read where other work runs; wall time is what to read on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REGEX = r"(.|\n)*"
STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    from pipeline import load_model

    model = load_model(args.model, "bf16")
    for rows in args.rows:
        requests = ask(model, rows)
        ways = {"without": requests, "with": [constrain(r) for r in requests]}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        run(model, ways["with"])  # compiles, and reads the tokenizer
        for _ in range(args.rounds):
            for name, asked in ways.items():
                found[name].append(run(model, asked))
        wall, cpu = (
            {n: statistics.median(t[i] for t in times) for n, times in found.items()} for i in (0, 1)
        )
        print(f"{rows} rows, a decode step, medians of {args.rounds} rounds:")
        for name, times in (("wall", wall), ("CPU", cpu)):
            more = times["with"] / times["without"] - 1
            print(
                f"  {name:5} {times['without'] * 1e3:7.2f} ms, constrained {times['with'] * 1e3:7.2f} ms: {more:+.1%}"
            )
        for name, sec in parts(model, ways["with"]):
            print(f"  {name:34} {sec * 1e3:7.3f} ms of CPU")


def ask(model: Any, rows: int) -> list[Any]:
    """Make requests that all run for STEPS steps, whatever the model says."""
    from pipeline import read_prompts

    texts = [f"Tell me what you know of the number {i}, at length." for i in range(rows)]
    return read_prompts(texts, model, max_new_tokens=STEPS)


def constrain(request: Any) -> Any:
    from pipeline.prompts.constraint import grammar_of

    params = replace(request.params, regex=REGEX)
    return replace(request, params=params, constraint=grammar_of(params))


def run(model: Any, requests: list[Any]) -> tuple[float, float]:
    """Return what a decode step takes: seconds, and seconds of CPU of all threads."""
    from pipeline import Engine

    engine = Engine(*model.engine_parts, max_rows=len(requests))
    begun = None
    for _ in engine.steps(requests):
        if begun is None and engine.stats.steps:
            begun = time.process_time()
    assert begun is not None
    steps = engine.stats.steps
    return engine.stats.decode_sec / steps, (time.process_time() - begun) / (steps - 1)


def parts(model: Any, requests: list[Any]) -> list[tuple[str, float]]:
    """Time the masks of a step, laying them over logits, and choosing, one after the other."""
    import torch

    from pipeline.engine.constraint import Constraints
    from pipeline.engine.masks import Masks
    from pipeline.engine.sampling import argmax
    from pipeline.engine.scheduler import Sample

    samples = [Sample(request, 0) for request in requests]
    masks = Masks(Constraints(model.tokenizer, model.eos_token_ids))
    forbidden = masks.start(samples)()
    assert forbidden is not None
    logits = torch.randn(len(samples), model.network.config.vocab_size).bfloat16()
    return [
        ("masks, in a thread beside the model", cpu_time(lambda: masks.start(samples)())),
        ("laying them over the logits", cpu_time(lambda: forbidden.apply(logits, keep=False))),
        ("choosing the token, as without", cpu_time(lambda: argmax(logits))),
    ]


def cpu_time(work: Callable[[], Any], times: int = 200) -> float:
    work()
    started = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - started) / times


if __name__ == "__main__":
    main()
