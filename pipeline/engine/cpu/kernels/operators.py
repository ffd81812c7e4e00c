"""Call the kernels on tensors: operators for a CPU in bf16, and products on packed weights.

At a few dozen rows a step spends more time in dozens of small operators than in its products. Each of these
does in one call what takes torch five to fifteen, and computes in float32. How kernels work: README.md.

Importing this module compiles them, or takes them from numba's cache. It raises ImportError without numba,
and OSError where torch is not linked with libgomp.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.cpu.kernels import attention as attention
from pipeline.engine.cpu.kernels import loops as loops
from pipeline.engine.cpu.kernels.blocks import BLOCK, Blocks, Linear, chunk_rows
from pipeline.engine.cpu.kernels.blocks import pack_blocks as pack_blocks
from pipeline.engine.cpu.kernels.blocks import pack_bytes as pack_bytes
from pipeline.engine.cpu.kernels.blocks import pack_codes as pack_codes
from pipeline.engine.cpu.kernels.linear_floats import FEW_ROWS as FEW_ROWS
from pipeline.engine.cpu.kernels.linear_floats import linear_in_float32 as linear_in_float32
from pipeline.engine.cpu.kernels.slots import NEXT_TASK as NEXT_TASK
from pipeline.engine.cpu.kernels.slots import TASKS as TASKS
from pipeline.engine.cpu.kernels.slots import Call, bits, prepare
from pipeline.engine.cpu.kernels.threads import openmp as openmp
from pipeline.engine.cpu.kernels.threads import parallel as parallel
from pipeline.engine.cpu.kernels.threads import run
from pipeline.engine.cpu.kernels.tiles import CONFIGURATION, has_tiles
from pipeline.engine.cpu.kernels.vectors import HAS_BF16, compiles_for

products: Any = None  # what multiplies here; each compiles only where it can run
if has_tiles():
    from pipeline.engine.cpu.kernels import linear_tiles as products
elif compiles_for("avx2"):
    from pipeline.engine.cpu.kernels import linear_vectors as products

MULTIPLIES_ON = (
    "matrix tiles (AMX)"
    if has_tiles()
    else "vectors with bf16 (AVX-512)"
    if HAS_BF16
    else "vectors of AVX-512 without bf16"
    if compiles_for("avx512f")
    else "vectors of AVX2"
)

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [N, D] each, their two halves equal


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm by the root mean square (Zhang and Sennrich 2019), rounded as transformers does. [.., D] → [.., D]."""
    return _rms_norm(input.contiguous(), None, weight, eps)


def add_rms_norm(states: Tensor, addition: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the states in place, and norm the sum. Contiguous [.., D] → [.., D]."""
    return _rms_norm(states, addition, weight, eps)


def _rms_norm(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    output = torch.empty_like(states)
    run(norm_call(states.view(-1, len(weight)), addition, weight, eps, output))
    return output


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, each rounded as torch does. Two of [N, M], each row contiguous → [N, M]."""
    output = gate.new_empty(gate.shape)
    rows, width = gate.shape
    numbers = {"rows": rows, "width": width, "gate_stride": _stride(gate), "up_stride": _stride(up)}
    tasks = -(-rows // loops.ROWS)
    run(prepare(loops.silu_multiply, loops.Silu, tasks, gates=gate, ups=up, outputs=output, **numbers))
    return output


def linear(input: Tensor, weight: Blocks, bias: Tensor | None, gated: bool = False) -> Tensor:
    """Multiply by a packed weight. [.., K] → [.., M], or where gated [.., M/2].

    Args:
        weight: [M, K], from `pack_blocks`, `pack_codes` or `pack_bytes`. Gated, 16 gates and 16 ups take turns,
            and the output is silu(gate) · up.
        bias: [M].

    Raises:
        TypeError: the input is not in bf16.
    """
    if input.dtype != torch.bfloat16:
        raise TypeError(f"an input in {input.dtype}")
    states = input.reshape(-1, weight.inputs)
    states = states if states.stride(1) == 1 else states.contiguous()
    count = len(states)
    if count < products.FEWEST_ROWS:
        states = F.pad(states, (0, 0, 0, products.FEWEST_ROWS - count))
    width = weight.outputs // 2 if gated else weight.outputs
    output = states.new_empty(len(states), width)
    run(linear_call(states, weight, bias, output, gated))
    return output[:count].view(*input.shape[:-1], width)


def argmax(scores: Tensor) -> Tensor:
    """Find the first of the largest. Contiguous [B, V] → [B] int64."""
    rows, width = scores.shape
    places = torch.empty(rows, dtype=torch.int64)
    run(prepare(loops.argmax, loops.Argmax, rows, scores=scores, places=places, rows=rows, width=width))
    return places


def forbid(scores: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Put −inf in place where no bit is set. Contiguous [B, V]; rows [K] int64, allowed [K, words] int64."""
    height, width = scores.shape
    sizes = {"height": height, "width": width, "words": allowed.shape[1]}
    run(prepare(loops.forbid, loops.Forbid, len(rows), scores=scores, which=rows, allowed=allowed, **sizes))


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
            attention.copy_prefix,
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
        attention.place,
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
        attention.collect,
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
        attention.causal_softmax,
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


def norm_call(states: Tensor, addition: Tensor | None, weight: Tensor, eps: float, output: Tensor) -> Call:
    """Prepare `add_rms_norm` into an output. Both [N, D], or [N, H, D], each token's heads contiguous."""
    width = len(weight)
    rows, heads = len(states), states[0].numel() // width
    return prepare(
        loops.rms_norm,
        loops.Norm,
        -(-rows * heads // loops.ROWS),
        inputs=states,
        additions=0 if addition is None else addition,
        weight=weight,
        outputs=output,
        rows=rows,
        width=width,
        heads=heads,
        stride=_stride(states),
        eps=bits(eps),
    )


def linear_call(
    states: Tensor, weight: Blocks, bias: Tensor | None, output: Tensor, gated: bool = False
) -> Call:
    """Prepare `linear` into an output. states: [N, K], N ≥ products.FEWEST_ROWS."""
    inputs, outputs = weight.inputs, weight.outputs
    chunk = chunk_rows(inputs, products.ROWS)
    # For each chunk of rows, as many tasks as a row of the output has cache lines.
    tasks = -(-len(states) // chunk) * -(-outputs // BLOCK // (1 + gated))
    return prepare(
        products.linear,
        Linear,
        tasks,
        inputs=states,
        weights=weight.numbers,
        values=0 if weight.values is None else weight.values,
        scales=0 if weight.scales is None else weight.scales,
        bias=0 if bias is None else bias,
        outputs=output,
        configuration=CONFIGURATION.ctypes.data,
        rows=len(states),
        width_in=inputs,
        width_out=outputs,
        stride=states.stride(0),
        gated=int(gated),
        threads=torch.get_num_threads(),
        chunk=chunk,
    )


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
        attention.attend,
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
        "query_stride": _stride(query),
        "key_stride": _stride(key),
        "value_stride": _stride(value),
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


def _stride(rows: Tensor) -> int:
    """Count the numbers from one row to the next. A single row's own stride may be anything."""
    return rows.stride(0) if len(rows) > 1 else rows[0].numel()


if not hasattr(loops.rms_norm, "address"):
    raise ImportError("numba does not compile here (NUMBA_DISABLE_JIT)")
