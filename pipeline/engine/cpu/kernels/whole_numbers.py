"""Multiply by weights in 4 and in 8 bits in whole numbers, on vectors without bf16.

A row's inputs are made whole numbers of 16 bits in units of their own for each block. The sum of a block's 32
products is exact in 32 bits, in any order: a row has the same bits beside any others. Then comes the unit.
The 16 values of weights in 4 bits are the same for the whole weight, so that they stay in a register, as multiples
of 1/LARGEST; their blocks' scales come with the unit. Those in 8 bits are whole numbers, and are scaled at the end.
"""

import math
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import (
    BLOCK,
    CODE_BYTES,
    CODED_BYTES,
    INT8_BLOCK_BYTES,
)
from pipeline.engine.cpu.kernels.loops import f32, i32, u32
from pipeline.engine.cpu.kernels.precision import inner, wide
from pipeline.engine.cpu.kernels.vectors import (
    HAS_AVX512,
    LANES,
    PAIRS,
    REGISTER_LANES,
    REGISTERS,
    ROWS,
    VECTOR,
    as_float,
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

HAS_VNNI = compiles_for("avx512vnni" if HAS_AVX512 else "avxvnni")
LARGEST = 1920  # 32 · 1920 · 2^15 is less than 2^31, as with 128; fp4's values are whole multiples of 1/192
AHEAD_BYTES = 16 * CODED_BYTES  # so far ahead weights are asked for
LINE_BYTES = 32  # of two inputs: in 4 bits all outputs, in 8 bits a tile's
LINES = BLOCK // 2  # of a block
TOGETHER = 2  # lines
INFINITE = 255  # exponent of what is no finite number
# Exponent, as float32 has it, of what is largest in a block: what is less counts as that. So a unit times a scale
# is a normal number, in rows of zeros too: with others a sum takes several times as long.
SMALLEST = 60

u16 = types.uint16
_NUMBER, _BYTE, _WORD = ir.IntType(64), ir.IntType(8), ir.IntType(16)
_BYTES, _WORDS = ir.VectorType(_BYTE, LINE_BYTES), ir.VectorType(_WORD, PAIRS)
_REGISTER = ir.VectorType(ir.IntType(32), REGISTER_LANES)


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


class _EightBits:
    """Read a strip's weights in 8 bits, as Blocks has them."""

    def __init__(self, builder: Any, packed: Any) -> None:
        self.builder, self.packed, self.bytes = builder, packed, INT8_BLOCK_BYTES

    def block(self, index: Any) -> Any:
        """Return the address of a block."""
        return self.builder.add(self.packed, self.builder.mul(index, _NUMBER(INT8_BLOCK_BYTES)))

    def pairs(self, block: Any, line: Any, tile: int) -> list[Any]:
        """Load a tile's weights of two inputs: pairs of 16 bits, in some registers."""
        count = LINE_BYTES // REGISTERS
        first = _line(self.builder, block, self.builder.add(line, _NUMBER(tile * LINES)))
        numbers = [load(self.builder, first, _NUMBER(n * count), _BYTE, count, 1) for n in range(REGISTERS)]
        return [self.builder.sext(own, ir.VectorType(_WORD, count)) for own in numbers]

    def factor(self, index: Any, tile: int, unit: Any) -> Any:
        """Return what a block's sums are multiples of."""
        return spread(self.builder, unit)


class _FourBits:
    """Read a strip's weights in 4 bits, as Blocks has them."""

    def __init__(self, builder: Any, packed: Any, values: Any) -> None:
        self.builder, self.packed, self.bytes = builder, packed, CODE_BYTES // 2
        self.table = _table(builder, values)

    def block(self, index: Any) -> Any:
        """Return the address of a block's codes."""
        second = self.builder.and_(index, _NUMBER(1))
        return self.builder.add(self._two(index), self.builder.mul(second, _NUMBER(self.bytes)))

    def _two(self, index: Any) -> Any:
        """Return the address of the two blocks that share scales."""
        two = self.builder.lshr(index, _NUMBER(1))
        return self.builder.add(self.packed, self.builder.mul(two, _NUMBER(2 * CODED_BYTES)))

    def pairs(self, block: Any, line: Any, tile: int) -> list[Any]:
        """Look up a tile's weights of two inputs: pairs of 16 bits, in some registers."""
        builder = self.builder
        codes = load(builder, _line(builder, block, line), _NUMBER(0), _BYTE, LINE_BYTES, 1)
        if HAS_AVX512:
            own = builder.zext(codes, _WORDS)
            # Of a place the instruction takes 5 bits; the upper half of the table is the lower again.
            places = builder.lshr(own, _all(_WORDS, 4)) if tile else own
            return [_call(builder, "x86.avx512.permvar.hi.512", *self.table, places)]
        eight = builder.bitcast(codes, _REGISTER)
        eight = builder.lshr(eight, _all(_REGISTER, 4)) if tile else eight
        places = builder.bitcast(builder.and_(eight, _all(_REGISTER, 0x0F0F0F0F)), _BYTES)
        lower, upper = (_call(builder, "x86.avx2.pshuf.b", own, places) for own in self.table)
        return [
            shuffle(builder, lower, upper, [n + other for n in own for other in (0, LINE_BYTES)])
            for own in ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
        ]

    def factor(self, index: Any, tile: int, unit: Any) -> Any:
        """Return what a block's sums are multiples of."""
        scales = self.builder.add(self._two(index), _NUMBER(CODE_BYTES))
        unit = self.builder.fmul(unit, ir.FloatType()(1 / LARGEST))
        scale = load_floats(self.builder, scales, _NUMBER(tile * LANES))
        return times(self.builder, scale, spread(self.builder, unit))


@intrinsic
def multiply_eight(
    context: Any, rows: Any, input: Any, stride: Any, blocks: Any, sums: Any, packed: Any
) -> Any:
    """Multiply rows at `input`, 1 to ROWS and `stride` bytes apart, and add to sums [rows, 32] in float32.

    Args:
        input: address of rows from `make_whole`.
        packed: address of weights in 8 bits, as Blocks has them. Their scales are left for the end.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rest, packed = arguments
        _multiply(builder, *rest, _EightBits(builder, packed))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def multiply_four(
    context: Any, rows: Any, input: Any, stride: Any, blocks: Any, sums: Any, packed: Any, values: Any
) -> Any:
    """Multiply as `multiply_eight` does by weights in 4 bits.

    Args:
        blocks: an even number.
        packed: address of codes and scales, as Blocks has them.
        values: address of 16 float32 numbers.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rest, packed, values = arguments
        _multiply(builder, *rest, _FourBits(builder, packed, values))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


def _multiply(builder: Any, rows: Any, *rest: Any) -> None:
    """Write the product of each number of rows."""
    for_each_count(builder, rows, ROWS, lambda count: _multiply_rows(builder, count, *rest))


def _multiply_rows(
    builder: Any, rows: int, input: Any, stride: Any, blocks: Any, sums: Any, weights: Any
) -> None:
    """Write the product of some rows block by block."""
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
    with cgutils.for_range(builder, blocks, intp=_NUMBER) as block:
        here, first = weights.block(block.index), builder.mul(block.index, _NUMBER(2 * BLOCK))
        inputs = [builder.add(place, first) for place in places]
        units = builder.add(builder.mul(blocks, _NUMBER(2 * BLOCK)), builder.mul(block.index, _NUMBER(4)))
        # AVX2 has registers for 12 sums.
        for tiles in [[0, 1]] if HAS_AVX512 or rows <= 2 else [[0], [1]]:
            for row, own in enumerate(_block(builder, tiles, inputs, here, weights)):
                unit = load(builder, builder.add(places[row], units), _NUMBER(0), ir.FloatType(), 1, 4)
                for tile, total in own.items():
                    place = _NUMBER((2 * row + tile) * LANES)
                    factor = weights.factor(block.index, tile, unit)
                    before = load_floats(builder, sums, place)
                    store(builder, _call(builder, "fma.v16f32", total, factor, before), sums, place)


def _block(
    builder: Any, tiles: list[int], inputs: list[Any], here: Any, weights: Any
) -> list[dict[int, Any]]:
    """Write each row's sums of the products of one block, tile by tile."""
    totals = [{tile: [_zero(builder) for _ in range(REGISTERS)] for tile in tiles} for _ in inputs]
    with cgutils.for_range(builder, _NUMBER(LINES // TOGETHER), intp=_NUMBER) as part:
        part_bytes = weights.bytes * TOGETHER // LINES
        ahead = builder.add(here, builder.mul(part.index, _NUMBER(part_bytes)))
        for line in range(0, part_bytes if 0 in tiles else 0, 64):
            prefetch_line(builder, builder.add(ahead, _NUMBER(AHEAD_BYTES + line)), cache=1)
        for n in range(TOGETHER):
            line = builder.add(builder.mul(part.index, _NUMBER(TOGETHER)), _NUMBER(n))
            pairs = {tile: weights.pairs(here, line, tile) for tile in tiles}
            for input, own in zip(inputs, totals, strict=True):
                both = _spread_pair(builder, input, line)
                for tile in tiles:
                    for total, weight in zip(own[tile], pairs[tile], strict=True):
                        builder.store(_added(builder, builder.load(total), both, weight), total)
    return [{tile: _as_floats(builder, own[tile]) for tile in tiles} for own in totals]


def _line(builder: Any, block: Any, line: Any) -> Any:
    """Return the address of a line of weights."""
    return builder.add(block, builder.mul(line, _NUMBER(LINE_BYTES)))


def _zero(builder: Any) -> Any:
    """Write a sum that is 0 at this place."""
    total = cgutils.alloca_once(builder, _REGISTER)
    builder.store(_all(_REGISTER, 0), total)
    return total


def _spread_pair(builder: Any, input: Any, line: Any) -> Any:
    """Load two inputs into every lane of a register."""
    pair = spread(builder, load(builder, input, line, ir.IntType(32), 1, 4))
    return shuffle(builder, pair, pair, list(range(_REGISTER.count)))


def _added(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Add the products of pairs of 16 bits.

    By instructions written as text: LLVM would change their order, for which registers run out.
    """
    a, b = (builder.bitcast(x, _REGISTER) for x in (a, b))
    if HAS_VNNI:
        kind = ir.FunctionType(_REGISTER, [_REGISTER] * 3)
        text = "vpdpwssd $3, $2, $0" if HAS_AVX512 else "{vex} vpdpwssd $3, $2, $0"
        return builder.asm(kind, text, "=v,0,v,v", [total, a, b], side_effect=False)
    kind = ir.FunctionType(ir.LiteralStructType([_REGISTER] * 2), [_REGISTER] * 3)
    text = "vpmaddwd $4, $3, $1\nvpaddd $1, $0, $0"
    both = builder.asm(kind, text, "=v,=v,0,v,v", [total, a, b], side_effect=False)
    return builder.extract_value(both, 0)


def _as_floats(builder: Any, totals: list[Any]) -> Any:
    """Turn a tile's sums to float32."""
    first, last = builder.load(totals[0]), builder.load(totals[-1])
    return builder.sitofp(shuffle(builder, first, last, list(range(LANES))), VECTOR)


def _table(builder: Any, values: Any) -> list[Any]:
    """Make the 16 values whole numbers: twice in a register, or in two the lower and the upper bytes."""
    numbers = times(builder, load_floats(builder, values, _NUMBER(0)), ir.Constant(VECTOR, [LARGEST] * LANES))
    whole = builder.fptosi(_call(builder, "rint.v16f32", numbers), ir.VectorType(_WORD, LANES))
    if HAS_AVX512:
        return [shuffle(builder, whole, whole, list(range(LANES)) * 2)]
    both = builder.bitcast(whole, _BYTES)
    return [shuffle(builder, both, both, [2 * n + upper for n in range(LANES)] * 2) for upper in (0, 1)]


def _call(builder: Any, name: str, *vectors: Any) -> Any:
    kind = ir.FunctionType(vectors[0].type, [vector.type for vector in vectors])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), vectors)


def _all(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * kind.count)
