"""Choose how inputs, and weights in 4 and in 8 bits, come into a product, by what its numbers name."""

from typing import Any

from pipeline.engine.cpu.kernels import eight_bits, four_bits, whole_numbers
from pipeline.engine.cpu.kernels.blocks import (
    BLOCK,
    BLOCK_BYTES,
    CODED_BYTES,
    IN_WHOLE_NUMBERS,
    INT8_BLOCK_BYTES,
)
from pipeline.engine.cpu.kernels.precision import inner
from pipeline.engine.cpu.kernels.row_products import INPUT_BYTES, widen
from pipeline.engine.cpu.kernels.vectors import HAS_BF16
from pipeline.engine.cpu.kernels.vectors import ROWS as MOST_ROWS

# Rows that are multiplied in the registers, and how many of them at once.
FEW_ROWS = 1 << 30 if IN_WHOLE_NUMBERS else min(four_bits.FEW_ROWS, eight_bits.FEW_ROWS)
ROWS = MOST_ROWS if IN_WHOLE_NUMBERS else FEW_ROWS
# As numba takes them: by their own names.
multiply_four, unpack_four = four_bits.multiply_few, four_bits.unpack
multiply_eight, unpack_eight = eight_bits.multiply_few, eight_bits.unpack
whole_four, whole_eight = whole_numbers.multiply_four, whole_numbers.multiply_eight
whole_row_bytes, make_whole = whole_numbers.row_bytes, whole_numbers.make_whole


@inner
def block_bytes(p: Any) -> int:
    """Return the bytes of a block of weights."""
    return CODED_BYTES if p.values else INT8_BLOCK_BYTES if p.scales else BLOCK_BYTES


@inner
def few_rows(p: Any) -> int:
    """Return how many rows are multiplied in the registers; 0 for weights in bf16."""
    return FEW_ROWS if p.values or p.scales else 0


@inner
def converted_bytes(p: Any) -> int:
    """Return the bytes of a row of inputs as a product takes it; 0 where it takes it as it is."""
    if HAS_BF16:
        return 0
    found: int = whole_row_bytes(p.width_in) if p.values or p.scales else p.width_in * INPUT_BYTES
    return found


@inner
def convert(p: Any, start: int, end: int, output: int) -> None:
    """Write some rows of the inputs as a product takes them."""
    for row in range(start, end):
        input, own = p.inputs + row * p.stride * 2, output + (row - start) * converted_bytes(p)
        if p.values or p.scales:
            make_whole(input, p.width_in, own)
        else:
            widen(input, p.width_in, own)


@inner
def unpack(p: Any, packed: int, blocks: int, output: int) -> None:
    """Write blocks in bf16, 2 KiB each."""
    if not IN_WHOLE_NUMBERS:  # for which all rows are few
        if p.values:
            unpack_four(packed, p.values, blocks, output)
        else:
            unpack_eight(packed, blocks, output)


@inner
def multiply_few(p: Any, rows: int, input: int, stride: int, packed: int, sums: int) -> None:
    """Multiply rows at `input`, 1 to `few_rows` and `stride` bytes apart, by a strip, to sums [rows, 32] in float32."""
    blocks = p.width_in // BLOCK
    groups = (rows + ROWS - 1) // ROWS  # of nearly one size
    for group in range(groups):
        row, after = rows * group // groups, rows * (group + 1) // groups
        count, first, own = after - row, input + row * stride, sums + row * BLOCK * 4
        if IN_WHOLE_NUMBERS:
            if p.values:
                whole_four(count, first, stride, blocks, own, packed, p.values)
            else:
                whole_eight(count, first, stride, blocks, own, packed)
        elif p.values:
            multiply_four(count, first, stride, packed, p.values, blocks, own)
        else:
            multiply_eight(count, first, stride, packed, blocks, own)
