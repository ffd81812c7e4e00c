"""Multiply by weights in bf16 in float32, on vectors without instructions for bf16.

A row's inputs are widened beforehand, so that one load spreads an input over a register. Weights are widened on
their way into a product, once for all rows whose sums are in registers: 6 rows by 16 outputs with AVX2, 12 by 32
with AVX-512.
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
    LANES,
    ROWS,
    floats,
    for_each_count,
    halves,
    prefetch_line,
)

FEW_ROWS = 2  # whose sums leave room for both tiles with AVX2, too
REGISTERS = 1 if HAS_AVX512 else 2  # of a tile's outputs
PAIRS_TOGETHER = 2  # of inputs
PART_BYTES = PAIRS_TOGETHER * TILE_BYTES  # of a tile's weights
PARTS = BLOCK // 2 // PAIRS_TOGETHER  # of a block
INPUT_BYTES = 4

_NUMBER = ir.IntType(64)
_REGISTER = ir.VectorType(ir.FloatType(), LANES // REGISTERS)
_BITS = ir.VectorType(ir.IntType(32), LANES // REGISTERS)


@inner
def row_bytes(width: int) -> int:
    """Return the bytes of a row of inputs in float32."""
    return width * INPUT_BYTES


@inner
def widen(inputs: int, width: int, output: int) -> None:
    """Write a row of inputs in float32."""
    numbers, widened = carray(halves(inputs), width), carray(floats(output), width)
    for d in range(width):
        widened[d] = wide(numbers[d])


@intrinsic
def multiply(
    context: Any,
    rows: Any,
    input: Any,
    stride: Any,
    blocks: Any,
    sums: Any,
    packed: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Multiply rows at `input`, 1 to ROWS and `stride` bytes apart, and add to sums [rows, 32] in float32.

    Args:
        input: address of rows from `widen`.
        packed: address of weights in bf16, as Blocks has them.
        soon, step: with every TILE_BYTES of weights, the cache line there is asked for, `step` bytes further on.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, count, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _multiply(builder: Any, rows: int, *rest: Any) -> None:
    """Write the product of some rows: by both tiles at once or, for want of registers, one after the other."""
    for tiles in [(0, 1)] if HAS_AVX512 or rows <= FEW_ROWS else [(0,), (1,)]:
        _multiply_tiles(builder, rows, tiles, *rest)


def _multiply_tiles(
    builder: Any,
    rows: int,
    tiles: tuple[int, ...],
    input: Any,
    stride: Any,
    blocks: Any,
    sums: Any,
    packed: Any,
    soon: Any,
    step: Any,
) -> None:
    """Write the product of some rows and of these tiles of each block, part by part."""
    registers = [(tile, n) for tile in tiles for n in range(REGISTERS)]
    ends = []
    for row in range(rows):
        for tile, n in registers:
            place = _NUMBER(4 * (row * BLOCK + tile * LANES + n * _REGISTER.count))
            ends.append(builder.inttoptr(builder.add(sums, place), _REGISTER.as_pointer()))
    totals = [cgutils.alloca_once_value(builder, builder.load(end, align=4)) for end in ends]
    lines = PAIRS_TOGETHER * len(tiles)  # that a part asks for
    asked = builder.mul(builder.mul(blocks, _NUMBER(PARTS * tiles[0] * lines)), step)
    soon = builder.add(soon, asked)
    with (
        cgutils.for_range(builder, blocks, intp=_NUMBER) as block,
        cgutils.for_range(builder, _NUMBER(PARTS), intp=_NUMBER) as part,
    ):
        here = builder.add(packed, builder.mul(block.index, _NUMBER(BLOCK_BYTES)))
        here = builder.add(here, builder.mul(part.index, _NUMBER(PART_BYTES)))
        number = builder.add(builder.mul(block.index, _NUMBER(PARTS)), part.index)
        for line in range(lines):
            further = builder.add(builder.mul(number, _NUMBER(lines)), _NUMBER(line))
            prefetch_line(builder, builder.add(soon, builder.mul(further, step)), cache=2)
        along = builder.add(input, builder.mul(number, _NUMBER(2 * PAIRS_TOGETHER * INPUT_BYTES)))
        # Every third row has its address in a register; the next two are one and two strides on.
        places = [builder.add(along, builder.mul(stride, _NUMBER(row))) for row in range(0, rows, 3)]
        new = _part(builder, registers, totals, [here, stride, *places])
        for total, changed in zip(totals, new, strict=True):
            builder.store(changed, total)
    for total, end in zip(totals, ends, strict=True):
        builder.store(builder.load(total), end, align=4)


def _part(
    builder: Any, registers: list[tuple[int, int]], totals: list[Any], addresses: list[Any]
) -> list[Any]:
    """Add one more part, by instructions written as text: LLVM would load all of it beforehand."""
    count, own = len(totals), len(registers)
    rows, made = count // own, count + own + 1
    weights, spread = [f"${count + i}" for i in range(own)], f"${count + own}"
    upper, base, stride, *places = (f"${made + count + i}" for i in range(1 + len(addresses)))
    masked = "vpandd" if HAS_AVX512 else "vpand"
    lines = []
    for pair in range(PAIRS_TOGETHER):
        sources = [
            f"{pair * TILE_BYTES + tile * BLOCK_BYTES // 2 + n * 4 * _REGISTER.count}({base})"
            for tile, n in registers
        ]
        for half in range(2):
            for weight, source in zip(weights, sources, strict=True):
                if half:
                    lines.append(f"{masked} {source}, {upper}, {weight}")
                else:
                    lines += [f"vmovups {source}, {weight}", f"vpslld $$16, {weight}, {weight}"]
            for row in range(rows):
                further = f", {stride}, {row % 3}" if row % 3 else ""
                input = (2 * pair + half) * INPUT_BYTES
                lines.append(f"vbroadcastss {input}({places[row // 3]}{further}), {spread}")
                for n, weight in enumerate(weights):
                    lines.append(f"vfmadd231ps {weight}, {spread}, ${row * own + n}")
    inputs = [
        *(builder.load(total) for total in totals),
        ir.Constant(_BITS, [0xFFFF0000] * _BITS.count),
        *addresses,
    ]
    form = ["=&v"] * made + [str(i) for i in range(count)] + ["v"] + ["r"] * len(addresses)
    kind = ir.FunctionType(ir.LiteralStructType([_REGISTER] * made), [i.type for i in inputs])
    result = builder.asm(kind, "\n".join(lines), ",".join(form), inputs, side_effect=False)
    return [builder.extract_value(result, i) for i in range(count)]
