"""Matrix tiles for a CPU that has none: what the instructions in tiles.py do, as functions on an array.

A register that was neither loaded nor zeroed holds NaN; one that is not configured cannot be either.
"""

import functools
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import carray, cfunc, types

from pipeline.engine.cpu.kernels import precision, tiles
from pipeline.engine.cpu.kernels.precision import inner, wide
from pipeline.engine.cpu.kernels.threads import openmp
from pipeline.engine.cpu.kernels.vectors import floats, halves, longs

THREADS, TILES, ROWS, ROW_BYTES = 256, 8, 16, 64
REGISTERS = np.full((THREADS, TILES, ROWS, ROW_BYTES), 0xFF, np.uint8)  # NaN, as bf16 and as float32
SIZES = np.zeros((THREADS, TILES, 2), np.int64)  # rows and bytes a row, once configured
PLACES = REGISTERS.ctypes.data, SIZES.ctypes.data

own_thread = openmp.omp_get_thread_num
own_thread.argtypes = ()
uncached = functools.partial(cfunc, fastmath=True, error_model="numpy")
number, address = types.int64, types.CPointer(types.uint8)


@functools.cache
def linear_tiles() -> ModuleType:
    """The module of that name on these tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_call", _call)
        patch.setattr(precision, "threaded", lambda *dtypes: _uncached)
        return importlib.import_module("pipeline.engine.cpu.kernels.linear_tiles")


def _uncached(function: Any) -> Any:
    """A kernel for bf16 that is compiled each time, for addresses change."""
    compiled = uncached(types.void(types.CPointer(types.uint16)))(function)
    return SimpleNamespace(of=lambda dtype: compiled)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    function = ir.IntType(64)(INSTRUCTIONS[name].address)
    builder.call(builder.inttoptr(function, kind.as_pointer()), arguments)


@inner
def _register(tile: int) -> int:
    return PLACES[0] + (own_thread() * TILES + tile) * ROWS * ROW_BYTES


@inner
def _sizes(tile: int) -> Any:
    return carray(longs(PLACES[1] + (own_thread() * TILES + tile) * 16), 2)


@inner
def _bytes(tile: int) -> Any:
    """A register as far as it is configured."""
    rows, row_bytes = _sizes(tile)
    whole = carray(halves(_register(tile)), (ROWS, ROW_BYTES // 2)).view(np.uint8)
    return whole[:rows, :row_bytes]


@uncached(types.void(address))
def ldtilecfg(configuration: Any) -> None:
    """Palette 1: bytes a row from byte 16 on, two bytes each; rows from byte 48 on."""
    own = carray(configuration, 64)
    if own[0] == 1:
        for tile in range(TILES):
            sizes = _sizes(tile)
            sizes[0], sizes[1] = own[48 + tile], own[16 + 2 * tile]


@uncached(types.void())
def tilerelease() -> None:
    for tile in range(TILES):
        _bytes(tile)[:] = 0xFF
        _sizes(tile)[:] = 0


@uncached(types.void(types.uint8))
def tilezero(tile: Any) -> None:
    _bytes(tile)[:] = 0


@uncached(types.void(types.uint8, address, number))
def tileloadd64(tile: Any, source: Any, stride: Any) -> None:
    own, numbers = _bytes(tile), carray(source, (ROWS - 1) * stride + ROW_BYTES)
    for row in range(len(own)):
        own[row] = numbers[row * stride : row * stride + own.shape[1]]


@uncached(types.void(types.uint8, address, number))
def tilestored64(tile: Any, target: Any, stride: Any) -> None:
    own, numbers = _bytes(tile), carray(target, (ROWS - 1) * stride + ROW_BYTES)
    for row in range(len(own)):
        numbers[row * stride : row * stride + own.shape[1]] = own[row]


@uncached(types.void(types.uint8, types.uint8, types.uint8))
def tdpbf16ps(total: Any, left: Any, right: Any) -> None:
    """total[m, n] += the sum over k and i of left[m, 2k + i] · right[k, 2n + i]."""
    sums = carray(floats(_register(total)), (ROWS, ROWS))
    a = carray(halves(_register(left)), (ROWS, 2 * ROWS))
    b = carray(halves(_register(right)), (ROWS, 2 * ROWS))
    for m in range(ROWS):
        for k in range(ROWS):
            for i in range(2):
                for n in range(ROWS):
                    sums[m, n] += wide(a[m, 2 * k + i]) * wide(b[k, 2 * n + i])


INSTRUCTIONS = {
    f.__name__: f for f in (ldtilecfg, tilerelease, tilezero, tileloadd64, tilestored64, tdpbf16ps)
}
