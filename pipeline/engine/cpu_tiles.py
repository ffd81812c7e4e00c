"""Linear layers in bf16 on a CPU's matrix tiles (Intel AMX): the loop behind `cpu_kernels.linear`.

A tile register holds 16 rows of 64 bytes. A product of two blocks of 32 × 32 numbers keeps four of them as
sums in float32, and loads two of inputs and two of weights for every 32 numbers that a sum runs over.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import ctypes
import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu_loops import f32, inner, rounded, silu_times, threaded, wide
from pipeline.engine.cpu_vectors import PAIRS, VECTOR, halves, next_task, prefetch_line

BLOCK = 32  # inputs and outputs of a block
TILE_ROWS, TILE_BYTES = 16, 64
BLOCK_BYTES = 2 * TILE_ROWS * TILE_BYTES  # of weights
PART = 9  # blocks that a sum runs over before the next rows: theirs of weights stay in the L1 cache
CHUNK_BYTES = 1 << 19  # of inputs that are multiplied by all weights before the next: they stay in the L2 cache

# Palette 1: eight tiles, each 16 rows of 64 bytes.
CONFIGURATION = np.zeros(64, np.uint8)
CONFIGURATION[0] = 1
CONFIGURATION[16:32].view(np.uint16)[:] = TILE_BYTES
CONFIGURATION[48:56] = TILE_ROWS

_NUMBER = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles, and Linux lets this process use them."""
    features = get_host_cpu_features()
    if platform.system() != "Linux" or not all(
        features.get(name) for name in ("amx-bf16", "amx-tile", "avx512bf16")
    ):
        return False
    arch_prctl, permit, tile_data = 158, 0x1023, 18  # Linux 5.16, asm/prctl.h: ARCH_REQ_XCOMP_PERM
    return bool(ctypes.CDLL(None).syscall(arch_prctl, permit, tile_data) == 0)


def pack_tiles(weight: Any) -> Any:
    """A weight as `linear` reads it. [M, K] in bf16, multiples of 32 → [M/32, K/32, 2, 16, 16, 2].

    One block of 32 outputs after the other; in it one of 32 inputs after the other; in that two tiles of 16
    outputs, each with two neighbouring inputs in a lane.
    """
    outputs, inputs = weight.shape
    blocks = weight.reshape(outputs // BLOCK, 2, TILE_ROWS, inputs // BLOCK, TILE_ROWS, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).contiguous()


@inner
def _chunk_rows(inputs: int) -> int:
    return max(BLOCK, CHUNK_BYTES // (inputs * 2) // BLOCK * BLOCK)


def tasks(rows: int, inputs: int, outputs: int) -> int:
    """Of `linear`: one for each chunk of rows and block of outputs."""
    return -(-rows // _chunk_rows(inputs)) * (outputs // BLOCK)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@intrinsic
def _configure(context: Any, address: Any) -> Any:
    """Load the tile configuration at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(context: Any) -> Any:
    """Back to no configuration."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _multiply_block(
    context: Any, first: Any, second: Any, stride: Any, weights: Any, blocks: Any, sums: Any, go_on: Any, soon: Any,
    lines: Any,
) -> Any:
    """sums [32, 32] float32 = 16 rows at `first` and 16 at `second`, `stride` bytes apart, times packed weights.

    `blocks` of 32 inputs each. Where `go_on` is not 0, to be added to the sums that are there. With each
    block, `lines` cache lines from `soon` on are asked for.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, stride, weights, blocks, sums, go_on, soon, lines = arguments
        tile = ir.IntType(8)

        def load(register: int, address: Any, step: Any) -> None:
            _call(builder, "tileloadd64", tile(register), builder.inttoptr(address, _POINTER), step)

        def multiply(total: int, rows: int, columns: int) -> None:
            _call(builder, "tdpbf16ps", tile(total), tile(rows), tile(columns))

        places = [builder.add(sums, _NUMBER((i // 2 * TILE_ROWS * BLOCK + i % 2 * TILE_ROWS) * 4)) for i in range(4)]
        with builder.if_else(builder.icmp_signed("!=", go_on, _NUMBER(0))) as (there, new):
            with there:
                for total, place in enumerate(places):
                    load(total, place, _NUMBER(BLOCK * 4))
            with new:
                for total in range(4):
                    _call(builder, "tilezero", tile(total))
        with cgutils.for_range(builder, blocks, intp=_NUMBER) as block:
            along = builder.mul(block.index, _NUMBER(TILE_BYTES))
            here = builder.add(weights, builder.mul(block.index, _NUMBER(BLOCK_BYTES)))
            load(4, builder.add(first, along), stride)
            load(6, here, _NUMBER(TILE_BYTES))
            multiply(0, 4, 6)
            load(7, builder.add(here, _NUMBER(BLOCK_BYTES // 2)), _NUMBER(TILE_BYTES))
            multiply(1, 4, 7)
            load(5, builder.add(second, along), stride)
            multiply(2, 5, 6)
            multiply(3, 5, 7)
            ahead = builder.add(soon, builder.mul(builder.mul(block.index, lines), _NUMBER(64)))
            with cgutils.for_range(builder, lines, intp=_NUMBER) as line:
                prefetch_line(builder, builder.add(ahead, builder.mul(line.index, _NUMBER(64))), cache=2)
        for total, place in enumerate(places):
            address = builder.inttoptr(place, _POINTER)
            _call(builder, "tilestored64", tile(total), address, _NUMBER(BLOCK * 4))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen


@intrinsic
def _store_tiles(context: Any, sums: Any, output: Any, stride: Any) -> Any:
    """16 rows of 32 sums in bf16, `stride` bytes apart."""
    row = ir.VectorType(ir.IntType(16), PAIRS)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, output, stride = arguments
        kind = ir.FunctionType(row, [VECTOR, VECTOR])
        with cgutils.for_range(builder, _NUMBER(TILE_ROWS), intp=_NUMBER) as loop:
            left = builder.add(sums, builder.mul(loop.index, _NUMBER(BLOCK * 4)))
            right = builder.add(left, _NUMBER(BLOCK * 2))
            halves = [builder.load(builder.inttoptr(h, VECTOR.as_pointer()), align=4) for h in (left, right)]
            both = builder.asm(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", halves[::-1], side_effect=False)
            place = builder.add(output, builder.mul(loop.index, stride))
            builder.store(both, builder.inttoptr(place, row.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, output, stride), codegen


@inner
def _store_gated(sums: Any, output: Any, width: int) -> None:
    """16 rows of 16 gates and 16 ups: silu(gate) · up. Rows of the output are `width` apart."""
    for row in range(TILE_ROWS):
        gates, ups = sums[row, :TILE_ROWS], sums[row, TILE_ROWS:]
        target = output[row * width : row * width + TILE_ROWS]
        for d in range(TILE_ROWS):
            target[d] = silu_times(rounded(gates[d]), rounded(ups[d]))


@inner
def _aligned(count: int) -> Any:
    """`count` float32 numbers from the start of a cache line on."""
    numbers = np.empty(count + 16, np.float32)
    skipped = -numbers.ctypes.data % 64 // 4
    return numbers[skipped : skipped + count]


@inner
def _add_bias(sums: Any, bias: Any) -> None:
    for row in range(BLOCK):
        for d in range(BLOCK):
            sums[row, d] += wide(bias[d])


@inner
def _halves_of_block(row: int, rows: int) -> tuple[int, int]:
    """The first rows of a block's halves: the last 16 come up again where less than a block is left."""
    return min(row, rows - TILE_ROWS), min(row + TILE_ROWS, rows - TILE_ROWS)


@threaded
def linear(pointer: Any) -> None:
    p = carray(pointer, 14)
    rows, inputs, outputs, stride, gated, threads = p[7], p[8], p[9], p[10] * 2, p[11], p[12]
    strip_bytes, strips = inputs * BLOCK * 2, outputs // BLOCK
    chunk = _chunk_rows(inputs)
    blocks = inputs // BLOCK
    parts = -(-blocks // PART)
    part = -(-blocks // parts)
    sums = _aligned((chunk // BLOCK + 1) * BLOCK * BLOCK).reshape((-1, BLOCK, BLOCK))
    _configure(p[6])
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        strip, start = task % strips, task // strips * chunk
        end = min(start + chunk, rows)
        weights = p[3] + strip * strip_bytes
        lines = BLOCK * BLOCK // (end - start + BLOCK - 1) + 1
        for block in range(0, blocks, part):
            count = min(part, blocks - block)
            soon = weights + threads * strip_bytes + block * BLOCK_BYTES
            for row in range(start, end, BLOCK):
                first, second = _halves_of_block(row, rows)
                _multiply_block(
                    p[2] + first * stride + block * TILE_BYTES,
                    p[2] + second * stride + block * TILE_BYTES,
                    stride,
                    weights + block * BLOCK_BYTES,
                    count,
                    sums[(row - start) // BLOCK].ctypes.data,
                    block,
                    soon + (row - start) // BLOCK * count * lines * 64,
                    lines,
                )
        for row in range(start, end, BLOCK):
            own = sums[(row - start) // BLOCK]
            if p[4]:
                _add_bias(own, carray(halves(p[4]), outputs)[strip * BLOCK : (strip + 1) * BLOCK])
            for half, place in enumerate(_halves_of_block(row, rows)):
                target = p[5] + (place * outputs + strip * BLOCK) * (1 if gated else 2)
                if gated:
                    _store_gated(own[half * TILE_ROWS :], carray(halves(target), TILE_ROWS * outputs), outputs // 2)
                else:
                    _store_tiles(own[half * TILE_ROWS :].ctypes.data, target, outputs * 2)
    _release()
