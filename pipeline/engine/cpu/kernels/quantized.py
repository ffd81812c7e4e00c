"""Choose how weights in 4 and in 8 bits come into a product, by what its numbers name."""

from typing import Any

from numba import carray

from pipeline.engine.cpu.kernels import eight_bits, four_bits, four_bits_whole
from pipeline.engine.cpu.kernels.blocks import (
    BLOCK,
    BLOCK_BYTES,
    CODED_BYTES,
    IN_WHOLE_NUMBERS,
    INT8_BLOCK_BYTES,
)
from pipeline.engine.cpu.kernels.loops import inner, wide
from pipeline.engine.cpu.kernels.vectors import floats, halves

# As numba takes them: by their own names.
FEW_OF_FOUR = 1 << 30 if IN_WHOLE_NUMBERS else four_bits.FEW_ROWS
ROWS_OF_FOUR = four_bits_whole.ROWS if IN_WHOLE_NUMBERS else four_bits.FEW_ROWS
multiply_four = four_bits_whole.multiply if IN_WHOLE_NUMBERS else four_bits.multiply_few
unpack_four, whole_row_bytes, make_whole = (
    four_bits.unpack,
    four_bits_whole.row_bytes,
    four_bits_whole.make_whole,
)
FEW_OF_EIGHT, ROWS_OF_EIGHT, WIDE_INPUTS = eight_bits.FEW_ROWS, eight_bits.ROWS, eight_bits.WIDE_INPUTS
multiply_eight, unpack_eight = eight_bits.multiply_few, eight_bits.unpack


@inner
def block_bytes(p: Any) -> int:
    """Return the bytes of a block of weights."""
    return CODED_BYTES if p.values else INT8_BLOCK_BYTES if p.scales else BLOCK_BYTES


@inner
def few_rows(p: Any) -> int:
    """Return how many rows are multiplied in the registers; 0 for weights in bf16."""
    return FEW_OF_FOUR if p.values else FEW_OF_EIGHT if p.scales else 0


@inner
def converted_bytes(p: Any) -> int:
    """Return the bytes of a row of inputs as few rows take it; 0 where they take it as it is."""
    if p.values:
        return whole_row_bytes(p.width_in) if IN_WHOLE_NUMBERS else 0
    return p.width_in * 4 if p.scales and WIDE_INPUTS else 0


@inner
def convert(p: Any, start: int, end: int, output: int) -> None:
    """Write some rows of the inputs as few rows take them."""
    size = converted_bytes(p)
    for row in range(start, end):
        input, place = p.inputs + row * p.stride * 2, output + (row - start) * size
        if p.values:
            make_whole(input, p.width_in, place)
        else:
            _widen(input, p.width_in, place)


@inner
def _widen(inputs: int, width: int, output: int) -> None:
    """Write a row of inputs in float32."""
    numbers, wider = carray(halves(inputs), width), carray(floats(output), width)
    for d in range(width):
        wider[d] = wide(numbers[d])


@inner
def unpack(p: Any, packed: int, blocks: int, output: int) -> None:
    """Write blocks in bf16, 2 KiB each."""
    if p.scales:
        unpack_eight(packed, blocks, output)
    elif not IN_WHOLE_NUMBERS:  # for which all rows are few
        unpack_four(packed, p.values, blocks, output)


@inner
def multiply_few(p: Any, rows: int, input: int, stride: int, packed: int, sums: int) -> None:
    """Multiply rows at `input`, 1 to `few_rows` and `stride` bytes apart, by a strip, to sums [rows, 32] in float32."""
    blocks, together = p.width_in // BLOCK, ROWS_OF_FOUR if p.values else ROWS_OF_EIGHT
    groups = (rows + together - 1) // together  # of nearly one size
    for group in range(groups):
        row, after = rows * group // groups, rows * (group + 1) // groups
        first, own = input + row * stride, sums + row * BLOCK * 4
        if p.values:
            multiply_four(after - row, first, stride, packed, p.values, blocks, own)
        else:
            multiply_eight(after - row, first, stride, packed, blocks, own)
