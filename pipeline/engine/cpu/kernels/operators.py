"""Kernels for a CPU in bf16: what torch takes dozens of small operators for, and products on packed weights.

At a few dozen rows a step spends more time in dozens of small operators than in its products. Each kernel
here does in one call what takes torch five to fifteen, and computes in float32.

They are compiled by numba at the first import and kept in its cache. They run on torch's own OpenMP
threads (a second pool of threads would fight with it for the cores): a kernel is a function of one pointer
that every thread calls, and each thread takes the next task until none is left.

Importing this module raises ImportError without numba, and OSError where torch is not linked with libgomp.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.cpu.kernels import attention as attention
from pipeline.engine.cpu.kernels import loops as loops
from pipeline.engine.cpu.kernels.blocks import BLOCK, chunk_rows
from pipeline.engine.cpu.kernels.blocks import pack_blocks as pack_blocks
from pipeline.engine.cpu.kernels.threads import openmp as openmp
from pipeline.engine.cpu.kernels.threads import parallel as parallel
from pipeline.engine.cpu.kernels.tiles import CONFIGURATION, has_tiles
from pipeline.engine.cpu.kernels.vectors import compiles_for

products: Any = None  # what multiplies here; each compiles only where it can run
if has_tiles():
    from pipeline.engine.cpu.kernels import linear_tiles as products
elif compiles_for("avx2"):
    from pipeline.engine.cpu.kernels import linear_vectors as products

Call = tuple[Any, *tuple[Any, ...]]  # a kernel, its number of tasks, its arguments
Rotation = tuple[Tensor, Tensor]  # cosines and sines, [N, D] each, their two halves equal


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (Zhang and Sennrich 2019), rounded as transformers does. [.., D] → [.., D]."""
    return _rms_norm(input.contiguous(), None, weight, eps)


def add_rms_norm(states: Tensor, addition: Tensor, weight: Tensor, eps: float) -> Tensor:
    """states += addition, in place, and the norm of that. Contiguous [.., D] → [.., D]."""
    return _rms_norm(states, addition, weight, eps)


def _rms_norm(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    output = torch.empty_like(states)
    _run(*norm_call(states.view(-1, len(weight)), addition, weight, eps, output))
    return output


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, each rounded as torch does. Two of [N, M], each row contiguous → [N, M]."""
    output = gate.new_empty(gate.shape)
    rows, width = gate.shape
    strides = _stride(gate), _stride(up)
    _run(loops.silu_multiply, -(-rows // loops.ROWS), gate, up, output, rows, width, *strides)
    return output


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, gated: bool = False) -> Tensor:
    """A product. [.., K] → [.., M], or where gated [.., M/2].

    Args:
        weight: from `pack_blocks`, [M/32, K/32, 2, 16, 16, 2]. Gated, 16 gates and 16 ups take turns, and the
            output is silu(gate) · up.
        bias: [M].

    Raises:
        TypeError: the input is not in bf16.
    """
    if input.dtype != weight.dtype:
        raise TypeError(f"a weight in {weight.dtype} and an input in {input.dtype}")
    inputs, outputs = weight.shape[1] * BLOCK, weight.shape[0] * BLOCK
    states = input.reshape(-1, inputs)
    states = states if states.stride(1) == 1 else states.contiguous()
    count = len(states)
    if count < products.FEWEST_ROWS:
        states = F.pad(states, (0, 0, 0, products.FEWEST_ROWS - count))
    width = outputs // 2 if gated else outputs
    output = states.new_empty(len(states), width)
    _run(*linear_call(states, weight, bias, output, gated))
    return output[:count].view(*input.shape[:-1], width)


def argmax(scores: Tensor) -> Tensor:
    """The first of the largest. Contiguous [B, V] → [B] int64."""
    rows, width = scores.shape
    places = torch.empty(rows, dtype=torch.int64)
    _run(loops.argmax, rows, scores, places, rows, width)
    return places


def copy_prefix(store: Tensor, prefix: Tensor, starts: Sequence[int], columns: int) -> None:
    """Write the first columns of one row into every row of a store, from its own start on.

    Args:
        store: [R, H, width, D].
        prefix: [1, H, any, D].
        starts: R.
    """
    rows, heads, width, size = store.shape
    places = np.array(starts, np.int64) * size
    numbers = rows, heads, width * size, columns * size, prefix.shape[2] * size
    _run(attention.copy_prefix, rows * heads, store, prefix, places.ctypes.data, *numbers)


def place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    starts: np.ndarray,
    columns: tuple[int, int],
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Bring a prefill's tokens to their places: queries to a padded block, keys and values to their stores.

    Args:
        query: [N, H, D]; key, value: [N, H_kv, D]: the tokens of every row in these columns, row by row.
        rotation: rotary position embedding (Su et al. 2021) of queries and keys; None where that is done.
        starts: [R, 2] int64, each row's first token among the N, and its first column.
        columns: first, and one beyond the last.
        keys, values: [R, H_kv, width, D].

    Returns:
        [R, H, T, D], zeros before a row's first column.
    """
    query, key, value = (_rows_contiguous(t) for t in (query, key, value))
    count, heads, size = query.shape
    first, last = columns
    padded = query.new_empty(len(starts), heads, last - first, size)
    tasks = len(starts) * -(-(last - first) // attention.COLUMNS)
    cos, sin, table_width = _tables(rotation, query)
    pointers = query, key, value, cos, sin, starts.ctypes.data, padded, keys, values
    shape = count, heads, key.shape[1], size, len(starts), first, last, keys.shape[2]
    strides = _stride(query), _stride(key), _stride(value), table_width
    _run(attention.place, tasks, *pointers, *shape, *strides)
    return padded


def collect(padded: Tensor, starts: np.ndarray, columns: tuple[int, int], count: int) -> Tensor:
    """What `place` has padded, without its padding. [R, H, T, D] → [N, H, D]."""
    rows, heads, width, size = padded.shape
    output = padded.new_empty(count, heads, size)
    tasks = rows * -(-width // attention.COLUMNS)
    _run(attention.collect, tasks, padded, starts.ctypes.data, output, rows, heads, *columns, size, count)
    return output


def causal_softmax(
    scores: Tensor, starts: Sequence[int], first: int, window: int | None, scaling: float
) -> None:
    """Of scores · scaling, in place: what a query does not see becomes 0, and so does all that padding sees.

    Args:
        scores: [R, H, T, W] contiguous, the queries of columns [first, first + T).
        starts: each row's first column.
        window: tokens that a query sees, itself included; None is all before it.
        scaling: above 0.
    """
    rows, heads, columns, width = scores.shape
    places = np.array(starts, np.int64)
    shape = rows, heads, columns, width, first, window or width
    _run(attention.causal_softmax, rows * heads, scores, places.ctypes.data, *shape, _bits(scaling))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    rows: np.ndarray,
    blocks: np.ndarray,
    scaling: float,
) -> Tensor:
    """Write each row's new key and value, and attend to all its columns.

    Args:
        query: [N, H, D]; key, value: [N, H_kv, D]; N ≥ B.
        rotation: as for `place`.
        rows: [B, 4] int64, each row's block, its row there, the first column it sees, and the new one.
        blocks: [blocks, 3] int64, addresses of keys and values, [rows, H_kv, width, D] each, and width.
        scaling: of the scores, above 0.

    Returns:
        [N, H, D], zeros beyond the B rows.
    """
    query, key, value = (_rows_contiguous(t) for t in (query, key, value))
    output = query.new_zeros(query.shape)
    _run(*attend_call(query, key, value, rotation, rows, blocks, scaling, output))
    return output


def norm_call(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float, output: Tensor) -> Call:
    """`add_rms_norm` into an output. states and output: [N, D], or [N, H, D], each token's heads contiguous."""
    width = len(weight)
    rows, heads, stride = len(states), states[0].numel() // width, _stride(states)
    tasks = -(-rows * heads // loops.ROWS)
    pointers = states, 0 if addition is None else addition, weight, output
    return loops.rms_norm, tasks, *pointers, rows, width, heads, stride, _bits(eps)


def linear_call(
    states: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, gated: bool = False
) -> Call:
    """`linear` into an output. states: [N, K], N ≥ products.FEWEST_ROWS."""
    inputs, outputs = weight.shape[1] * BLOCK, weight.shape[0] * BLOCK
    chunk = chunk_rows(inputs, products.ROWS)
    # For each chunk of rows, as many tasks as a row of the output has cache lines.
    tasks = -(-len(states) // chunk) * -(-outputs // BLOCK // (1 + gated))
    pointers = states, weight, 0 if bias is None else bias, output, CONFIGURATION.ctypes.data
    shape = len(states), inputs, outputs, states.stride(0), int(gated)
    return products.linear, tasks, *pointers, *shape, torch.get_num_threads(), chunk


def attend_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    rows: np.ndarray,
    blocks: np.ndarray,
    scaling: float,
    output: Tensor,
) -> Call:
    """`attend` into an output."""
    count, heads, size = query.shape
    kv_heads = key.shape[1]
    cos, sin, table_width = _tables(rotation, query)
    pointers = query, key, value, cos, sin, output, rows.ctypes.data, blocks.ctypes.data
    shape = len(blocks), count, heads, kv_heads, size
    strides = _stride(query), _stride(key), _stride(value), table_width
    numbers = *shape, *strides, _bits(scaling), torch.get_num_threads()
    return attention.attend, len(rows) * kv_heads, *pointers, *numbers


def _tables(rotation: Rotation | None, states: Tensor) -> tuple[Tensor | int, Tensor | int, int]:
    """Cosines, sines and their width; 0 is none.

    Raises:
        ValueError: only a part of each head is rotated, or in another precision.
    """
    if rotation is None:
        return 0, 0, 0
    rows, _, size = states.shape
    for table in rotation:
        if table.shape != (rows, size) or table.dtype != states.dtype or not table.is_contiguous():
            raise ValueError(
                f"rotary embedding of {tuple(table.shape)} {table.dtype} on {tuple(states.shape)}"
            )
    return *rotation, size


def _rows_contiguous(states: Tensor) -> Tensor:
    """[N, H, D], the heads of a token contiguous."""
    return states if states[0].is_contiguous() else states.contiguous()


def parameters(tasks: int, *arguments: Tensor | int) -> np.ndarray:
    """What a kernel reads: the counter, the number of tasks, the arguments. int64, a tensor as its address."""
    return np.array([0, tasks, *(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)], np.int64)


def _run(kernel: Any, tasks: int, *arguments: Tensor | int) -> None:
    """Call a kernel on all of torch's threads.

    Raises:
        MemoryError: no thread could run it.
    """
    passed = parameters(tasks, *arguments)
    parallel(kernel.address, passed.ctypes.data, min(torch.get_num_threads(), tasks), 0)
    if passed[0] < tasks:  # threads that found no memory for their scratch took no task
        raise MemoryError("a kernel found no memory")


def _stride(rows: Tensor) -> int:
    """Numbers from one row to the next; that of a single row says nothing."""
    return rows.stride(0) if len(rows) > 1 else rows[0].numel()


def _bits(number: float) -> int:
    return int(np.float64(number).view(np.int64))


if not hasattr(loops.rms_norm, "address"):
    raise ImportError("numba does not compile here (NUMBA_DISABLE_JIT)")
