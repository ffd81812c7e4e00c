"""Split a product's inputs among programs, so that few rows keep all of a GPU busy, and add up what each has found.

TRITON_INTERPRET=1 runs the kernel on a CPU. Importing this module raises ImportError without Triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128  # for more, a product of the whole weight in half precision is faster
OUTPUTS = 64  # the least that a program has: Hopper's tensor cores take no fewer


@dataclass(frozen=True, slots=True)
class Shape:
    """Say how a product is cut into programs."""

    outputs: int  # of one program: all its rows' states are read again for each
    inputs: int  # read at a time
    warps: int
    stages: int
    programs: int  # inputs are split until there are so many

    def split(self, rows: int, outputs: int, inputs: int) -> tuple[int, int, int, int]:
        """Return the outputs, inputs and rows of a program, and the splits of the inputs, whatever the rows."""
        wide = self.outputs if outputs % self.outputs == 0 else OUTPUTS
        deep = self.inputs if inputs % self.inputs == 0 else 64
        tile = max(16, min(MOST_ROWS, triton.next_power_of_2(rows)))
        return wide, deep, tile, min(16, triton.next_power_of_2(triton.cdiv(self.programs * wide, outputs)))


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
