"""Turn weights in 4 bits to bf16 on vectors: for a few rows in the registers, else a few blocks at a time.

A code's value times its scale is rounded to bf16 as bitsandbytes does, so that the products are those of the
weight that it dequantizes. numba's cache of the products does not see a change in this file: touch linear_*.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import (
    BLOCK_BYTES,
    CODE_BYTES,
    CODED_BYTES,
    TILE_BYTES,
    TILE_ROWS,
)
from pipeline.engine.cpu.kernels.vectors import (
    HAS_BF16,
    LANE_NUMBERS,
    LANES,
    PAIRS,
    VECTOR,
    broadcast_pair,
    compiles_for,
    dot_pairs,
    for_each_count,
    load,
    load_floats,
    prefetch_line,
    shuffle,
    store,
    times,
)

_HAS_AVX512 = compiles_for("avx512f")
FEW_ROWS = 4 if _HAS_AVX512 else 2  # whose products leave room for the rest in the registers
AHEAD = 8  # times two blocks: so far ahead codes are asked for

_NUMBER, _WORD = ir.IntType(64), ir.IntType(32)
_LINE = ir.VectorType(ir.IntType(16), PAIRS)
_INTERLEAVED = [place + LANES * second for place in range(LANES) for second in (0, 1)]
_EIGHTS = [list(range(first, first + 8)) for first in (0, 8)]


@intrinsic
def unpack(context: Any, packed: Any, values: Any, blocks: Any, output: Any) -> Any:
    """Write an even number of blocks in bf16, 2 KiB each, as the products in bf16 read them.

    Args:
        packed: address of codes and scales, as Blocks has them.
        values: address of 16 float32 numbers.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, values, blocks, output = arguments

        def keep(line: Any, block: Any, tile: int, pair: int) -> None:
            there = builder.add(output, builder.mul(block, _NUMBER(BLOCK_BYTES)))
            place = builder.add(there, _NUMBER((tile * TILE_ROWS + pair) * TILE_BYTES))
            builder.store(line, builder.inttoptr(place, line.type.as_pointer()), align=4)

        _each_line(builder, packed, values, blocks, keep)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def multiply_few(
    context: Any, rows: Any, input: Any, stride: Any, packed: Any, values: Any, blocks: Any, sums: Any
) -> Any:
    """Multiply rows at `input`, 1 to FEW_ROWS and `stride` bytes apart, to sums [rows, 32] in float32.

    Args:
        packed, values, blocks: as for `unpack`.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, FEW_ROWS, lambda count: _multiply(builder, count, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _multiply(
    builder: Any, rows: int, input: Any, stride: Any, packed: Any, values: Any, blocks: Any, sums: Any
) -> None:
    """Write the product of some rows. Each row has two vectors of sums, one for each tile."""
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in (0, 1)] for _ in places]

    def add(line: Any, block: Any, tile: int, pair: int) -> None:
        weights = builder.bitcast(line, LANE_NUMBERS)
        for place, own in zip(places, totals, strict=True):
            numbers = builder.add(place, builder.mul(block, _NUMBER(TILE_BYTES)))
            spread = broadcast_pair(builder, numbers, 2 * pair)
            builder.store(dot_pairs(builder, builder.load(own[tile]), spread, weights), own[tile])

    _each_line(builder, packed, values, blocks, add)
    for row, own in enumerate(totals):
        for tile, total in enumerate(own):
            store(builder, builder.load(total), sums, _NUMBER((2 * row + tile) * LANES))


def _each_line(builder: Any, packed: Any, values: Any, blocks: Any, use: Callable[..., None]) -> None:
    """Write a loop over blocks: use(line, block=…, tile=…, pair=…) gets two inputs of a tile's outputs in bf16."""
    table = load_floats(builder, values, _NUMBER(0))
    size = _NUMBER(2 * CODED_BYTES)
    with cgutils.for_range(builder, builder.lshr(blocks, _NUMBER(1)), intp=_NUMBER) as both:
        here = builder.add(packed, builder.mul(both.index, size))
        for line in range(2 * CODED_BYTES // 64):
            prefetch_line(builder, builder.add(here, _NUMBER(2 * CODED_BYTES * AHEAD + 64 * line)), cache=1)
        scales = [load_floats(builder, here, _NUMBER(CODE_BYTES // 4 + tile * LANES)) for tile in (0, 1)]
        with cgutils.for_range(builder, _NUMBER(2), intp=_NUMBER) as half:
            codes = builder.add(here, builder.mul(half.index, _NUMBER(CODE_BYTES // 2)))
            block = builder.add(builder.shl(both.index, _NUMBER(1)), half.index)
            for tile, scale in enumerate(scales):
                _each_line_of_tile(builder, table, scale, codes, tile, partial(use, block=block, tile=tile))


def _each_line_of_tile(builder: Any, table: Any, scale: Any, codes: Any, tile: int, use: Any) -> None:
    """Use 16 outputs and 32 inputs, of which each vector of codes has eight."""
    for eight in range(4):
        words = load(builder, codes, _NUMBER((tile * 4 + eight) * LANES), _WORD, LANES, 4)
        for pair in range(4):
            numbers = [
                times(builder, _look_up(builder, table, words, 8 * pair + shift), scale) for shift in (4, 0)
            ]
            use(_pair(builder, *numbers), pair=4 * eight + pair)


def _look_up(builder: Any, table: Any, words: Any, shift: int) -> Any:
    """Return the values of the codes at a place in each lane."""
    moved = builder.lshr(words, _all(shift)) if shift else words
    if _HAS_AVX512:  # only the lower four bits of a lane choose
        return _call(builder, "avx512.permvar.sf.512", VECTOR, table, moved)
    upper = builder.bitcast(builder.shl(words, _all(28 - shift)) if shift < 28 else words, VECTOR)
    parts = []
    for eight in _EIGHTS:
        places, signs = shuffle(builder, moved, moved, eight), shuffle(builder, upper, upper, eight)
        halves = [shuffle(builder, table, table, half) for half in _EIGHTS]
        kind = halves[0].type
        found = [_call(builder, "avx2.permps", kind, half, places) for half in halves]
        parts.append(_call(builder, "avx.blendv.ps.256", kind, *found, signs))
    return shuffle(builder, parts[0], parts[1], list(range(LANES)))


def _call(builder: Any, name: str, result: Any, *vectors: Any) -> Any:
    kind = ir.FunctionType(result, [vector.type for vector in vectors])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), vectors)


def _pair(builder: Any, first: Any, second: Any) -> Any:
    """Round two vectors to bf16, to the nearest, ties to even: lane by lane a pair."""
    if HAS_BF16:
        kind = ir.FunctionType(_LINE, [VECTOR, VECTOR])
        text = "vcvtne2ps2bf16 $2, $1, $0"
        both = builder.asm(kind, text, "=v,v,v", [second, first], side_effect=False)
        return shuffle(builder, both, both, _INTERLEAVED)
    bits = [builder.bitcast(x, LANE_NUMBERS) for x in (first, second)]
    odd = [builder.and_(builder.lshr(x, _all(16)), _all(1)) for x in bits]
    lower, upper = (builder.add(builder.add(x, _all(0x7FFF)), bit) for x, bit in zip(bits, odd, strict=True))
    return builder.or_(builder.lshr(lower, _all(16)), builder.and_(upper, _all(0xFFFF0000)))


def _all(number: int) -> Any:
    return ir.Constant(LANE_NUMBERS, [number] * LANES)
