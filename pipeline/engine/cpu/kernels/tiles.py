"""Use a CPU's matrix tiles (Intel AMX): whether there are any, and their instructions.

A tile register holds 16 rows of 64 bytes. A product of two blocks of 32 × 32 numbers keeps four of them as
sums in float32, and loads two of inputs and two of weights for every 32 numbers that a sum runs over.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import ctypes
import functools
import platform
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, LINE_BYTES, TILE_ROWS
from pipeline.engine.cpu.kernels.vectors import compiles_for, prefetch_line

# Palette 1: eight tiles, each 16 rows of 64 bytes.
CONFIGURATION = np.zeros(64, np.uint8)
CONFIGURATION[0] = 1
CONFIGURATION[16:32].view(np.uint16)[:] = LINE_BYTES
CONFIGURATION[48:56] = TILE_ROWS

_TILE = ir.IntType(8)
_NUMBER = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()


@functools.cache
def has_tiles() -> bool:
    """Ask whether this CPU multiplies bf16 tiles, and have Linux let this process use them."""
    features = ("amx-bf16", "amx-tile", "avx512bf16")
    if platform.system() != "Linux" or not all(compiles_for(feature) for feature in features):
        return False
    arch_prctl, permit, tile_data = 158, 0x1023, 18  # Linux 5.16, asm/prctl.h: ARCH_REQ_XCOMP_PERM
    return bool(ctypes.CDLL(None).syscall(arch_prctl, permit, tile_data) == 0)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


@intrinsic
def configure(context: Any, address: Any) -> Any:
    """Load the tile configuration at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release(context: Any) -> Any:
    """Give the tiles back: with them in use, each switch of threads would save 8 KiB."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def load_tile(builder: Any, register: int, address: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", _TILE(register), builder.inttoptr(address, _POINTER), stride)


def zero_tile(builder: Any, register: int) -> None:
    _call(builder, "tilezero", _TILE(register))


def store_tile(builder: Any, register: int, address: Any, stride: Any) -> None:
    _call(builder, "tilestored64", _TILE(register), builder.inttoptr(address, _POINTER), stride)


def multiply_tiles(builder: Any, total: int, rows: int, columns: int) -> None:
    _call(builder, "tdpbf16ps", _TILE(total), _TILE(rows), _TILE(columns))


@intrinsic
def multiply_block(
    context: Any,
    first: Any,
    second: Any,
    stride: Any,
    weights: Any,
    blocks: Any,
    sums: Any,
    go_on: Any,
    soon: Any,
    lines: Any,
) -> Any:
    """Multiply 16 rows at `first` and 16 at `second`, `stride` bytes apart, to sums [32, 32] in float32.

    The packed weights are `blocks` of 32 inputs each. Where `go_on` is not 0, they add to the sums that are
    there. With each block, `lines` cache lines from `soon` on are asked for.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, stride, weights, blocks, sums, go_on, soon, lines = arguments
        load, multiply = partial(load_tile, builder), partial(multiply_tiles, builder)
        tiles = (0, TILE_ROWS, TILE_ROWS * BLOCK, TILE_ROWS * BLOCK + TILE_ROWS)
        places = [builder.add(sums, _NUMBER(tile * 4)) for tile in tiles]
        with builder.if_else(builder.icmp_signed("!=", go_on, _NUMBER(0))) as (there, new):
            with there:
                for total, place in enumerate(places):
                    load(total, place, _NUMBER(BLOCK * 4))
            with new:
                for total in range(4):
                    zero_tile(builder, total)
        with cgutils.for_range(builder, blocks, intp=_NUMBER) as block:
            along = builder.mul(block.index, _NUMBER(LINE_BYTES))
            here = builder.add(weights, builder.mul(block.index, _NUMBER(BLOCK_BYTES)))
            load(4, builder.add(first, along), stride)
            load(6, here, _NUMBER(LINE_BYTES))
            multiply(0, 4, 6)
            load(7, builder.add(here, _NUMBER(BLOCK_BYTES // 2)), _NUMBER(LINE_BYTES))
            multiply(1, 4, 7)
            load(5, builder.add(second, along), stride)
            multiply(2, 5, 6)
            multiply(3, 5, 7)
            ahead = builder.add(soon, builder.mul(builder.mul(block.index, lines), _NUMBER(64)))
            with cgutils.for_range(builder, lines, intp=_NUMBER) as line:
                prefetch_line(builder, builder.add(ahead, builder.mul(line.index, _NUMBER(64))), cache=2)
        for total, place in enumerate(places):
            store_tile(builder, total, place, _NUMBER(BLOCK * 4))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen
