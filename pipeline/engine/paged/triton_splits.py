"""Split a product's inputs among programs, so that few rows keep all of a GPU busy, and add up what each has found.

TRITON_INTERPRET=1 runs the kernel on a CPU. Importing this module raises ImportError without Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128  # for more, a product of the whole weight in half precision is faster
OUTPUTS = 64  # of one program: the least that Hopper's tensor cores take
PROGRAMS = 512  # inputs are split until there are so many: four on each of a card's 132 processors


def split(rows: int, outputs: int) -> tuple[int, int]:
    """Return the rows of one program, and into how many parts the inputs are split, whatever the rows."""
    tile = max(16, min(MOST_ROWS, triton.next_power_of_2(rows)))
    return tile, min(16, triton.next_power_of_2(triton.cdiv(PROGRAMS * OUTPUTS, outputs)))


def add_up(parts: Tensor, dtype: torch.dtype, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    """Add up the parts in their order, [splits, M, N] float32, then scale and add the bias, [N] each. → [M, N]."""
    splits, rows, outputs = parts.shape
    output = parts.new_empty(rows, outputs, dtype=dtype)
    _sum_kernel[(rows, triton.cdiv(outputs, 1024))](
        parts, parts if scales is None else scales, parts if bias is None else bias, output, rows * outputs,
        outputs, splits, SCALED=scales is not None, BIASED=bias is not None, SIZE=1024,
    )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(
    parts, scales, bias, output, count, outputs, splits,
    SCALED: tl.constexpr, BIASED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add up one row."""
    n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = n < outputs
    at = tl.program_id(0).to(tl.int64) * outputs + n
    total = tl.zeros([SIZE], tl.float32)
    for part in range(splits):
        total += tl.load(parts + part * count + at, mask=inside, other=0.0)
    if SCALED:
        total *= tl.load(scales + n, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)
