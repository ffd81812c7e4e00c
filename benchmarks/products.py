"""Time products in bf16, in 8 and 4 bits and in float32, beside what memory and arithmetic allow here.

    python benchmarks/products.py --rows 1 4 32
    python benchmarks/products.py --shape 4096 14336 --older avx512      # as a CPU without AVX-512 would
    GOMP_SPINCOUNT=0 python benchmarks/products.py --cpu-time             # where others use the cores, too

The weights are several, so that none is still in the caches when its turn comes again.
"""

import argparse
import copy
import itertools
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

WEIGHTS_BYTES = 256 << 20  # in bf16, of all weights together
PASSES = 30  # of which the fastest counts; the contenders take turns
SQUARE = 2048  # side of the matrices whose product in float32 stands for the peak


def main() -> None:
    parser = arguments(__doc__, [1, 2, 4, 12, 32, 128])
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 8192], help="inputs and outputs")
    args = parser.parse_args()
    clock, _, _ = prepare(args)
    import torch

    inputs, outputs = args.shape
    contenders = make(inputs, outputs)
    print(f"{inputs} × {outputs}      " + "".join(f"{name:>30}" for name in contenders))
    with torch.inference_mode():
        for rows in args.rows:
            states = torch.randn(rows, inputs, dtype=torch.bfloat16)
            print(f"{rows:5} rows       ", end="")
            for (_, weight_bytes), sec in zip(
                contenders.values(), measure(contenders, states, clock), strict=True
            ):
                speed, flops = weight_bytes / sec / 1e9, 2 * rows * inputs * outputs / sec / 1e9
                print(f"{sec * 1e3:8.2f} ms {speed:4.0f} GB/s {flops:4.0f} GF/s", end="")
            print()


def arguments(text: str | None, rows: list[int]) -> argparse.ArgumentParser:
    """Make a parser of what all timing of products asks."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument(
        "--older", nargs="*", default=[], help="how the names of features begin that this CPU has not"
    )
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the cores, over their number")
    return parser


def prepare(args: argparse.Namespace) -> tuple[Callable[[], float], float, float]:
    """Hold numba to an older CPU where asked, choose the clock, and say what the machine allows: GB/s, GFLOP/s."""
    if args.older:
        os.environ["NUMBA_CPU_FEATURES"] = without(tuple(args.older))
    import torch

    threads = torch.get_num_threads()
    clock = cpu_clock(threads) if args.cpu_time else wall_clock
    bandwidth, peak = limits(clock)
    print(f"{threads} threads: {bandwidth:.0f} GB/s read, {peak:.0f} GFLOP/s in float32 (torch)")
    return clock, bandwidth, peak


def without(newer: tuple[str, ...]) -> str:
    """List this CPU's features for numba, but for those that begin so."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features().items()
    return ",".join(
        ("+" if has and not name.startswith(newer) else "-") + name for name, has in sorted(features)
    )


def wall_clock() -> float:
    return time.perf_counter()


def cpu_clock(threads: int) -> Callable[[], float]:
    return lambda: time.process_time() / threads


def limits(clock: Callable[[], float]) -> tuple[float, float]:
    """Measure GB/s of a sum over 512 MiB, and GFLOP/s of a product in float32."""
    import torch

    numbers, square = torch.ones(1 << 27), torch.randn(SQUARE, SQUARE)
    read = fastest([numbers.sum], clock)[0]
    multiplied = fastest([lambda: square @ square], clock)[0]
    return numbers.nbytes / read / 1e9, 2 * SQUARE**3 / multiplied / 1e9


def make(inputs: int, outputs: int) -> dict[str, tuple[list[Callable[[Any], Any]], int]]:
    """Make each contender's products, one for each weight, and the bytes of one weight."""
    import torch

    from pipeline.engine.cpu import load_kernels
    from pipeline.engine.cpu.packing import PackedLinear, pack_weights

    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("this needs numba, and a torch that is linked with libgomp")
    warnings.filterwarnings("ignore", "MatMul8bitLt")

    def layer(quant: str) -> Any:
        made = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
        return quantized(made, quant)

    def packed(made: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
        block = torch.nn.ModuleDict({"own": made})
        block.get_input_embeddings = lambda: torch.nn.Embedding(1, 1, dtype=dtype)
        pack_weights(block)
        assert isinstance(block["own"], PackedLinear)
        return block["own"]

    count = -(-WEIGHTS_BYTES // (2 * inputs * outputs))
    numbers = inputs * outputs
    floats = [torch.nn.Linear(inputs, outputs, bias=False) for _ in range(-(-count // 2))]
    ours = [packed(copy.deepcopy(linear), torch.float32) for linear in floats]
    return {
        "bf16": ([packed(layer("bf16")) for _ in range(count)], 2 * numbers),
        "int8": ([packed(layer("int8")) for _ in range(2 * count)], numbers),
        "int8, bitsandbytes": ([layer("int8") for _ in range(2 * count)], numbers),
        "nf4": ([packed(layer("nf4")) for _ in range(2 * count)], numbers * 9 // 16),
        "nf4, bitsandbytes": ([layer("nf4") for _ in range(2 * count)], numbers * 9 // 16),
        "float32": ([lambda x, m=m: m(x.float()) for m in ours], 4 * numbers),
        "float32, torch": ([lambda x, m=m: m(x.float()) for m in floats[::-1]], 4 * numbers),
    }


def quantized(linear: Any, quant: str) -> Any:
    """Return a linear layer as it is, or bitsandbytes' of its weight."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    sizes = linear.in_features, linear.out_features
    if quant == "nf4":
        made = Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    elif quant == "int8":
        made = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        return linear
    made.load_state_dict(linear.state_dict())
    return made.to("cpu").eval()


def measure(contenders: Any, states: Any, clock: Callable[[], float]) -> list[float]:
    """Measure each contender's seconds for one product."""
    for products, _ in contenders.values():
        for product in products:  # bitsandbytes lays a weight out anew at its first product
            product(states[:1])
    turns = [itertools.cycle(products) for products, _ in contenders.values()]
    return fastest([lambda turn=turn: next(turn)(states) for turn in turns], clock)  # type: ignore[misc]


def fastest(works: list[Callable[[], Any]], clock: Callable[[], float], passes: int = PASSES) -> list[float]:
    """Run the works in turns, and return the least seconds of each."""
    best = [float("inf")] * len(works)
    for _ in range(passes):
        for index, work in enumerate(works):
            before = clock()
            work()
            best[index] = min(best[index], clock() - before)
    return best


if __name__ == "__main__":
    main()
