"""Compare a file whose rows have ten system prompts, mixed, with ten files of one each: tokens and CPU seconds.

python benchmarks/prefixes.py [MODEL]
"""

import copy
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.rectangles.forward import FlatForward

SYSTEMS, ROWS, SYSTEM_TOKENS, REPEATS = 10, 20, 300, 2


def make_requests() -> list[list[Request]]:
    """Make rows of 20 to 60 tokens of their own after one of ten system prompts, 8 new tokens each."""
    draw = random.Random(1)
    params = GenerationParams(max_new_tokens=8, ignore_eos=True)
    groups: list[list[Request]] = []
    for system in range(SYSTEMS):
        prefix = draw.choices(range(1000, 40_000), k=SYSTEM_TOKENS)
        own = [draw.choices(range(1000, 40_000), k=draw.randrange(20, 60)) for _ in range(ROWS)]
        groups.append([Request(f"{system}-{i}", (*prefix, *ids), params) for i, ids in enumerate(own)])
    return groups


def measure(forward: FlatForward, files: list[list[Request]], share: bool) -> tuple[float, int]:
    """Run files one after the other; return CPU seconds and tokens computed in prefill."""
    started, tokens = time.process_time(), 0
    for requests in files:
        engine = Engine(forward, frozenset(), share_prefix=share)
        assert all(not c.error for c in engine.generate(requests))
        tokens += engine.stats.prefill_tokens
    return time.process_time() - started, tokens


def main() -> None:
    """Print each way's tokens, and the least CPU seconds of several alternated runs."""
    name = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
    forward = FlatForward(copy.deepcopy(model))
    groups = make_requests()
    mixed = random.Random(2).sample([r for group in groups for r in group], SYSTEMS * ROWS)
    ways = {"mixed": ([mixed], True), "by hand": (groups, True), "not shared": ([mixed], False)}
    measure(forward, [mixed[:40]], True)  # compiles kernels
    taken = {way: [measure(forward, *asked) for _ in range(1)] for way, asked in ways.items()}
    for _ in range(REPEATS - 1):
        for way in ("mixed", "by hand"):
            taken[way].append(measure(forward, *ways[way]))
    for way, runs in taken.items():
        print(
            f"{way}: {runs[0][1]} tokens prefilled, {min(seconds for seconds, _ in runs):.1f} s of CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
