"""Multiply by packed weights on a CPU's vectors, where it has no matrix tiles.

A row's 32 outputs of a strip are two vectors of sums, so that a dozen rows fill AVX-512's registers: for every
two inputs, two vectors of weights are loaded, and each row's pair of inputs is spread over a third. On CPUs without
instructions for bf16, widened.py takes the place of that.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, TILE_BYTES, Linear
from pipeline.engine.cpu.kernels.epilogue import store
from pipeline.engine.cpu.kernels.loops import aligned, inner, threaded
from pipeline.engine.cpu.kernels.quantized import (
    block_bytes,
    convert,
    converted_bytes,
    few_rows,
    multiply_few,
    unpack,
)
from pipeline.engine.cpu.kernels.slots import read
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.vectors import (
    HAS_BF16,
    LANES,
    ROWS,
    VECTOR,
    for_each_count,
    prefetch_line,
)

FEWEST_ROWS = 1  # that a product takes
PAIRS_TOGETHER = 2  # of inputs: with more, the instructions outgrow the cache that holds them decoded
PARTS = LANES // PAIRS_TOGETHER  # of a block
LINES = BLOCK_BYTES // TILE_BYTES // PARTS  # of the cache: weights of a part
UNPACKED = 8  # blocks of quantized weights that are turned to bf16 at once: they stay in the L1 cache

_NUMBER = ir.IntType(64)


@intrinsic
def _multiply_rows(
    context: Any,
    rows: Any,
    input: Any,
    stride: Any,
    weights: Any,
    blocks: Any,
    sums: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Multiply rows at `input`, `stride` bytes apart, by packed weights, and add to sums [rows, 32] in float32.

    Args:
        rows: 1 to ROWS.
        blocks: of 32 inputs each.
        soon, step: with each part of a block, cache lines from there on are asked for, `step` bytes apart.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, count, rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


def _multiply(builder: Any, rows: int, arguments: list[Any]) -> None:
    """Write the product of some rows part by part.

    Every third row has its address in a register; the next two are one and two strides on: with an address for
    each, the registers for addresses would run out.
    """
    input, stride, weights, blocks, sums, soon, step = arguments
    places = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(0, rows, 3)]
    ends = [
        builder.inttoptr(builder.add(sums, _NUMBER(index * LANES * 4)), VECTOR.as_pointer())
        for index in range(2 * rows)
    ]
    totals = [cgutils.alloca_once_value(builder, builder.load(end, align=4)) for end in ends]
    with (
        cgutils.for_range(builder, blocks, intp=_NUMBER) as block,
        cgutils.for_range(builder, _NUMBER(PARTS), intp=_NUMBER) as part,
    ):
        number = builder.add(builder.mul(block.index, _NUMBER(PARTS)), part.index)
        along = builder.mul(number, _NUMBER(PAIRS_TOGETHER * 4))
        here = builder.add(weights, builder.mul(block.index, _NUMBER(BLOCK_BYTES)))
        here = builder.add(here, builder.mul(part.index, _NUMBER(PAIRS_TOGETHER * TILE_BYTES)))
        ahead = builder.add(soon, builder.mul(builder.mul(number, step), _NUMBER(LINES)))
        for line in range(LINES):
            prefetch_line(builder, builder.add(ahead, builder.mul(step, _NUMBER(line))), cache=2)
        addresses = [here, stride, *(builder.add(place, along) for place in places)]
        for total, new in zip(totals, _part(builder, totals, addresses), strict=True):
            builder.store(new, total)
    for total, end in zip(totals, ends, strict=True):
        builder.store(builder.load(total), end, align=4)


def _part(builder: Any, totals: list[Any], addresses: list[Any]) -> list[Any]:
    """Add one more part, by instructions written as text: LLVM would load all of it beforehand."""
    count = len(totals)
    left, right, own = (f"${count + i}" for i in range(3))
    weights, stride, *places = (f"${2 * count + 3 + i}" for i in range(len(addresses)))
    lines = []
    for pair in range(PAIRS_TOGETHER):
        for tile, register in enumerate((left, right)):
            lines.append(f"vmovups {pair * TILE_BYTES + tile * BLOCK_BYTES // 2}({weights}), {register}")
        for row in range(count // 2):
            further = f", {stride}, {row % 3}" if row % 3 else ""
            lines.append(f"vpbroadcastd {4 * pair}({places[row // 3]}{further}), {own}")
            lines.append(f"vdpbf16ps {left}, {own}, ${2 * row}")
            lines.append(f"vdpbf16ps {right}, {own}, ${2 * row + 1}")
    kinds = [VECTOR] * (count + 3)
    form = ["=&v"] * (count + 3) + [str(i) for i in range(count)] + ["r"] * len(addresses)
    inputs = [*(builder.load(total) for total in totals), *addresses]
    kind = ir.FunctionType(ir.LiteralStructType(kinds), [i.type for i in inputs])
    result = builder.asm(kind, "\n".join(lines), ",".join(form), inputs, side_effect=False)
    return [builder.extract_value(result, i) for i in range(count)]


@inner
def _strip(p: Any, strip: int, start: int, end: int, sums: Any, unpacked: int, converted: int) -> None:
    """Multiply the rows [start, end) by one strip, in groups of nearly one size.

    Args:
        unpacked: address of room for UNPACKED blocks.
        converted: address of the rows as few rows take them, or 0.
    """
    blocks, gated = p.width_in // BLOCK, p.gated
    size = block_bytes(p)
    part = UNPACKED if p.values or p.scales else blocks
    weights = p.weights + strip * blocks * size
    soon = weights + p.threads * blocks * size * (1 + gated)
    sums[:] = 0
    few = end - start <= few_rows(p)
    if few:
        first_input = converted or p.inputs + start * p.stride * 2
        stride = converted_bytes(p) if converted else p.stride * 2
        multiply_few(p, end - start, first_input, stride, weights, sums.ctypes.data)
    for first in range(0, 0 if few else blocks, part):
        count = min(part, blocks - first)
        here = weights + first * size
        if p.values or p.scales:
            unpack(p, here, count, unpacked)
            here = unpacked
        _part_of_strip(p, start, end, first, count, here, soon + first * size, size, sums)
    width = p.width_out * 2 // (1 + gated)
    scales = p.scales + strip * BLOCK * 4 if p.scales else 0
    bias = p.bias + strip * BLOCK * 2 if p.bias else 0
    output = p.outputs + start * width + strip * BLOCK * 2 // (1 + gated)
    store(sums.ctypes.data, end - start, scales, bias, output, width, gated)


@inner
def _part_of_strip(
    p: Any, start: int, end: int, first: int, count: int, weights: int, soon: int, size: int, sums: Any
) -> None:
    """Add the products of some blocks of inputs, for all rows."""
    if not HAS_BF16:  # for then all rows are few
        return
    # A small last group would load all weights anew for a few rows.
    groups = (end - start + ROWS - 1) // ROWS
    step = (
        size // (PARTS * LINES) + groups - 1
    ) // groups  # together the groups ask for all of the next strip
    stride = p.stride * 2
    for group in range(groups):
        row, after = (end - start) * group // groups, (end - start) * (group + 1) // groups
        _multiply_rows(
            after - row,
            p.inputs + (start + row) * stride + first * TILE_BYTES,
            stride,
            weights,
            count,
            sums[row * BLOCK :].ctypes.data,
            soon + group * count * PARTS * LINES * step,
            step,
        )


@threaded
def linear(pointer: Any) -> None:
    """Multiply one chunk of rows by one strip a task; gated, by the two strips that share a line of the output."""
    p = read(pointer, Linear)
    rows, strips, together, chunk = p.rows, p.width_out // BLOCK, 1 + p.gated, p.chunk
    most = min(rows, chunk)
    sums, unpacked = aligned(most * BLOCK), aligned(UNPACKED * BLOCK_BYTES // 4)
    per_chunk = -(-strips // together)
    size, converted_start = converted_bytes(p), -1
    converted = aligned(min(most, few_rows(p)) * size // 4)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        start, first = task // per_chunk * chunk, task % per_chunk * together
        end = min(start + chunk, rows)
        converts = size != 0 and end - start <= few_rows(p)
        if converts and converted_start != start:
            convert(p, start, end, converted.ctypes.data)
            converted_start = start
        for strip in range(first, min(first + together, strips)):
            own = sums[: (end - start) * BLOCK]
            _strip(p, strip, start, end, own, unpacked.ctypes.data, converted.ctypes.data if converts else 0)
