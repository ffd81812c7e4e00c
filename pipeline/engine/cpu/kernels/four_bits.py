"""Turn weights in 4 bits to bf16, where vectors have it: for a few rows in the registers, else a few blocks at a time.

A code's value times its scale is rounded to bf16 as bitsandbytes does, so that the products are those of the
weight that it dequantizes. That is done once for the 16 codes of each output and scale: two tables of 16 bytes,
which an instruction looks up for 16 codes at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import (
    BLOCK,
    BLOCK_BYTES,
    CODE_BYTES,
    CODED_BYTES,
    LINE_BYTES,
    TILE_ROWS,
)
from pipeline.engine.cpu.kernels.vectors import (
    LANE_NUMBERS,
    LANES,
    VECTOR,
    broadcast_pair,
    dot_pairs,
    for_each_count,
    load,
    prefetch_line,
    shuffle,
    stepwise,
    store,
)

FEW_ROWS = 4  # whose products leave room for the rest in the registers
AHEAD = 8  # times two blocks: so far ahead codes are asked for
PARTS = LANES // 4  # of a register, 16 bytes each: no shuffle leaves its own

_NUMBER, _FLOAT = ir.IntType(64), ir.FloatType()
_BYTES, _PAIRS = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)
_QUADS = ir.VectorType(ir.IntType(64), LANES // 2)
_SORTED = [0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15]  # lower bytes first, then upper ones


@intrinsic
def unpack(context: Any, packed: Any, values: Any, blocks: Any, output: Any) -> Any:
    """Write an even number of blocks in bf16, 2 KiB each, as the products in bf16 read them.

    Args:
        packed: address of codes and scales, as Blocks has them.
        values: address of 16 float32 numbers.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, values, blocks, output = arguments
        table = _spread_values(builder, values)
        with _each_group(builder, packed, blocks) as (group, here):
            there = builder.add(output, builder.mul(group, _NUMBER(2 * BLOCK_BYTES)))
            with stepwise(builder, _NUMBER(BLOCK), LANES) as first:
                first_line = builder.add(there, _before(builder, first, BLOCK_BYTES // 2))

                def keep(line: Any, block: Any, pair: int, _: int) -> None:
                    place = builder.add(first_line, builder.mul(block, _NUMBER(BLOCK_BYTES)))
                    place = builder.add(place, _NUMBER(pair * LINE_BYTES))
                    builder.store(line, builder.inttoptr(place, line.type.as_pointer()), align=4)

                _each_line(builder, here, [first], table, keep)
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
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in (0, 1)] for _ in places]
    table = _spread_values(builder, values)
    with _each_group(builder, packed, blocks) as (group, here):
        inputs = [builder.add(place, builder.mul(group, _NUMBER(2 * LINE_BYTES))) for place in places]

        def add(line: Any, block: Any, pair: int, tile: int) -> None:
            for place, own in zip(inputs, totals, strict=True):
                numbers = builder.add(place, builder.mul(block, _NUMBER(LINE_BYTES)))
                both = broadcast_pair(builder, numbers, 2 * pair)
                builder.store(dot_pairs(builder, builder.load(own[tile]), both, line), own[tile])

        _each_line(builder, here, [_NUMBER(0), _NUMBER(TILE_ROWS)], table, add)
    for row, own in enumerate(totals):
        for tile, total in enumerate(own):
            store(builder, builder.load(total), sums, _NUMBER((2 * row + tile) * LANES))


@contextmanager
def _each_group(builder: Any, packed: Any, blocks: Any) -> Iterator[tuple[Any, Any]]:
    """Write a loop over two blocks, which have scales together: the instructions within get index and address."""
    with cgutils.for_range(builder, builder.lshr(blocks, _NUMBER(1)), intp=_NUMBER) as group:
        here = builder.add(packed, builder.mul(group.index, _NUMBER(2 * CODED_BYTES)))
        for line in range(2 * CODED_BYTES // 64):
            prefetch_line(builder, builder.add(here, _NUMBER(2 * CODED_BYTES * AHEAD + 64 * line)), cache=1)
        yield group.index, here


def _each_line(
    builder: Any, here: Any, firsts: list[Any], values: list[Any], use: Callable[..., None]
) -> None:
    """Write instructions for some outputs of a group, which take turns, so that no sum waits for itself.

    Args:
        here: address of the group.
        firsts: the first of each LANES outputs.
        values: from `_spread_values`.
        use: use(line, block, pair, place) gets two inputs of the outputs at a place in `firsts`, in bf16.
    """
    scales = builder.add(here, _NUMBER(CODE_BYTES))
    own = [load(builder, scales, first, _FLOAT, LANES, 4) for first in firsts]
    tables = [
        [_tables(builder, values, _in_parts(builder, scale, [n] * 4)) for n in range(4)] for scale in own
    ]
    starts = [builder.add(here, _before(builder, first, CODE_BYTES // 2)) for first in firsts]
    with cgutils.for_range(builder, _NUMBER(2), intp=_NUMBER) as block:
        along = builder.mul(block.index, _NUMBER(CODE_BYTES // 4))
        codes = [builder.add(start, along) for start in starts]
        for shift in (0, 4):
            looked = [_looked(builder, *own, shift) for own in zip(codes, tables, strict=True)]
            for upper in (False, True):
                for place, bytes_of_four in enumerate(looked):
                    outputs = [_weave(builder, both, _BYTES, upper) for both in bytes_of_four]
                    for pair, line in enumerate(_turned(builder, outputs)):
                        use(line, block.index, 2 * shift + 4 * upper + pair, place)


def _before(builder: Any, first: Any, tile_bytes: int) -> Any:
    """Return the bytes before an output in a group: whole tiles, and 4 for each output in a line."""
    tile, within = builder.lshr(first, _NUMBER(4)), builder.and_(first, _NUMBER(TILE_ROWS - 1))
    return builder.add(builder.mul(tile, _NUMBER(tile_bytes)), builder.shl(within, _NUMBER(2)))


def _looked(builder: Any, codes: Any, tables: list[Any], shift: int) -> list[list[Any]]:
    """Look up the lower or the upper codes of some outputs in a block: the lower and the upper bytes of weights."""
    found = []
    for n, both in enumerate(tables):
        own = load(builder, codes, _NUMBER(n * LINE_BYTES), ir.IntType(8), 4 * LANES, 1)
        chosen = _nibbles(builder, own, shift)
        found.append([_look_up(builder, table, chosen) for table in both])
    return found


def _spread_values(builder: Any, values: Any) -> list[Any]:
    """Load the 16 values, four to a register, and again in each part of it."""
    fours = [load(builder, values, _NUMBER(4 * n), _FLOAT, 4, 4) for n in range(4)]
    return [shuffle(builder, four, four, [0, 1, 2, 3] * PARTS) for four in fours]


def _tables(builder: Any, values: list[Any], scale: Any) -> list[Any]:
    """Return the lower and the upper bytes of the 16 weights of the output that each part's scale is of."""
    weights = [builder.fmul(four, scale) for four in values]
    pairs = [_pair(builder, *weights[at : at + 2]) for at in (0, 2)]
    halves = [_in_parts(builder, builder.bitcast(x, _BYTES), _SORTED) for x in pairs]
    return [_weave(builder, halves, _QUADS, upper) for upper in (False, True)]


def _pair(builder: Any, first: Any, second: Any) -> Any:
    """Round two vectors to bf16, to the nearest, ties to even: lane by lane a pair."""
    kind = ir.FunctionType(_PAIRS, [VECTOR, VECTOR])
    text = "vcvtne2ps2bf16 $2, $1, $0"
    both = builder.asm(kind, text, "=v,v,v", [second, first], side_effect=False)
    interleaved = [place + LANES * later for place in range(LANES) for later in (0, 1)]
    return builder.bitcast(shuffle(builder, both, both, interleaved), LANE_NUMBERS)


def _nibbles(builder: Any, codes: Any, shift: int) -> Any:
    """Return the lower or the upper half of each byte."""
    words = builder.bitcast(codes, LANE_NUMBERS)
    words = builder.lshr(words, _all(shift)) if shift else words
    return builder.bitcast(builder.and_(words, _all(0x0F0F0F0F)), _BYTES)


def _look_up(builder: Any, table: Any, places: Any) -> Any:
    """Return the table's byte at each place, part by part."""
    kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pshuf.b.512")
    return builder.call(function, [builder.bitcast(table, _BYTES), places])


def _turned(builder: Any, outputs: list[Any]) -> list[Any]:
    """Turn four registers over: from each output's four pairs to each pair's outputs, in their order."""
    twos = [
        _weave(builder, outputs[at : at + 2], LANE_NUMBERS, upper) for upper in (False, True) for at in (0, 2)
    ]
    lines = [_weave(builder, twos[at : at + 2], _QUADS, upper) for at in (0, 2) for upper in (False, True)]
    return [builder.bitcast(line, LANE_NUMBERS) for line in lines]


def _weave(builder: Any, two: Sequence[Any], kind: Any, upper: bool) -> Any:
    """Interleave the elements of the lower or the upper half of each part of two registers."""
    count = kind.count // PARTS
    half = range(count // 2, count) if upper else range(count // 2)
    lanes = [
        part * count + place + other for part in range(PARTS) for place in half for other in (0, kind.count)
    ]
    left, right = (builder.bitcast(register, kind) for register in two)
    return shuffle(builder, left, right, lanes)


def _in_parts(builder: Any, vector: Any, lanes: list[int]) -> Any:
    """Reorder each part in the same way."""
    count = len(lanes)
    return shuffle(builder, vector, vector, [part * count + lane for part in range(PARTS) for lane in lanes])


def _all(number: int) -> Any:
    return ir.Constant(LANE_NUMBERS, [number] * LANES)
