"""Turn weights in 4 bits to bf16, a few blocks at a time, on vectors.

A code's value times its scale is rounded to bf16 as bitsandbytes does, so that the products are those of the
weight that it dequantizes. numba's cache of the products does not see a change in this file: touch linear_*.py.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import (
    BLOCK_BYTES,
    CODE_BYTES,
    SCALE_BYTES,
    TILE_BYTES,
    TILE_ROWS,
)
from pipeline.engine.cpu.kernels.vectors import (
    HAS_BF16,
    LANE_NUMBERS,
    LANES,
    PAIRS,
    VECTOR,
    compiles_for,
    load,
    load_floats,
    shuffle,
    times,
)

_NUMBER, _WORD = ir.IntType(64), ir.IntType(32)
_LINE = ir.VectorType(ir.IntType(16), PAIRS)
_HAS_AVX512 = compiles_for("avx512f")
INTERLEAVED = [place + LANES * second for place in range(LANES) for second in (0, 1)]


@intrinsic
def unpack(context: Any, packed: Any, values: Any, blocks: Any, output: Any) -> Any:
    """Write an even number of `blocks` in bf16, 2 KiB each, as the products of bf16 read them.

    Args:
        packed: address of codes and scales, as Blocks has them.
        values: address of 16 float32 numbers.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed, values, blocks, output = arguments
        table = load_floats(builder, values, _NUMBER(0))
        with cgutils.for_range(builder, builder.lshr(blocks, _NUMBER(1)), intp=_NUMBER) as group:
            codes = builder.add(packed, builder.mul(group.index, _NUMBER(CODE_BYTES + SCALE_BYTES)))
            scales = [load_floats(builder, codes, _NUMBER(CODE_BYTES // 4 + tile * LANES)) for tile in (0, 1)]
            with cgutils.for_range(builder, _NUMBER(2), intp=_NUMBER) as half:
                here = builder.add(codes, builder.mul(half.index, _NUMBER(CODE_BYTES // 2)))
                block = builder.add(builder.shl(group.index, _NUMBER(1)), half.index)
                there = builder.add(output, builder.mul(block, _NUMBER(BLOCK_BYTES)))
                for tile, scale in enumerate(scales):
                    _unpack_tile(builder, table, scale, here, there, tile)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _unpack_tile(builder: Any, table: Any, scale: Any, here: Any, there: Any, tile: int) -> None:
    """Write one tile: 16 outputs and 32 inputs, eight of them from each vector of codes."""
    for eight in range(4):
        codes = load(builder, here, _NUMBER((tile * 4 + eight) * LANES), _WORD, LANES, 4)
        for pair in range(4):
            looked = [_look_up(builder, table, codes, 8 * pair + shift) for shift in (4, 0)]
            line = _pair(builder, *(times(builder, number, scale) for number in looked))
            place = (tile * TILE_ROWS + eight * 4 + pair) * TILE_BYTES
            pointer = builder.inttoptr(builder.add(there, _NUMBER(place)), line.type.as_pointer())
            builder.store(line, pointer, align=4)


def _look_up(builder: Any, table: Any, codes: Any, shift: int) -> Any:
    """Return the values of the codes at a place in each lane."""
    moved = builder.lshr(codes, _all(shift)) if shift else codes
    if _HAS_AVX512:  # only the lower four bits of a lane choose
        return _permute(builder, "avx512.permvar.sf.512", table, moved)
    upper = builder.icmp_signed("<", builder.shl(codes, _all(28 - shift)), _all(0))
    both = []
    for half in (0, 1):
        own = shuffle(builder, table, table, list(range(half * 8, half * 8 + 8)))
        quarters = [shuffle(builder, moved, moved, list(range(q * 8, q * 8 + 8))) for q in (0, 1)]
        found = [_permute(builder, "avx2.permps", own, quarter) for quarter in quarters]
        both.append(shuffle(builder, found[0], found[1], list(range(LANES))))
    return builder.select(upper, both[1], both[0])


def _permute(builder: Any, name: str, table: Any, places: Any) -> Any:
    kind = ir.FunctionType(table.type, [table.type, places.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    return builder.call(function, [table, places])


def _pair(builder: Any, first: Any, second: Any) -> Any:
    """Round two vectors to bf16, to the nearest, ties to even: lane by lane a pair."""
    if HAS_BF16:
        kind = ir.FunctionType(_LINE, [VECTOR, VECTOR])
        text = "vcvtne2ps2bf16 $2, $1, $0"
        both = builder.asm(kind, text, "=v,v,v", [second, first], side_effect=False)
        return shuffle(builder, both, both, INTERLEAVED)
    bits = [builder.bitcast(x, LANE_NUMBERS) for x in (first, second)]
    odd = [builder.and_(builder.lshr(x, _all(16)), _all(1)) for x in bits]
    lower, upper = (builder.add(builder.add(x, _all(0x7FFF)), bit) for x, bit in zip(bits, odd, strict=True))
    return builder.or_(builder.lshr(lower, _all(16)), builder.and_(upper, _all(0xFFFF0000)))


def _all(number: int) -> Any:
    return ir.Constant(LANE_NUMBERS, [number] * LANES)
