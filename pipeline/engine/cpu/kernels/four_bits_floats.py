"""Multiply by weights in 4 bits on vectors without bf16: what codes stand for is looked up, in float32.

The 16 values are the same for the whole weight, so that they stay in registers, and a scale comes to the sum of the
32 inputs of a block. A sum runs over a block's inputs one after the other, whatever the number of rows: a row has the
same bits beside any others.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import CODE_BYTES, CODED_BYTES, TILE_ROWS
from pipeline.engine.cpu.kernels.vectors import (
    HALVES,
    LANE_NUMBERS,
    LANES,
    VECTOR,
    compiles_for,
    constant,
    for_each_count,
    load,
    load_floats,
    prefetch_line,
    shuffle,
    spread,
    store,
    times,
)

WIDE = compiles_for("avx512f")
FEW_ROWS = 1 << 30  # however many: codes are looked up again for every ROWS of them
ROWS = 12 if WIDE else 4  # whose sums leave room for the rest in the registers
AHEAD = 8  # times two blocks: so far ahead codes are asked for
LINE_BYTES = 32  # of codes: two inputs of all outputs
PAIRS_TOGETHER = 4  # of inputs
PAIRS = 16  # of a block
# AVX2 looks up whole numbers of 16 bits, byte by byte, and interleaves the two halves of its registers.
LARGEST = 32767
UNIT = 1.0 if WIDE else 1 / (LARGEST << 16)
ORDER = list(range(LANES)) if WIDE else [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]

_NUMBER, _FLOAT = ir.IntType(64), ir.FloatType()
_BYTES = ir.VectorType(ir.IntType(8), LINE_BYTES)


@intrinsic
def multiply_few(
    context: Any, rows: Any, input: Any, stride: Any, packed: Any, values: Any, blocks: Any, sums: Any
) -> Any:
    """Multiply rows at `input`, 1 to ROWS and `stride` bytes apart, and add to sums [rows, 32] in float32.

    Args:
        input: address of float32 numbers.
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
            group, second = builder.lshr(block.index, _NUMBER(1)), builder.and_(block.index, _NUMBER(1))
            here = builder.add(packed, builder.mul(group, _NUMBER(2 * CODED_BYTES)))
            codes = builder.add(here, builder.mul(second, _NUMBER(CODE_BYTES // 2)))
            first = builder.mul(block.index, _NUMBER(2 * PAIRS * 4))
            inputs = [builder.add(place, first) for place in places]
            totals = _block(builder, tiles, inputs, codes, table)
            for tile in tiles:
                scale = load_floats(builder, builder.add(here, _NUMBER(CODE_BYTES)), _NUMBER(tile * LANES))
                scale = times(builder, scale, constant(UNIT))
                for row in range(rows):
                    place = _NUMBER((2 * row + tile) * LANES)
                    own = builder.load(totals[row][tile])
                    own = shuffle(builder, own, own, ORDER)
                    own = _multiply_add(builder, own, scale, load_floats(builder, sums, place))
                    store(builder, own, sums, place)


def _block(builder: Any, tiles: list[int], inputs: list[Any], codes: Any, table: list[Any]) -> list[dict[int, Any]]:
    """Write sums over one block's inputs."""
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    totals = [{tile: cgutils.alloca_once(builder, VECTOR) for tile in tiles} for _ in inputs]
    for own in totals:
        for total in own.values():
            builder.store(zero, total)
    with cgutils.for_range(builder, _NUMBER(PAIRS // PAIRS_TOGETHER), intp=_NUMBER) as part:
        here = builder.add(codes, builder.mul(part.index, _NUMBER(PAIRS_TOGETHER * LINE_BYTES)))
        along = builder.mul(part.index, _NUMBER(PAIRS_TOGETHER * 8))
        places = [builder.add(place, along) for place in inputs]
        for pair in range(PAIRS_TOGETHER):
            if pair % 2 == 0:
                prefetch_line(builder, builder.add(here, _NUMBER(2 * CODED_BYTES * AHEAD + LINE_BYTES * pair)), cache=1)
            line = load(builder, here, _NUMBER(pair * LINE_BYTES), ir.IntType(8), LINE_BYTES, 1)
            weights = {tile: _weights(builder, line, tile, table) for tile in tiles}
            for at in (0, 1):
                for place, own in zip(places, totals, strict=True):
                    input = spread(builder, load(builder, place, _NUMBER(2 * pair + at), _FLOAT, 1, 4))
                    for tile, total in own.items():
                        builder.store(_multiply_add(builder, input, weights[tile][at], builder.load(total)), total)
    return totals


def _table(builder: Any, values: Any) -> list[Any]:
    """Load the 16 values into a register, or their lower and their upper bytes as whole numbers, in each half of two."""
    numbers = load_floats(builder, values, _NUMBER(0))
    if WIDE:
        return [numbers]
    whole = _call(builder, "rint.v16f32", VECTOR, times(builder, numbers, constant(LARGEST)))
    words = builder.fptosi(whole, HALVES)
    both = builder.bitcast(words, _BYTES)
    return [shuffle(builder, both, both, [2 * n + upper for n in range(LANES)] * 2) for upper in (0, 1)]


def _weights(builder: Any, line: Any, tile: int, table: list[Any]) -> list[Any]:
    """Look up a tile's weights of two inputs, in the ORDER of a register, in units of UNIT."""
    if WIDE:
        words = builder.zext(builder.bitcast(line, HALVES), LANE_NUMBERS)
        # Of each lane the instruction takes the lowest 4 bits.
        places = [builder.lshr(words, _all(8 * at + 4 * tile)) for at in (0, 1)]
        return [_call(builder, "x86.avx512.permvar.sf.512", VECTOR, table[0], place) for place in places]
    words = builder.bitcast(line, ir.VectorType(ir.IntType(32), 8))
    words = builder.lshr(words, ir.Constant(words.type, [4 * tile] * 8)) if tile else words
    places = builder.bitcast(builder.and_(words, ir.Constant(words.type, [0x0F0F0F0F] * 8)), _BYTES)
    lower, upper = (_call(builder, "x86.avx2.pshuf.b", _BYTES, own, places) for own in table)
    woven = [
        shuffle(builder, lower, upper, [half + n + other for half in (0, 16) for n in range(start, start + 8) for other in (0, 32)])
        for start in (0, 8)
    ]
    parts = [builder.bitcast(x, words.type) for x in woven]
    pairs = shuffle(builder, *parts, list(range(LANES)))
    # The second input's number keeps the first one's below its own: less than one in its last digit.
    first = builder.shl(pairs, _all(16))
    return [builder.sitofp(x, VECTOR) for x in (first, pairs)]


def _multiply_add(builder: Any, a: Any, b: Any, sums: Any) -> Any:
    """Compute a · b + sums, rounded once."""
    return _call(builder, "fma.v16f32", VECTOR, a, b, sums)


def _call(builder: Any, name: str, result: Any, *vectors: Any) -> Any:
    kind = ir.FunctionType(result, [vector.type for vector in vectors])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), vectors)


def _all(number: int) -> Any:
    return ir.Constant(LANE_NUMBERS, [number] * LANES)
