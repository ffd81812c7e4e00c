"""Compile a kernel for tensors in bf16 or in float32, whichever they hold.

A kernel has one source, and for each of the two its own compiled code: the type of the pointer that it is given
tells them apart. In between all is float32. Numbers in bf16 are held as uint16, the upper half of a float32.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic, overload

from pipeline.engine.cpu.kernels.compiled import compiling, keep_apart
from pipeline.engine.cpu.kernels.vectors import HAS_AVX2

keep_apart()
HELD = {torch.bfloat16: types.uint16, torch.float32: types.float32}
# Where there are no products in float32, nothing else of it goes through kernels either.
DTYPES = (torch.bfloat16, torch.float32) if HAS_AVX2 else (torch.bfloat16,)
# fastmath lets a sum be vectorised; "numpy" divides without a check for 0 that would keep a loop scalar.
OPTIONS: dict[str, Any] = {"fastmath": True, "error_model": "numpy"}
inner = njit(**OPTIONS)

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()


class Kernel:
    """Hold a function of one pointer, to its numbers (slots.py), which compiles when it is first asked for."""

    made: ClassVar[list["Kernel"]] = []  # all of them: what is imported is what can run here

    def __init__(self, function: Callable[[Any], None], dtypes: tuple[torch.dtype, ...]) -> None:
        self._function, self.dtypes = function, dtypes
        self._compiled: dict[torch.dtype, Any] = {}
        self.made.append(self)

    def of(self, dtype: torch.dtype) -> Any:
        """Return it as compiled for tensors of this dtype; its address is what OpenMP calls."""
        if dtype not in self._compiled:
            signature = types.void(types.CPointer(HELD[dtype]))
            self._compiled[dtype] = cfunc(signature, cache=True, **OPTIONS)(self._function)
        return self._compiled[dtype]


def threaded(*dtypes: torch.dtype) -> Callable[[Callable[[Any], None]], Kernel]:
    """Make a kernel of a function, for tensors of these dtypes."""
    return lambda function: Kernel(function, dtypes)


def compile_for(dtype: torch.dtype) -> None:
    """Compile all kernels of the imported modules for tensors of this dtype, or take them from numba's cache."""
    if dtype not in HELD:
        return
    with compiling(str(dtype)):
        for kernel in Kernel.made:
            if dtype in kernel.dtypes:
                kernel.of(dtype)


def in_floats(kind: Any) -> bool:
    """Say whether a type, a pointer's or an array's, holds float32. Where code is made."""
    return bool(kind.dtype == types.float32)


@intrinsic
def held(context: Any, pointer: Any, address: Any) -> Any:
    """Take an address for that of a tensor's numbers, of a kernel's pointer."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(pointer))

    return pointer(pointer, types.int64), codegen


@intrinsic
def item_bytes(context: Any, pointer: Any) -> Any:
    """Return the bytes of a tensor's number."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.int64, pointer.dtype.bitwidth // 8)

    return types.int64(pointer), codegen


@intrinsic
def wide(context: Any, number: Any) -> Any:
    """Widen a tensor's number to float32, whose upper half bf16 is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (given,) = arguments
        if number == types.float32:
            return given
        return builder.bitcast(builder.shl(builder.zext(given, _WORD), _WORD(16)), _FLOAT)

    return types.float32(number), codegen


@intrinsic
def rounded(context: Any, number: Any, array: Any) -> Any:
    """Round float32 to what an array holds: to the nearest bf16, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if in_floats(array):
            return arguments[0]
        # Half of what is cut off, less one: it carries over where more is cut off, and the last bit decides a tie.
        bits = builder.bitcast(arguments[0], _WORD)
        last = builder.and_(builder.lshr(bits, _WORD(16)), _WORD(1))
        bits = builder.add(builder.add(bits, _WORD(0x7FFF)), last)
        return builder.trunc(builder.lshr(bits, _WORD(16)), ir.IntType(16))

    return array.dtype(types.float32, array), codegen


def either(halves: Any, floats: Any) -> Any:
    """Make a function that is one of two, by what the pointer or array that it is given first holds."""

    def choose(kind: Any, *arguments: Any) -> Any:
        raise NotImplementedError("in compiled code alone")

    @overload(choose, jit_options=OPTIONS, strict=False)
    def _choose(kind: Any, *arguments: Any) -> Any:
        chosen = floats if in_floats(kind) else halves
        return lambda kind, *arguments: chosen(kind, *arguments)

    return choose
