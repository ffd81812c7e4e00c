"""Choose how weights in 4 and in 8 bits come into a product, by what its numbers name."""

from typing import Any

from pipeline.engine.cpu.kernels import eight_bits, four_bits
from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, BYTES_BYTES, CODED_BYTES
from pipeline.engine.cpu.kernels.loops import inner

# As numba takes them: by their own names.
FEW_OF_FOUR, FEW_OF_EIGHT, ROWS_OF_EIGHT = four_bits.FEW_ROWS, eight_bits.FEW_ROWS, eight_bits.ROWS
unpack_four, unpack_eight = four_bits.unpack, eight_bits.unpack
multiply_four, multiply_eight = four_bits.multiply_few, eight_bits.multiply_few


@inner
def block_bytes(p: Any) -> int:
    """Return the bytes of a block of weights."""
    return CODED_BYTES if p.values else BYTES_BYTES if p.scales else BLOCK_BYTES


@inner
def few_rows(p: Any) -> int:
    """Return how many rows are multiplied in the registers; 0 for weights in bf16."""
    return FEW_OF_FOUR if p.values else FEW_OF_EIGHT if p.scales else 0


@inner
def unpack(p: Any, packed: int, blocks: int, output: int) -> None:
    """Write blocks in bf16, 2 KiB each."""
    if p.values:
        unpack_four(packed, p.values, blocks, output)
    else:
        unpack_eight(packed, blocks, output)


@inner
def multiply_few(p: Any, rows: int, input: int, packed: int, sums: int) -> None:
    """Multiply rows at `input`, 1 to `few_rows`, by a strip, to sums [rows, 32] in float32."""
    stride, blocks = p.stride * 2, p.width_in // BLOCK
    if p.values:
        multiply_four(rows, input, stride, packed, p.values, blocks, sums)
    else:
        for row in range(0, rows, ROWS_OF_EIGHT):
            first, own = input + row * stride, sums + row * BLOCK * 4
            multiply_eight(min(ROWS_OF_EIGHT, rows - row), first, stride, packed, blocks, own)
