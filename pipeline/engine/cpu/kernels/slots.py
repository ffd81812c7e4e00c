"""Give the numbers that a kernel reads their names.

A kernel gets one pointer, to a row of int64 numbers: addresses, sizes, and floats by their bits. Their order is
one list of names beside the kernel: the kernel reads them all at once and says `p.rows`, and who calls it says
`rows=…`. Compiled, that is the load that `p[5]` would be.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

NEXT_TASK, TASKS = range(2)  # where every kernel's first two stand: its threads' counter, and how far it goes


class Call(NamedTuple):
    """Hold a kernel and the numbers that it will read. Tensors whose addresses are among them must outlive it."""

    kernel: Any
    numbers: np.ndarray


def slots(*names: str) -> Any:
    """Make the class of a kernel's numbers: the two that all have, then these, a few names in each string."""
    return namedtuple("Slots", " ".join(("next_task tasks", *names)))


@intrinsic
def read(context: Any, pointer: Any, kind: Any) -> Any:
    """Read all numbers of a class from a pointer to the first. In compiled code."""
    count = len(kind.instance_class._fields)
    made = types.NamedUniTuple(types.int64, count, kind.instance_class)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = [context.get_constant(types.int64, i) for i in range(count)]
        first = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return context.make_tuple(builder, made, [builder.load(builder.gep(first, [i])) for i in at])

    return made(pointer, kind), codegen


def prepare(kernel: Any, kind: Any, tasks: int, /, **arguments: Tensor | int) -> Call:
    """Write what a kernel will read, a tensor as its address.

    Raises:
        TypeError: an argument is missing, or none of the kernel's.
    """
    numbers = {n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    return Call(kernel, np.array(kind(next_task=0, tasks=tasks, **numbers), np.int64))


def bits(number: float) -> int:
    """Return a float64's bits as a whole number."""
    return int(np.float64(number).view(np.int64))


def row_stride(rows: Tensor) -> int:
    """Count the numbers from one row to the next. A single row's own stride may be anything."""
    return rows.stride(0) if len(rows) > 1 else rows[0].numel()
