"""Call attention's kernels on tensors: a prefill's way into its rectangle and out, its attention, a decode step's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.cpu.kernels import attention
from pipeline.engine.cpu.kernels.blocks import BLOCK
from pipeline.engine.cpu.kernels.slots import Call, bits, prepare, row_stride
from pipeline.engine.cpu.kernels.threads import run
from pipeline.engine.cpu.kernels.vectors import HAS_AVX2

causal: Any = None  # what attends in a prefill by products on vectors
if HAS_AVX2:
    from pipeline.engine.cpu.kernels import causal_attention as causal

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [N, D] each, their two halves equal


def copy_prefix(store: Tensor, prefix: Tensor, starts: Sequence[int], columns: int) -> None:
    """Write the first columns of one row into every row of a store, from its own start on.

    Args:
        store: [R, H, width, D].
        prefix: [1, H, any, D].
        starts: R.
    """
    rows, heads, width, size = store.shape
    places = np.array(starts, np.int64) * size
    run(
        prepare(
            attention.copy_prefix.of(store.dtype),
            attention.CopyPrefix,
            rows * heads,
            store=store,
            prefix=prefix,
            starts=places.ctypes.data,
            rows=rows,
            heads=heads,
            width=width * size,
            count=columns * size,
            prefix_width=prefix.shape[2] * size,
        )
    )


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
    first, last = columns
    padded = query.new_empty(len(starts), query.shape[1], last - first, query.shape[2])
    call = prepare(
        attention.place.of(query.dtype),
        attention.Place,
        len(starts) * -(-(last - first) // attention.COLUMNS),
        starts=starts.ctypes.data,
        padded=padded,
        kept_keys=keys,
        kept_values=values,
        rows=len(starts),
        first=first,
        last=last,
        width=keys.shape[2],
        **_states(query, key, value, rotation),
    )
    run(call)
    return padded


def collect(padded: Tensor, starts: np.ndarray, columns: tuple[int, int], count: int) -> Tensor:
    """Take the padding out of what `place` has padded. [R, H, T, D] → [N, H, D]."""
    rows, heads, width, size = padded.shape
    output = padded.new_empty(count, heads, size)
    call = prepare(
        attention.collect.of(padded.dtype),
        attention.Collect,
        rows * -(-width // attention.COLUMNS),
        padded=padded,
        starts=starts.ctypes.data,
        outputs=output,
        rows=rows,
        heads=heads,
        first=columns[0],
        last=columns[1],
        size=size,
        count=count,
    )
    run(call)
    return output


def attends_causally(size: int, dtype: torch.dtype) -> bool:
    """Say whether `causal_attend` runs here, for heads of this size."""
    return causal is not None and size % BLOCK == 0 and dtype in causal.causal_attend.dtypes


def causal_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    first: int,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attend from the queries of columns [first, first + T), each to the columns that it sees.

    Args:
        query: [R, H, T, D] contiguous, D a multiple of 32.
        keys, values: [R, H_kv, width, D] contiguous, all columns until first + T written.
        starts: each row's first column.
        window: tokens that a query sees, itself included; None is all before it.
        scaling: of the scores, above 0.

    Returns:
        [R, H, T, D], anything before a row's first column.
    """
    rows, heads, columns, size = query.shape
    kv_heads, width = keys.shape[1:3]
    span = -(-causal.SPAN * kv_heads // heads)
    places, output = np.array(starts, np.int64), torch.empty_like(query)
    call = prepare(
        causal.causal_attend.of(query.dtype),
        causal.CausalAttend,
        rows * kv_heads * -(-columns // span),
        queries=query,
        keys=keys,
        values=values,
        starts=places.ctypes.data,
        outputs=output,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        columns=columns,
        size=size,
        width=width,
        first=first,
        window=window or width,
        span=span,
        scaling=bits(scaling),
    )
    run(call)
    return output


def causal_softmax(
    scores: Tensor, starts: Sequence[int], first: int, window: int | None, scaling: float
) -> None:
    """Take the softmax of scores · scaling in place: 0 where a query does not see, and all that padding sees.

    Args:
        scores: [R, H, T, W] contiguous, the queries of columns [first, first + T).
        starts: each row's first column.
        window: tokens that a query sees, itself included; None is all before it.
        scaling: above 0.
    """
    rows, heads, columns, width = scores.shape
    places = np.array(starts, np.int64)
    call = prepare(
        attention.causal_softmax.of(torch.bfloat16),
        attention.CausalSoftmax,
        rows * heads,
        scores=scores,
        starts=places.ctypes.data,
        rows=rows,
        heads=heads,
        columns=columns,
        width=width,
        first=first,
        window=window or width,
        scaling=bits(scaling),
    )
    run(call)


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
    run(attend_call(query, key, value, rotation, rows, blocks, scaling, output))
    return output


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
    """Prepare `attend` into an output."""
    return prepare(
        attention.attend.of(query.dtype),
        attention.Attend,
        len(rows) * key.shape[1],
        outputs=output,
        row_table=rows.ctypes.data,
        block_table=blocks.ctypes.data,
        block_count=len(blocks),
        scaling=bits(scaling),
        threads=torch.get_num_threads(),
        **_states(query, key, value, rotation),
    )


def _states(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> dict[str, Tensor | int]:
    """Gather what `place` and `attend` read of new tokens: where they are, their shapes, and their rotation."""
    count, heads, size = query.shape
    cos, sin, table_width = _tables(rotation, query)
    return {
        "queries": query,
        "keys": key,
        "values": value,
        "cos": cos,
        "sin": sin,
        "count": count,
        "heads": heads,
        "kv_heads": key.shape[1],
        "size": size,
        "query_stride": row_stride(query),
        "key_stride": row_stride(key),
        "value_stride": row_stride(value),
        "table_width": table_width,
    }


def _tables(rotation: Rotation | None, states: Tensor) -> tuple[Tensor | int, Tensor | int, int]:
    """Return cosines, sines and their width; 0 is none.

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
    """Have each token's heads contiguous. [N, H, D] → [N, H, D]."""
    return states if states[0].is_contiguous() else states.contiguous()
