"""Multiply some rows by a strip of weights in bf16 or float32, their sums in registers all the while.

In bf16 by instructions for pairs of numbers, where vectors have them. Elsewhere in float32, by inputs that are widened
beforehand, so that one load spreads an input over a register; weights are widened on their way, once for all rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, LINE_BYTES
from pipeline.engine.cpu.kernels.precision import in_floats, inner, item_bytes, wide
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

INPUT_BYTES = 2 if HAS_BF16 else 4  # of one in bf16, as `multiply` takes it
FEW_ROWS = 2  # whose sums leave room for both tiles with AVX2, too
INPUTS_TOGETHER = 4  # with more, the instructions outgrow the cache that holds them decoded
PARTS = BLOCK // INPUTS_TOGETHER  # of a block

_NUMBER = ir.IntType(64)
_REGISTER = ir.VectorType(ir.FloatType(), REGISTER_LANES)
_UPPER_HALVES = ir.Constant(ir.VectorType(ir.IntType(32), REGISTER_LANES), [0xFFFF0000] * REGISTER_LANES)

Register = tuple[int, int]  # of which tile, and which of its REGISTERS


class _Form(NamedTuple):
    """Say in which form numbers come to a product, and what multiplies them."""

    write: Callable[..., list[str]]
    input_bytes: int
    inputs_of_line: int  # of weights, 16 outputs each
    constants: tuple[Any, ...] = ()  # that are held in registers

    @property
    def lines(self) -> int:
        """Count the lines of a part's weights in a tile."""
        return INPUTS_TOGETHER // self.inputs_of_line

    @property
    def tile_bytes(self) -> int:
        return BLOCK // self.inputs_of_line * LINE_BYTES


@inner
def widen(inputs: int, count: int, output: int) -> None:
    """Write numbers in bf16 in float32."""
    numbers, widened = carray(halves(inputs), count), carray(floats(output), count)
    for d in range(count):
        widened[d] = wide(numbers[d])


@intrinsic
def multiply(
    context: Any,
    kind: Any,
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
        kind: a pointer or an array that holds what weights do, and inputs in float32; those in bf16 have INPUT_BYTES.
        weights: address of blocks of 32 inputs each, as Blocks has them.
        soon, step: with every LINE_BYTES of weights, the cache line there is asked for, `step` bytes further on.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, *rest = arguments
        form = PLAIN if in_floats(kind) else PAIRED if HAS_BF16 else WIDENED
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, form, count, rest))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8), codegen


@inner
def multiply_groups(
    kind: Any, rows: int, inputs: int, stride: int, count: int, weights: int, soon: int, size: int, sums: Any
) -> None:
    """Add the products of some blocks of inputs, `size` bytes of weights each, for all rows: see `multiply`.

    Args:
        sums: [rows · 32] float32.
        soon: weights that are asked for meanwhile, of as many blocks.
    """
    # A small last group would load all weights anew for a few rows.
    groups = (rows + ROWS - 1) // ROWS
    lines = BLOCK * BLOCK * item_bytes(kind) // LINE_BYTES  # of a block's weights
    step = (size // lines + groups - 1) // groups  # together the groups ask for all of the next strip
    for group in range(groups):
        row, after = rows * group // groups, rows * (group + 1) // groups
        multiply(
            kind,
            after - row,
            inputs + row * stride,
            stride,
            count,
            sums[row * BLOCK :].ctypes.data,
            weights,
            soon + group * count * lines * step,
            step,
        )


def _multiply(builder: Any, form: _Form, rows: int, arguments: list[Any]) -> None:
    """Write the product of some rows: by both tiles at once or, for want of registers, one after the other."""
    for tiles in [(0, 1)] if HAS_AVX512 or rows <= FEW_ROWS else [(0,), (1,)]:
        _multiply_tiles(builder, form, rows, tiles, arguments)


def _multiply_tiles(
    builder: Any, form: _Form, rows: int, tiles: tuple[int, ...], arguments: list[Any]
) -> None:
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
    lines = form.lines * len(tiles)  # that a part asks for
    before = builder.mul(blocks, _NUMBER(tiles[0] * PARTS))
    with (
        cgutils.for_range(builder, blocks, intp=_NUMBER) as block,
        cgutils.for_range(builder, _NUMBER(PARTS), intp=_NUMBER) as part,
    ):
        number = builder.add(builder.mul(block.index, _NUMBER(PARTS)), part.index)
        along = builder.mul(number, _NUMBER(INPUTS_TOGETHER * form.input_bytes))
        here = builder.add(weights, builder.mul(block.index, _NUMBER(2 * form.tile_bytes)))
        here = builder.add(here, builder.mul(part.index, _NUMBER(form.lines * LINE_BYTES)))
        asked = builder.mul(builder.add(before, number), _NUMBER(lines))
        ahead = builder.add(soon, builder.mul(asked, step))
        for line in range(lines):
            prefetch_line(builder, builder.add(ahead, builder.mul(step, _NUMBER(line))), cache=2)
        addresses = [here, stride, *(builder.add(place, along) for place in places)]
        for total, new in zip(totals, _part(builder, form, registers, totals, addresses), strict=True):
            builder.store(new, total)
    for total, end in zip(totals, ends, strict=True):
        builder.store(builder.load(total), end, align=4)


def _part(
    builder: Any, form: _Form, registers: list[Register], totals: list[Any], addresses: list[Any]
) -> list[Any]:
    """Add one more part, by instructions written as text: LLVM would load all of it beforehand."""
    made = [_REGISTER] * (len(totals) + len(registers) + 1)
    own = [f"${len(totals) + i}" for i in range(len(registers) + 1)]
    given = [f"${len(made) + len(totals) + i}" for i in range(len(form.constants) + len(addresses))]
    lines = form.write(registers, len(totals) // len(registers), own, given)
    written = ["=&v"] * len(made) + [str(i) for i in range(len(totals))]
    written += ["v"] * len(form.constants) + ["r"] * len(addresses)
    inputs = [*(builder.load(total) for total in totals), *form.constants, *addresses]
    kind = ir.FunctionType(ir.LiteralStructType(made), [i.type for i in inputs])
    result = builder.asm(kind, "\n".join(lines), ",".join(written), inputs, side_effect=False)
    return [builder.extract_value(result, i) for i in range(len(totals))]


def _paired(registers: list[Register], rows: int, own: list[str], given: list[str]) -> list[str]:
    """Multiply two inputs by two weights of an output at once."""
    *weights, spread = own
    base, stride, *places = given
    lines = []
    for line in range(PAIRED.lines):
        for weight, register in zip(weights, registers, strict=True):
            lines.append(f"vmovups {_offset(PAIRED, line, register)}({base}), {weight}")
        for row in range(rows):
            lines.append(f"vpbroadcastd {_input(4 * line, row, stride, places)}, {spread}")
            for n, weight in enumerate(weights):
                lines.append(f"vdpbf16ps {weight}, {spread}, ${row * len(weights) + n}")
    return lines


def _widened(registers: list[Register], rows: int, own: list[str], given: list[str]) -> list[str]:
    """Multiply in float32 by the first weight of each pair, and then by the second, the upper half of its 32 bits."""
    *weights, spread = own
    upper_halves, base, stride, *places = given
    masked = "vpandd" if HAS_AVX512 else "vpand"
    lines = []
    for number in range(INPUTS_TOGETHER):
        for weight, register in zip(weights, registers, strict=True):
            source = f"{_offset(WIDENED, number // 2, register)}({base})"
            if number % 2:
                lines.append(f"{masked} {source}, {upper_halves}, {weight}")
            else:
                lines += [f"vmovups {source}, {weight}", f"vpslld $$16, {weight}, {weight}"]
        lines += _multiplied(number, rows, weights, spread, stride, places)
    return lines


def _plain(registers: list[Register], rows: int, own: list[str], given: list[str]) -> list[str]:
    """Multiply in float32 by weights that are in it."""
    *weights, spread = own
    base, stride, *places = given
    lines = []
    for number in range(INPUTS_TOGETHER):
        for weight, register in zip(weights, registers, strict=True):
            lines.append(f"vmovups {_offset(PLAIN, number, register)}({base}), {weight}")
        lines += _multiplied(number, rows, weights, spread, stride, places)
    return lines


def _multiplied(
    number: int, rows: int, weights: list[str], spread: str, stride: str, places: list[str]
) -> list[str]:
    """Multiply each row's input in float32 by some registers of weights."""
    lines = []
    for row in range(rows):
        lines.append(f"vbroadcastss {_input(4 * number, row, stride, places)}, {spread}")
        for n, weight in enumerate(weights):
            lines.append(f"vfmadd231ps {weight}, {spread}, ${row * len(weights) + n}")
    return lines


def _offset(form: _Form, line: int, register: Register) -> int:
    """Return where a register's weights of a line begin, in bytes."""
    tile, n = register
    return line * LINE_BYTES + tile * form.tile_bytes + n * LINE_BYTES // REGISTERS


def _input(offset: int, row: int, stride: str, places: list[str]) -> str:
    """Write the address of a row's input, `offset` bytes on."""
    further = f", {stride}, {row % 3}" if row % 3 else ""
    return f"{offset}({places[row // 3]}{further})"


PAIRED = _Form(_paired, input_bytes=2, inputs_of_line=2)
WIDENED = _Form(_widened, input_bytes=4, inputs_of_line=2, constants=(_UPPER_HALVES,))
PLAIN = _Form(_plain, input_bytes=4, inputs_of_line=1)
