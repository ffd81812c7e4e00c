"""Widen weights in 8 bits to bf16, where vectors have it: in the registers, or a few blocks at a time, for many rows.

Whole numbers of 8 bits are exact in bf16, and their scales, one for each output, come to the sums: a product is
that of the weights as they are stored, with inputs that are not rounded.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import INT8_BLOCK_BYTES, LINE_BYTES
from pipeline.engine.cpu.kernels.vectors import (
    LANE_NUMBERS,
    LANES,
    VECTOR,
    broadcast_pair,
    dot_pairs,
    for_each_count,
    load,
    prefetch_line,
    store,
)

FEW_ROWS = 4  # for which unpacking takes longer
AHEAD = 8  # blocks: so far ahead weights are asked for
LINES = INT8_BLOCK_BYTES // (LINE_BYTES // 2)  # of a block: two inputs of 16 outputs
PAIRS_TOGETHER = 4  # of inputs
TILE_LINES = LINES // 2

_NUMBER = ir.IntType(64)


@intrinsic
def unpack(context: Any, packed: Any, blocks: Any, output: Any) -> Any:
    """Write blocks in bf16, 2 KiB each, as the products in bf16 read them."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, blocks, output = arguments
        lines = builder.mul(blocks, _NUMBER(LINES))
        with cgutils.for_range(builder, lines, intp=_NUMBER) as line:
            here = builder.add(packed, builder.mul(line.index, _NUMBER(LINE_BYTES // 2)))
            prefetch_line(builder, builder.add(here, _NUMBER(INT8_BLOCK_BYTES * AHEAD)), cache=1)
            there = builder.add(output, builder.mul(line.index, _NUMBER(LINE_BYTES)))
            pairs = _as_pairs(builder, *_planes(builder, here))
            builder.store(pairs, builder.inttoptr(there, pairs.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def multiply_few(
    context: Any, rows: Any, input: Any, stride: Any, packed: Any, blocks: Any, sums: Any
) -> Any:
    """Multiply rows at `input`, 1 to FEW_ROWS and `stride` bytes apart, to sums [rows, 32] in float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, FEW_ROWS, lambda count: _multiply(builder, count, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def _multiply(builder: Any, rows: int, input: Any, stride: Any, packed: Any, blocks: Any, sums: Any) -> None:
    """Write the product of some rows. Each row has two vectors of sums, one for each tile."""
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in (0, 1)] for _ in range(rows)]
    parts = _NUMBER(TILE_LINES // PAIRS_TOGETHER)
    with (
        cgutils.for_range(builder, blocks, intp=_NUMBER) as block,
        cgutils.for_range(builder, parts, intp=_NUMBER) as part,
    ):
        along = builder.add(builder.mul(block.index, parts), part.index)
        here = builder.add(packed, builder.mul(block.index, _NUMBER(INT8_BLOCK_BYTES)))
        here = builder.add(here, builder.mul(part.index, _NUMBER(PAIRS_TOGETHER * LINE_BYTES // 2)))
        first = builder.add(input, builder.mul(along, _NUMBER(PAIRS_TOGETHER * 4)))
        places = [builder.add(first, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
        _part(builder, here, places, totals)
    for row, own in enumerate(totals):
        for tile, total in enumerate(own):
            store(builder, builder.load(total), sums, _NUMBER((2 * row + tile) * LANES))


def _part(builder: Any, here: Any, places: list[Any], totals: list[list[Any]]) -> None:
    """Add some pairs of inputs to each row's sums."""
    for pair in range(PAIRS_TOGETHER):
        for tile in (0, 1):
            line = builder.add(here, _NUMBER((tile * TILE_LINES + pair) * LINE_BYTES // 2))
            if pair % 2 == 0:
                prefetch_line(builder, builder.add(line, _NUMBER(INT8_BLOCK_BYTES * AHEAD)), cache=1)
            weights = _as_pairs(builder, *_planes(builder, line))
            for place, own in zip(places, totals, strict=True):
                both = broadcast_pair(builder, place, 2 * pair)
                builder.store(dot_pairs(builder, builder.load(own[tile]), both, weights), own[tile])


def _planes(builder: Any, line: Any) -> list[Any]:
    """Load a line's weights in float32: of its first input, and of its second."""
    numbers = [load(builder, line, _NUMBER(input * LANES), ir.IntType(8), LANES, 1) for input in (0, 1)]
    return [builder.sitofp(number, VECTOR) for number in numbers]


def _as_pairs(builder: Any, first: Any, second: Any) -> Any:
    """Put two vectors into one of bf16 pairs. Their numbers have no more digits."""
    lower, upper = (builder.bitcast(x, LANE_NUMBERS) for x in (first, second))
    return builder.or_(builder.lshr(lower, ir.Constant(LANE_NUMBERS, [16] * LANES)), upper)
