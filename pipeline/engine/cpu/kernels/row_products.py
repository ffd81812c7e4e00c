"""Multiply some rows by a strip of weights in bf16, their sums in registers all the while.

By instructions for pairs of bf16 numbers, where vectors have them. Elsewhere in float32, by inputs that are widened
beforehand, so that one load spreads an input over a register; weights are widened on their way, once for all rows.
"""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, TILE_BYTES
from pipeline.engine.cpu.kernels.loops import inner, wide
from pipeline.engine.cpu.kernels.vectors import (
    HAS_AVX512,
    HAS_BF16,
    LANES,
    REGISTER_LANES,
    REGISTERS,
    ROWS,
    floats,
    for_each_count,
    halves,
    prefetch_line,
)

INPUT_BYTES = 2 if HAS_BF16 else 4
FEW_ROWS = 2  # whose sums leave room for both tiles with AVX2, too
PAIRS_TOGETHER = 2  # of inputs: with more, the instructions outgrow the cache that holds them decoded
PARTS = BLOCK // 2 // PAIRS_TOGETHER  # of a block
PART_BYTES = PAIRS_TOGETHER * TILE_BYTES  # of a tile's weights

_NUMBER = ir.IntType(64)
_REGISTER = ir.VectorType(ir.FloatType(), REGISTER_LANES)
_UPPER_HALVES = ir.Constant(ir.VectorType(ir.IntType(32), REGISTER_LANES), [0xFFFF0000] * REGISTER_LANES)

Register = tuple[int, int]  # of which tile, and which of its REGISTERS


@inner
def widen(inputs: int, count: int, output: int) -> None:
    """Write numbers in bf16 in float32."""
    numbers, widened = carray(halves(inputs), count), carray(floats(output), count)
    for d in range(count):
        widened[d] = wide(numbers[d])


@intrinsic
def multiply(
    context: Any,
    rows: Any,
    input: Any,
    stride: Any,
    blocks: Any,
    sums: Any,
    weights: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Multiply rows at `input`, 1 to ROWS and `stride` bytes apart, and add to sums [rows, 32] in float32.

    Args:
        input: address of numbers of INPUT_BYTES.
        weights: address of blocks of 32 inputs each, as Blocks has them.
        soon, step: with every TILE_BYTES of weights, the cache line there is asked for, `step` bytes further on.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, count, rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _multiply(builder: Any, rows: int, arguments: list[Any]) -> None:
    """Write the product of some rows: by both tiles at once or, for want of registers, one after the other."""
    for tiles in [(0, 1)] if HAS_AVX512 or rows <= FEW_ROWS else [(0,), (1,)]:
        _multiply_tiles(builder, rows, tiles, arguments)


def _multiply_tiles(builder: Any, rows: int, tiles: tuple[int, ...], arguments: list[Any]) -> None:
    """Write the product of some rows and of these tiles of each block, part by part.

    Every third row has its address in a register; the next two are one and two strides on: with an address for
    each, the registers for addresses would run out.
    """
    input, stride, blocks, sums, weights, soon, step = arguments
    registers = [(tile, n) for tile in tiles for n in range(REGISTERS)]
    ends = []
    for row in range(rows):
        for tile, n in registers:
            place = _NUMBER(4 * (row * BLOCK + tile * LANES + n * REGISTER_LANES))
            ends.append(builder.inttoptr(builder.add(sums, place), _REGISTER.as_pointer()))
    totals = [cgutils.alloca_once_value(builder, builder.load(end, align=4)) for end in ends]
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(0, rows, 3)]
    lines = PAIRS_TOGETHER * len(tiles)  # that a part asks for
    before = builder.mul(blocks, _NUMBER(tiles[0] * PARTS))
    with (
        cgutils.for_range(builder, blocks, intp=_NUMBER) as block,
        cgutils.for_range(builder, _NUMBER(PARTS), intp=_NUMBER) as part,
    ):
        number = builder.add(builder.mul(block.index, _NUMBER(PARTS)), part.index)
        along = builder.mul(number, _NUMBER(2 * PAIRS_TOGETHER * INPUT_BYTES))
        here = builder.add(weights, builder.mul(block.index, _NUMBER(BLOCK_BYTES)))
        here = builder.add(here, builder.mul(part.index, _NUMBER(PART_BYTES)))
        asked = builder.mul(builder.add(before, number), _NUMBER(lines))
        ahead = builder.add(soon, builder.mul(asked, step))
        for line in range(lines):
            prefetch_line(builder, builder.add(ahead, builder.mul(step, _NUMBER(line))), cache=2)
        addresses = [here, stride, *(builder.add(place, along) for place in places)]
        for total, new in zip(totals, _part(builder, registers, totals, addresses), strict=True):
            builder.store(new, total)
    for total, end in zip(totals, ends, strict=True):
        builder.store(builder.load(total), end, align=4)


def _part(builder: Any, registers: list[Register], totals: list[Any], addresses: list[Any]) -> list[Any]:
    """Add one more part, by instructions written as text: LLVM would load all of it beforehand."""
    made = [_REGISTER] * (len(totals) + len(registers) + 1)
    others = [] if HAS_BF16 else [_UPPER_HALVES]
    own = [f"${len(totals) + i}" for i in range(len(registers) + 1)]
    given = [f"${len(made) + len(totals) + i}" for i in range(len(others) + len(addresses))]
    lines = (_paired if HAS_BF16 else _widened)(registers, len(totals) // len(registers), own, given)
    form = ["=&v"] * len(made) + [str(i) for i in range(len(totals))]
    form += ["v"] * len(others) + ["r"] * len(addresses)
    inputs = [*(builder.load(total) for total in totals), *others, *addresses]
    kind = ir.FunctionType(ir.LiteralStructType(made), [i.type for i in inputs])
    result = builder.asm(kind, "\n".join(lines), ",".join(form), inputs, side_effect=False)
    return [builder.extract_value(result, i) for i in range(len(totals))]


def _paired(registers: list[Register], rows: int, own: list[str], given: list[str]) -> list[str]:
    """Multiply two inputs by two weights of an output at once."""
    *weights, spread = own
    base, stride, *places = given
    lines = []
    for pair in range(PAIRS_TOGETHER):
        for weight, register in zip(weights, registers, strict=True):
            lines.append(f"vmovups {_offset(pair, register)}({base}), {weight}")
        for row in range(rows):
            lines.append(f"vpbroadcastd {_input(2 * pair, row, stride, places)}, {spread}")
            for n, weight in enumerate(weights):
                lines.append(f"vdpbf16ps {weight}, {spread}, ${row * len(weights) + n}")
    return lines


def _widened(registers: list[Register], rows: int, own: list[str], given: list[str]) -> list[str]:
    """Multiply in float32 by the first weight of each pair, and then by the second, the upper half of its 32 bits."""
    *weights, spread = own
    upper_halves, base, stride, *places = given
    masked = "vpandd" if HAS_AVX512 else "vpand"
    lines = []
    for number in range(2 * PAIRS_TOGETHER):
        for weight, register in zip(weights, registers, strict=True):
            source = f"{_offset(number // 2, register)}({base})"
            if number % 2:
                lines.append(f"{masked} {source}, {upper_halves}, {weight}")
            else:
                lines += [f"vmovups {source}, {weight}", f"vpslld $$16, {weight}, {weight}"]
        for row in range(rows):
            lines.append(f"vbroadcastss {_input(number, row, stride, places)}, {spread}")
            for n, weight in enumerate(weights):
                lines.append(f"vfmadd231ps {weight}, {spread}, ${row * len(weights) + n}")
    return lines


def _offset(pair: int, register: Register) -> int:
    """Return where a register's weights of a pair of inputs begin, in bytes."""
    tile, n = register
    return pair * TILE_BYTES + tile * BLOCK_BYTES // 2 + n * TILE_BYTES // REGISTERS


def _input(number: int, row: int, stride: str, places: list[str]) -> str:
    """Write the address of a row's input."""
    further = f", {stride}, {row % 3}" if row % 3 else ""
    return f"{number * INPUT_BYTES}({places[row // 3]}{further})"
