"""Time a prefill's attention in one layer: by our kernel, by products with a softmax between, and by torch's own.

    python benchmarks/attention.py --tokens 120 500 2000
    python benchmarks/attention.py --heads 32 8 128 --older amx avx10 avx512   # as a CPU without AVX-512 would
    GOMP_SPINCOUNT=0 python benchmarks/attention.py --cpu-time                 # where others use the cores, too

Rows of one length; in brackets how many times as long as ours.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from products import arguments, fastest, prepare

PASSES = 10  # of which the fastest counts; the contenders take turns


def main() -> None:
    parser = arguments(__doc__, [1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[120, 500, 1000, 2000])
    parser.add_argument(
        "--heads", type=int, nargs=3, default=[9, 3, 64], help="of queries, of keys, and their size"
    )
    args = parser.parse_args()
    clock, _, _ = prepare(args)
    import torch

    with torch.inference_mode():
        for rows, tokens in itertools.product(args.rows, args.tokens):
            contenders = make(args, rows, tokens)
            times = fastest(list(contenders.values()), clock, PASSES)
            print(f"{rows:4} × {tokens:5} tokens", end="")
            for name, sec in zip(contenders, times, strict=True):
                print(f"{name:>14} {sec * 1e3:8.2f} ms ({sec / times[0]:.1f})", end="")
            print()


def make(args: argparse.Namespace, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Make each contender's pass."""
    import torch
    from torch.nn import functional as F

    from pipeline.engine.cpu import load_kernels

    heads, kv_heads, size = args.heads
    kernels = load_kernels()
    if kernels is None or not kernels.attends_causally(size, torch.bfloat16):
        raise SystemExit("this needs our products on vectors, and heads whose size is a multiple of 32")
    query, keys, values = (
        torch.randn(rows, count, tokens, size, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads)
    )
    starts, scaling = [0] * rows, size**-0.5

    def by_products() -> Any:
        packed = query.reshape(-1, heads // kv_heads * tokens, size)
        scores = torch.bmm(packed, keys.reshape(-1, tokens, size).transpose(1, 2))
        kernels.causal_softmax(scores.view(-1, heads, tokens, tokens), starts, 0, None, scaling)
        return torch.bmm(scores, values.reshape(-1, tokens, size))

    return {
        "ours": lambda: kernels.causal_attend(query, keys, values, starts, 0, None, scaling),
        "products": by_products,
        "torch": lambda: F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        ),
    }


if __name__ == "__main__":
    main()
