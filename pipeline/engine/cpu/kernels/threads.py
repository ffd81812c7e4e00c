"""Run kernels on torch's own threads: whose turn it is, and a place to meet.

A second pool of threads, as numba would make, fights with torch's for the cores: OpenMP's threads spin while
they wait for the next work.

Importing this module raises OSError where torch is linked with another OpenMP.
"""

import ctypes
import platform
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.slots import NEXT_TASK, TASKS, Call

PAUSE = {"x86_64": "pause", "aarch64": "yield"}.get(platform.machine(), "")  # another's text ends the process


@intrinsic
def next_task(context: Any, pointer: Any) -> Any:
    """Take the next task: the counter before it is raised by one, whichever thread asks."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(pointer), codegen


@intrinsic
def call_at(context: Any, function: Any, pointer: Any) -> Any:
    """Call the kernel at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def team(context: Any, function: Any) -> Any:
    """Ask how many threads have come: omp_get_num_threads, at an address. It may be fewer than were asked for."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        count = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return builder.sext(count, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def arrive(context: Any, counter: Any) -> Any:
    """Raise a counter: all that this thread has written is now seen by who reads it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", place, ir.IntType(64)(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def arrived(context: Any, counter: Any) -> Any:
    """Read a counter after a short pause, which leaves the core to its other thread."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), PAUSE, "", [], side_effect=True)
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def let_others_run(context: Any) -> Any:
    """Give the core to another thread that waits for it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _openmp() -> Any:
    """Find the OpenMP that torch is linked with, wherever its wheel keeps it."""
    library = ctypes.CDLL(torch._C.__file__)  # a name is looked up in what a library is linked with, too
    if not hasattr(library, "GOMP_parallel"):
        raise OSError("torch is not linked with libgomp")
    return library


openmp = _openmp()
parallel = openmp.GOMP_parallel  # what `#pragma omp parallel` compiles to: calls a function of one pointer
parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
parallel.restype = None


def run(call: Call) -> None:
    """Call a kernel on all of torch's threads.

    Raises:
        MemoryError: no thread could run it.
    """
    kernel, numbers = call
    tasks = int(numbers[TASKS])
    parallel(kernel.address, numbers.ctypes.data, min(torch.get_num_threads(), tasks), 0)
    if numbers[NEXT_TASK] < tasks:  # threads that found no memory for their scratch took no task
        raise MemoryError("a kernel found no memory")
