"""Choose how weights in 4 and in 8 bits come into a product, by what its numbers name."""

from typing import Any

from numba import carray

from pipeline.engine.cpu.kernels import eight_bits, four_bits_floats as four_bits
from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, CODED_BYTES, INT8_BLOCK_BYTES
from pipeline.engine.cpu.kernels.loops import inner, wide
from pipeline.engine.cpu.kernels.vectors import halves

WIDE_INPUTS = eight_bits.WIDE_INPUTS  # of weights in 8 bits
# As numba takes them: by their own names.
FEW_OF_FOUR, FEW_OF_EIGHT, ROWS_OF_EIGHT = four_bits.FEW_ROWS, eight_bits.FEW_ROWS, eight_bits.ROWS
unpack_eight = eight_bits.unpack
ROWS_OF_FOUR = four_bits.ROWS
multiply_four, multiply_eight = four_bits.multiply_few, eight_bits.multiply_few


@inner
def block_bytes(p: Any) -> int:
    """Return the bytes of a block of weights."""
    return CODED_BYTES if p.values else INT8_BLOCK_BYTES if p.scales else BLOCK_BYTES


@inner
def few_rows(p: Any) -> int:
    """Return how many rows are multiplied in the registers; 0 for weights in bf16."""
    return FEW_OF_FOUR if p.values else FEW_OF_EIGHT if p.scales else 0


@inner
def widen(p: Any, start: int, end: int, outputs: Any) -> None:
    """Write some rows of the inputs in float32."""
    inputs = carray(halves(p.inputs), p.rows * p.stride)
    for row in range(start, end):
        first, place = row * p.stride, (row - start) * p.width_in
        for d in range(p.width_in):
            outputs[place + d] = wide(inputs[first + d])


@inner
def unpack(p: Any, packed: int, blocks: int, output: int) -> None:
    """Write blocks in bf16, 2 KiB each."""
    unpack_eight(packed, blocks, output)


@inner
def multiply_few(p: Any, rows: int, input: int, stride: int, packed: int, sums: int) -> None:
    """Multiply rows at `input`, 1 to `few_rows` and `stride` bytes apart, by a strip, to sums [rows, 32] in float32."""
    blocks = p.width_in // BLOCK
    if p.values:
        groups = (rows + ROWS_OF_FOUR - 1) // ROWS_OF_FOUR
        for group in range(groups):
            row, after = rows * group // groups, rows * (group + 1) // groups
            first, own = input + row * stride, sums + row * BLOCK * 4
            multiply_four(after - row, first, stride, packed, p.values, blocks, own)
    else:
        groups = (rows + ROWS_OF_EIGHT - 1) // ROWS_OF_EIGHT  # of nearly one size
        for group in range(groups):
            row, after = rows * group // groups, rows * (group + 1) // groups
            first, own = input + row * stride, sums + row * BLOCK * 4
            multiply_eight(after - row, first, stride, packed, blocks, own)
