"""Compute in Triton what a decode step takes dozens of small launches for, and its attention.

Replayed from a graph, a small kernel of torch's still takes 2 to 9 µs, and a Llama of 32 layers has 1,300 of
them a step: on an H200 a third of the time. With these a layer is six products and six kernels.

Each computes in float32 and rounds where transformers does. TRITON_INTERPRET=1 runs them on a CPU, for tests.
Importing this module raises ImportError without Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [N, D] each, their two halves equal

SPLIT = 256  # columns that one program attends to; the same whatever the batch, and so a row's bits
# Columns in one product, warps (for 128 numbers a head) and stages of Triton: what an H200 does best.
HALF, FLOAT32 = (16, 1, 4), (32, 4, 1)
TILE = 8192  # numbers of keys in one product: more of 256 a head than this is too much for smaller cards


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm by the root mean square (Zhang and Sennrich 2019), rounded as transformers does. [.., D] → [.., D]."""
    states = input.contiguous()
    return _normed(states, states, weight, eps, adds=False)


def add_rms_norm(states: Tensor, addition: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the states in place, and norm the sum. Contiguous [.., D] → [.., D]."""
    return _normed(states, addition.contiguous(), weight, eps, adds=True)


def _normed(states: Tensor, addition: Tensor, weight: Tensor, eps: float, *, adds: bool) -> Tensor:
    output, size = torch.empty_like(states), states.shape[-1]
    padded = triton.next_power_of_2(size)
    warps = min(8, max(1, padded // 512))
    _norm_kernel[(states.numel() // size,)](
        states, addition, weight, output, eps, size, ADDS=adds, PADDED=padded, num_warps=warps
    )
    return output


@triton.jit
def _norm_kernel(states, addition, weight, output, eps, size, ADDS: tl.constexpr, PADDED: tl.constexpr):
    place = tl.arange(0, PADDED)
    inside = place < size
    at = tl.program_id(0).to(tl.int64) * size + place
    x = tl.load(states + at, mask=inside, other=0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(addition + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(states + at, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, (normed * w).to(x.dtype), mask=inside)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up, each rounded as torch does. Two of [N, M] → [N, M]."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    _silu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, output, gate.numel(), SIZE=1024)
    return output


@triton.jit
def _silu_kernel(gate, up, output, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    wide = g.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(output + at, (silu * u).to(g.dtype), mask=inside)


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotate heads by their positions (Su et al. 2021), as transformers' rotate_half does. [N, H, D]."""
    states = states.contiguous()
    cos, sin = (t.contiguous() for t in rotation)
    output = torch.empty_like(states)
    count, heads, size = states.shape
    _rotate_kernel[(count, heads)](
        states, cos, sin, output, heads, size, PADDED=triton.next_power_of_2(size), num_warps=1
    )
    return output


@triton.jit
def _rotate_kernel(states, cos, sin, output, heads, size, PADDED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    at = (token * heads + tl.program_id(1)) * size
    rotated = _loaded(states, at, place, place < size, size, cos, sin, token, True)
    tl.store(output + at + place, rotated, mask=place < size)


@triton.jit
def _loaded(states, at, place, inside, size, cos, sin, token, ROTATES: tl.constexpr):
    """Load a head that begins at `at`, and turn it: x · cos + (−second half, first half) · sin."""
    x = tl.load(states + at + place, mask=inside, other=0.0)
    if ROTATES:
        half = size // 2
        y = tl.load(states + at + tl.where(place < half, place + half, place - half), mask=inside, other=0.0)
        c = tl.load(cos + token * size + place, mask=place < size, other=0.0).to(tl.float32)
        s = tl.load(sin + token * size + place, mask=place < size, other=0.0).to(tl.float32)
        wide = tl.where(place < half, -y.to(tl.float32), y.to(tl.float32))
        x = (x.to(tl.float32) * c + wide * s).to(x.dtype)
    return x


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    keys: Tensor,
    values: Tensor,
    control: Tensor,
    table: Tensor,
    columns: int,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Rotate one token of each row, store its key and value, and attend to all that the row holds.

    Flash decoding (Dao et al. 2023): each SPLIT columns are attended to apart, then merged. → [B, H, D].

    Args:
        query: [B, H, D]; key, value: [B, H_kv, D].
        rotation: of query and key, or None.
        keys, values: the layer's pages, [P, PAGE, H_kv, D].
        control: [B, ≥ 2] int32, each row's slot, and how many columns it holds.
        table: [slots, T] int32, the pages of each slot.
        columns: no row holds more, the new one included.
        window: columns that a token sees, itself included; None is all.
    """
    rows, heads, size = query.shape
    kv_heads = key.shape[1]
    splits = triton.cdiv(columns, SPLIT)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cos, sin = (t.contiguous() for t in rotation) if rotation is not None else (query, query)
    output = torch.empty_like(query)
    parts = query.new_empty(rows, heads, splits, size, dtype=torch.float32) if splits > 1 else output
    sums = query.new_empty(rows, heads, splits, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(size))
    block, warps, stages = tiling(query.dtype, padded)
    _attend_kernel[(rows, kv_heads, splits)](
        query, key, value, cos, sin, keys, values, control, table, parts, sums,
        control.stride(0), table.stride(0), window or 0, scaling, size, splits,
        ROTATES=rotation is not None, MERGES=splits > 1, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        GROUP_PADDED=max(16, triton.next_power_of_2(heads // kv_heads)), PADDED=padded, PAGE=keys.shape[1],
        SPLIT=SPLIT, BLOCK=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(rows, heads)](
            parts, sums, output, splits, size, SPLITS_PADDED=triton.next_power_of_2(splits), PADDED=padded, num_warps=1
        )  # fmt: skip
    return output


def tiling(dtype: torch.dtype, padded: int) -> tuple[int, int, int]:
    """Choose columns in one product (16 to a page), warps and stages, for heads of this size."""
    block, warps, stages = FLOAT32 if dtype == torch.float32 else HALF
    return max(16, min(block, TILE // padded)), warps * triton.cdiv(padded, 128), stages


@triton.jit
def _attend_kernel(
    query, key, value, cos, sin, keys, values, control, table, parts, sums,
    control_stride, table_stride, window, scaling, size, splits,
    ROTATES: tl.constexpr, MERGES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend from the query heads of one row that share a key head, over one split of its columns."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(control + row * control_stride).to(tl.int64)
    held = tl.load(control + row * control_stride + 1)  # the new token goes to this column
    seen = tl.where(window > 0, tl.maximum(held + 1 - window, 0), 0)  # the first column in the window
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, held + 1)
    place, member = tl.arange(0, PADDED), tl.arange(0, GROUP_PADDED)
    inside, real = place < size, member < GROUP
    both = real[:, None] & inside[None, :]
    head = (row * KV_HEADS + kv_head) * GROUP + member  # among those of all rows
    if (last <= first) | (last <= seen):
        if MERGES:
            tl.store(sums + head * splits + split, float("-inf"), mask=real)
    else:
        new_at = (row * KV_HEADS + kv_head) * size
        q = _loaded(query, head[:, None] * size, place[None, :], both, size, cos, sin, row, ROTATES)
        pages = table + slot * table_stride
        if last == held + 1:  # this program has the new column
            k_new = _loaded(key, new_at, place, inside, size, cos, sin, row, ROTATES)
            v_new = tl.load(value + new_at + place, mask=inside, other=0.0)
            page = tl.load(pages + held // PAGE).to(tl.int64)
            cell = ((page * PAGE + held % PAGE) * KV_HEADS + kv_head) * size + place
            tl.store(keys + cell, k_new, mask=inside)
            tl.store(values + cell, v_new, mask=inside)
            tl.debug_barrier()  # its other threads read it like any column
        result, log = _attend_columns(
            q, keys + kv_head * size, values + kv_head * size, pages, first, last, seen,
            scaling, size, place, KV_HEADS, GROUP_PADDED, PADDED, PAGE, BLOCK,
        )  # fmt: skip
        part = head * splits + split  # with one split, the output itself
        tl.store(parts + part[:, None] * size + place[None, :], result.to(parts.dtype.element_ty), mask=both)
        if MERGES:
            tl.store(sums + part, log, mask=real)


@triton.jit
def _attend_columns(
    q, keys, values, pages, first, last, seen, scaling, size, place,
    KV_HEADS: tl.constexpr, GROUP_PADDED: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend to columns [first, last), block by block (Milakov and Gimelshein 2018), each a part of one page.

    Those before `seen` are outside of the window, but not all.
    Return the weighted values, and the logarithm of the weights' sum.
    """
    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    result = tl.zeros([GROUP_PADDED, PADDED], tl.float32)
    inner = tl.arange(0, BLOCK)
    cells = inner[:, None] * (KV_HEADS * size) + place[None, :]
    begin = tl.maximum(first, seen // BLOCK * BLOCK)
    page = tl.load(pages + begin // PAGE).to(tl.int64)
    for block in range(begin, last, BLOCK):
        # Read ahead of its use: keys and values wait for their address otherwise.
        following = tl.load(pages + (block + BLOCK) // PAGE, mask=block + BLOCK < last, other=0).to(tl.int64)
        column = block + inner
        stored = (column >= seen) & (column < last)
        there = stored[:, None] & (place < size)[None, :]
        start = (page * PAGE + block % PAGE) * KV_HEADS * size
        k = tl.load(keys + start + cells, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(stored[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        v = tl.load(values + start + cells, mask=there, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
        page = following
    return result / total[:, None], top + tl.log(total)


@triton.jit
def _merge_kernel(parts, sums, output, splits, size, SPLITS_PADDED: tl.constexpr, PADDED: tl.constexpr):
    """Weigh each split's result by its share of the softmax's sum."""
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    place = tl.arange(0, PADDED)
    inside = place < size
    logs = tl.load(sums + head * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(logs, 0)
    total = tl.sum(tl.exp(logs - top), 0)
    result = tl.zeros([PADDED], tl.float32)
    for i in range(splits):
        log = tl.load(sums + head * splits + i)
        if log != float("-inf"):
            part = tl.load(parts + (head * splits + i) * size + place, mask=inside, other=0.0)
            result += part * (tl.exp(log - top) / total)
    tl.store(output + head * size + place, result.to(output.dtype.element_ty), mask=inside)
