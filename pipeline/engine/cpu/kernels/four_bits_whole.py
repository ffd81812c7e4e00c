"""Multiply by weights in 4 bits in whole numbers, on vectors without bf16.

The 16 values are the same for the whole weight, so that they stay in a register, as multiples of 1/LARGEST. A row's
inputs are made whole numbers of 16 bits in units of their own for each block. The sum of a block's 32 products is
exact in 32 bits, in any order: a row has the same bits beside any others. Then come the units and the weights' scale.
"""

import math
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, CODE_BYTES, CODED_BYTES
from pipeline.engine.cpu.kernels.loops import f32, i32, inner, u32, wide
from pipeline.engine.cpu.kernels.vectors import (
    LANE_NUMBERS,
    LANES,
    PAIRS,
    VECTOR,
    as_float,
    broadcast_pair,
    compiles_for,
    for_each_count,
    halves,
    load,
    load_floats,
    prefetch_line,
    shuffle,
    spread,
    store,
    times,
    words,
)

WIDE = compiles_for("avx512bw")
ROWS = 12 if WIDE else 4  # whose sums leave room for the rest in the registers
LARGEST = 1920  # 32 · 1920 · 2^15 is less than 2^31; fp4's values are whole multiples of 1/192
AHEAD = 16  # blocks: so far ahead codes are asked for
LINE_BYTES = 32  # of codes: two inputs of all outputs
LINES = BLOCK // 2  # of a block
TOGETHER = 4  # lines
INFINITE = 255  # exponent of what is no finite number
SMALLEST = 30  # exponent, as float32 has it, of what is largest in a block: what is less counts as that

u16 = types.uint16
_NUMBER, _BYTE, _WORD = ir.IntType(64), ir.IntType(8), ir.IntType(16)
_BYTES, _WORDS = ir.VectorType(_BYTE, LINE_BYTES), ir.VectorType(_WORD, PAIRS)
_SIXTEEN, _EIGHT = ir.VectorType(_WORD, LANES), ir.VectorType(ir.IntType(32), LANES // 2)


@inner
def row_bytes(width: int) -> int:
    """Return the bytes of a row of inputs in whole numbers: 2 each, then 4 for the unit of each block."""
    return 2 * width + width // BLOCK * 4


@inner
def make_whole(inputs: int, width: int, output: int) -> None:
    """Write a row of inputs in whole numbers. An input that is not finite makes the unit of its block NaN."""
    numbers, whole = carray(halves(inputs), width), carray(halves(output), width)
    units = carray(words(output + 2 * width), width // BLOCK)
    for block in range(width // BLOCK):
        first = block * BLOCK
        most = u16(0)
        for d in range(first, first + BLOCK):
            most = max(most, numbers[d] & u16(0x7FFF))
        exponent = max(u32(most >> u16(7)), u32(SMALLEST))
        # The largest comes to 2^14 or more, but less than 2^15. The powers of 2 are written as float32's bits.
        units[block] = u32(0x7FC00000) if exponent == INFINITE else (exponent - u32(14)) << u32(23)
        units_of_one = as_float((u32(254 + 14) - exponent) << u32(23))
        for d in range(first, first + BLOCK):
            number = wide(numbers[d]) * units_of_one
            whole[d] = u16(i32(number + math.copysign(f32(0.5), number)))


@intrinsic
def multiply(
    context: Any, rows: Any, input: Any, stride: Any, packed: Any, values: Any, blocks: Any, sums: Any
) -> Any:
    """Multiply rows at `input`, 1 to ROWS and `stride` bytes apart, and add to sums [rows, 32] in float32.

    Args:
        input: address of rows from `make_whole`.
        packed: address of codes and scales, as Blocks has them.
        values: address of 16 float32 numbers.
        blocks: an even number.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, count, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _multiply(
    builder: Any, rows: int, input: Any, stride: Any, packed: Any, values: Any, blocks: Any, sums: Any
) -> None:
    """Write the product of some rows. Each row has a vector of sums for each tile."""
    table = _table(builder, values)
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
    # AVX2 has registers for 8 vectors of sums.
    for tiles in [[0, 1]] if WIDE or rows <= 2 else [[0], [1]]:
        with cgutils.for_range(builder, blocks, intp=_NUMBER) as block:
            group = builder.lshr(block.index, _NUMBER(1))
            second = builder.and_(block.index, _NUMBER(1))
            here = builder.add(packed, builder.mul(group, _NUMBER(2 * CODED_BYTES)))
            scales = builder.add(here, _NUMBER(CODE_BYTES))
            codes = builder.add(here, builder.mul(second, _NUMBER(CODE_BYTES // 2)))
            first = builder.mul(block.index, _NUMBER(2 * BLOCK))
            totals = _block(builder, tiles, [builder.add(place, first) for place in places], codes, table)
            units = builder.add(builder.mul(blocks, _NUMBER(2 * BLOCK)), builder.mul(block.index, _NUMBER(4)))
            for row, own in enumerate(totals):
                unit = load(builder, builder.add(places[row], units), _NUMBER(0), ir.FloatType(), 1, 4)
                unit = builder.fmul(unit, ir.FloatType()(1 / LARGEST))
                for tile, total in own.items():
                    scale = load_floats(builder, scales, _NUMBER(tile * LANES))
                    factor = times(builder, scale, spread(builder, unit))
                    place = _NUMBER((2 * row + tile) * LANES)
                    number = builder.sitofp(_in_order(builder, builder.load(total)), VECTOR)
                    sum = _call(builder, "fma.v16f32", number, factor, load_floats(builder, sums, place))
                    store(builder, sum, sums, place)


def _block(
    builder: Any, tiles: list[int], places: list[Any], codes: Any, table: list[Any]
) -> list[dict[int, Any]]:
    """Write each row's sums of the products of one block."""
    totals = [{tile: cgutils.alloca_once(builder, LANE_NUMBERS) for tile in tiles} for _ in places]
    for total in (total for own in totals for total in own.values()):
        builder.store(_all(LANE_NUMBERS, 0), total)
    with cgutils.for_range(builder, _NUMBER(LINES // TOGETHER), intp=_NUMBER) as part:
        here = builder.add(codes, builder.mul(part.index, _NUMBER(TOGETHER * LINE_BYTES)))
        along = builder.mul(part.index, _NUMBER(TOGETHER * 4))
        inputs = [builder.add(place, along) for place in places]
        for line in range(TOGETHER):
            if line % 2 == 0:
                ahead = builder.add(here, _NUMBER(AHEAD * CODED_BYTES + line * LINE_BYTES))
                prefetch_line(builder, ahead, cache=1)
            own_codes = load(builder, here, _NUMBER(line * LINE_BYTES), _BYTE, LINE_BYTES, 1)
            weights = {tile: _weights(builder, own_codes, tile, table) for tile in tiles}
            for input, own in zip(inputs, totals, strict=True):
                pair = broadcast_pair(builder, input, 2 * line)
                for tile, total in own.items():
                    products = _dot(builder, pair, weights[tile])
                    builder.store(builder.add(builder.load(total), products), total)
    return totals


def _table(builder: Any, values: Any) -> list[Any]:
    """Make the 16 values whole numbers: twice in a register, or in two the lower and the upper bytes."""
    numbers = times(builder, load_floats(builder, values, _NUMBER(0)), ir.Constant(VECTOR, [LARGEST] * LANES))
    whole = builder.fptosi(_call(builder, "rint.v16f32", numbers), _SIXTEEN)
    if WIDE:
        return [shuffle(builder, whole, whole, list(range(PAIRS)))]
    both = builder.bitcast(whole, _BYTES)
    return [shuffle(builder, both, both, [2 * n + upper for n in range(LANES)] * 2) for upper in (0, 1)]


def _weights(builder: Any, codes: Any, tile: int, table: list[Any]) -> Any:
    """Look up a tile's weights of two inputs: a pair of 16 bits in each lane."""
    if WIDE:
        own = builder.zext(codes, _WORDS)
        # Of a place the instruction takes 5 bits; the upper half of the table is the lower again.
        places = builder.lshr(own, _all(_WORDS, 4)) if tile else own
        return builder.bitcast(_call(builder, "x86.avx512.permvar.hi.512", table[0], places), LANE_NUMBERS)
    eight = builder.bitcast(codes, _EIGHT)
    eight = builder.lshr(eight, _all(_EIGHT, 4)) if tile else eight
    places = builder.bitcast(builder.and_(eight, _all(_EIGHT, 0x0F0F0F0F)), _BYTES)
    lower, upper = (_call(builder, "x86.avx2.pshuf.b", own, places) for own in table)
    parts = [
        shuffle(builder, lower, upper, [n + other for n in own for other in (0, LINE_BYTES)])
        for own in ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
    ]
    return _joined(builder, parts)


def _in_order(builder: Any, numbers: Any) -> Any:
    """Bring back the order of outputs: AVX2 interleaves the bytes of the two halves of its registers."""
    fours = [range(4 * n, 4 * n + 4) for n in ((0, 1, 2, 3) if WIDE else (0, 2, 1, 3))]
    return shuffle(builder, numbers, numbers, [lane for four in fours for lane in four])


def _dot(builder: Any, a: Any, b: Any) -> Any:
    """Multiply pairs of whole numbers of 16 bits, and add each pair's products."""
    if WIDE:
        return _call(
            builder,
            "x86.avx512.pmaddw.d.512",
            *(builder.bitcast(x, _WORDS) for x in (a, b)),
            result=LANE_NUMBERS,
        )
    parts = []
    for first in (0, 8):
        own = [
            builder.bitcast(shuffle(builder, x, x, list(range(first, first + 8))), _SIXTEEN) for x in (a, b)
        ]
        parts.append(_call(builder, "x86.avx2.pmadd.wd", *own, result=_EIGHT))
    return _joined(builder, parts)


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Take two registers as one vector."""
    first, second = (builder.bitcast(part, _EIGHT) for part in parts)
    return shuffle(builder, first, second, list(range(LANES)))


def _call(builder: Any, name: str, *vectors: Any, result: Any = None) -> Any:
    kind = ir.FunctionType(result or vectors[0].type, [vector.type for vector in vectors])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), vectors)


def _all(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)
