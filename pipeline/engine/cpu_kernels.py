"""Kernels for a CPU in bf16: what a decode step does between its matrix products.

At a few dozen rows a step spends more time in dozens of small operators than in its products. Each kernel
here does in one call what takes torch five to fifteen, and computes in float32.

They are compiled by numba at the first import and kept in its cache. They run on torch's own OpenMP
threads (a second pool of threads would fight with it for the cores): a kernel is a function of one pointer
that every thread calls, and each thread takes the next task until none is left.

Importing this module raises ImportError without numba, and OSError where torch brings no libgomp.
"""

import ctypes
from collections.abc import Sequence as Ordered
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine import cpu_loops as loops


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (Zhang and Sennrich 2019), rounded as transformers does. [.., D] → [.., D]."""
    input = input.contiguous()
    output = torch.empty_like(input)
    width = len(weight)
    rows = input.numel() // width
    _run(loops.rms_norm, -(-rows // loops.ROWS), input, output, weight, rows, width, _bits(eps))
    return output


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding (Su et al. 2021) in place.

    Args:
        states: [N, H, D], each token's heads contiguous.
        cos, sin: [N, D], their two halves equal.

    Raises:
        ValueError: only a part of each head is rotated, or in another precision.
    """
    rows, heads, size = states.shape
    for table in (cos, sin):
        if table.shape != (rows, size) or table.dtype != states.dtype or not table.is_contiguous():
            raise ValueError(
                f"rotary embedding of {tuple(table.shape)} {table.dtype} on {tuple(states.shape)}"
            )
    _run(loops.rotate, -(-rows // loops.ROWS), states, cos, sin, rows, heads, _stride(states), size)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, each rounded as torch does. Two of [N, M], each row contiguous → [N, M]."""
    output = gate.new_empty(gate.shape)
    rows, width = gate.shape
    strides = _stride(gate), _stride(up)
    _run(loops.silu_multiply, -(-rows // loops.ROWS), gate, up, output, rows, width, *strides)
    return output


def causal_softmax(scores: Tensor, starts: Ordered[int], first: int, window: int | None) -> None:
    """In place: what a query does not see becomes 0, and so does all that a padding query sees.

    Args:
        scores: [R, H, T, W] contiguous, the queries of columns [first, first + T).
        starts: each row's first column.
        window: tokens that a query sees, itself included; None is all before it.
    """
    rows, heads, columns, width = scores.shape
    shape = heads, columns, width, first, window or width
    places = np.array(starts, np.int64)
    _run(loops.causal_softmax, rows * heads, scores, places.ctypes.data, rows, *shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, rows: np.ndarray, blocks: np.ndarray, scaling: float
) -> Tensor:
    """Write each row's new key and value, and attend to all its columns.

    Args:
        query: [N, H, D]; key, value: [N, H_kv, D]; N ≥ B.
        rows: [B, 4] int64, each row's block, its row there, the first column it sees, and the new one.
        blocks: [blocks, 3] int64, addresses of keys and values, [rows, H_kv, width, D] each, and width.

    Returns:
        [N, H, D], zeros beyond the B rows.
    """
    query, key, value = (t if t[0].is_contiguous() else t.contiguous() for t in (query, key, value))
    count, heads, size = query.shape
    kv_heads = key.shape[1]
    output = query.new_zeros(query.shape)
    strides = _stride(query), _stride(key), _stride(value)
    shape = heads, kv_heads, size
    tables = rows.ctypes.data, blocks.ctypes.data, len(blocks)
    numbers = *tables, count, *shape, *strides, _bits(scaling), torch.get_num_threads()
    _run(loops.attend, len(rows) * kv_heads, query, key, value, output, *numbers)
    return output


def _run(kernel: Any, tasks: int, *arguments: Tensor | int) -> None:
    """Call a kernel on all of torch's threads: its parameters are the counter, the tasks, the arguments.

    Raises:
        MemoryError: no thread could run it.
    """
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    parameters = np.array([0, tasks, *values], np.int64)
    _parallel(kernel.address, parameters.ctypes.data, min(torch.get_num_threads(), tasks), 0)
    if parameters[0] < tasks:  # threads that found no memory for their scratch took no task
        raise MemoryError("a kernel found no memory")


def _stride(rows: Tensor) -> int:
    """Numbers from one row to the next; that of a single row says nothing."""
    return rows.stride(0) if len(rows) > 1 else rows[0].numel()


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


def _parallel_function() -> Any:
    """What a `parallel` region compiles to: calls a function of one pointer on a team of threads."""
    library = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    if library is None:
        raise OSError("torch brings no libgomp")
    function = ctypes.CDLL(str(library)).GOMP_parallel
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_parallel = _parallel_function()
if not hasattr(loops.attend, "address"):
    raise ImportError("numba does not compile here (NUMBA_DISABLE_JIT)")
