"""The loops behind cpu_kernels.py, compiled by numba: bf16 in and out, float32 in between.

A loop that threads run takes one pointer, to its parameters: a counter from which each thread takes its
next task, the number of tasks, and what the caller in cpu_kernels.py passes. Numbers in bf16 are held as
uint16, the upper half of a float32.
"""

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from pipeline.engine.cpu_vectors import (
    LANES,
    as_bits,
    as_double,
    as_float,
    halves,
    longs,
    next_task,
    prefetch,
    score_block,
    weigh_block,
)

ROWS = 8  # of a norm, a rotation or a product in one task
f32, i32, u32 = types.float32, types.int32, types.uint32

_inner = njit(fastmath=True, error_model="numpy")
_threaded = cfunc(types.void(types.CPointer(types.int64)), cache=True, fastmath=True, error_model="numpy")


@_inner
def _wide(half: Any) -> Any:
    """bf16 to float32: its upper half."""
    return as_float(u32(u32(half) << u32(16)))


@_inner
def _round(number: Any) -> Any:
    """float32 to bf16, to the nearest, ties to even."""
    bits = as_bits(f32(number))
    return types.uint16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


@_inner
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0 in float32, vectorizable: 2^n times a polynomial on the rest (Cephes' expf)."""
    x = max(x, f32(-87.0))
    power = i32(x * f32(1.44269504) - f32(0.5))  # cut towards zero: the nearest
    n = f32(power)
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1)) * as_float(u32((power + i32(127)) << i32(23)))


@_threaded
def rms_norm(pointer: Any) -> None:
    p = carray(pointer, 8)
    rows, width, eps = p[5], p[6], f32(as_double(p[7]))
    inputs = carray(halves(p[2]), (rows, width))
    outputs = carray(halves(p[3]), (rows, width))
    weight = carray(halves(p[4]), width)
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows)):
            x, y = inputs[row], outputs[row]
            total = f32(0)
            for d in range(width):
                total += _wide(x[d]) * _wide(x[d])
            scale = f32(1) / math.sqrt(total / f32(width) + eps)
            for d in range(width):
                y[d] = _round(_wide(_round(_wide(x[d]) * scale)) * _wide(weight[d]))


@_threaded
def silu_multiply(pointer: Any) -> None:
    p = carray(pointer, 9)
    rows, width = p[5], p[6]
    gates = carray(halves(p[2]), (rows, p[7]))
    ups = carray(halves(p[3]), (rows, p[8]))
    outputs = carray(halves(p[4]), (rows, width))
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows)):
            gate, up, output = gates[row], ups[row], outputs[row]
            for d in range(width):
                x = _wide(gate[d])
                e = _exp(-abs(x))  # of a number that is not above 0
                silu = x * (f32(1) if x > 0 else e) / (f32(1) + e)
                output[d] = _round(_wide(_round(silu)) * _wide(up[d]))


@_threaded
def rotate(pointer: Any) -> None:
    p = carray(pointer, 9)
    rows, heads, stride, size = p[5], p[6], p[7], p[8]
    states = carray(halves(p[2]), (rows, stride))
    cosines = carray(halves(p[3]), (rows, size))
    sines = carray(halves(p[4]), (rows, size))
    half = size // 2
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows)):
            cos, sin = cosines[row, :half], sines[row, :half]
            for head in range(heads):
                left = states[row, head * size : head * size + half]
                right = states[row, head * size + half : (head + 1) * size]
                for d in range(half):
                    a, b, c, s = _wide(left[d]), _wide(right[d]), _wide(cos[d]), _wide(sin[d])
                    left[d] = _round(a * c - b * s)
                    right[d] = _round(b * c + a * s)


@_inner
def _prefetch_next(states: Any, column: int, ahead: int) -> None:
    """LANES columns of the head that this thread will probably come to next, `ahead` heads on."""
    start = states[column].ctypes.data + ahead * states.size * 2
    for line in range(start, start + LANES * states.shape[1] * 2, 64):
        prefetch(line)


@_inner
def _score(queries: Any, keys: Any, first: int, end: int, ahead: int, scores: Any) -> None:
    """scores[h, c] = queries[h] · keys[c] for the columns [first, end); a block of keys serves all heads."""
    heads, size = queries.shape
    if end - first < LANES or size % LANES:
        for column in range(first, end):
            for head in range(heads):
                total = f32(0)
                for d in range(size):
                    total += queries[head, d] * _wide(keys[column, d])
                scores[head, column] = total
        return
    column = first
    while column < end:
        column = min(column, end - LANES)
        _prefetch_next(keys, column, ahead)
        for head in range(heads):
            score_block(
                queries[head].ctypes.data, keys[column].ctypes.data, scores[head, column:].ctypes.data, size
            )
        column += LANES


@_inner
def _softmax(scores: Any) -> Any:
    """In place, but for the division: returns the sum."""
    most = scores[0]
    for i in range(len(scores)):
        most = scores[i] if scores[i] > most else most
    for i in range(len(scores)):
        scores[i] = _exp(scores[i] - most)
    total = f32(0)
    for i in range(len(scores)):
        total += scores[i]
    return total


@_threaded
def causal_softmax(pointer: Any) -> None:
    p = carray(pointer, 10)
    rows, heads, columns, width, first, window = p[4], p[5], p[6], p[7], p[8], p[9]
    scores = carray(halves(p[2]), (rows * heads, columns, width))
    starts = carray(longs(p[3]), rows)
    wide = np.empty(width, np.float32)
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for column in range(columns):
            line = scores[task, column]
            end = first + column + 1
            start = max(starts[task // heads], end - window)
            if start >= end:
                line[:] = 0
                continue
            line[:start] = 0
            line[end:] = 0
            seen, own = line[start:end], wide[: end - start]
            for i in range(len(own)):
                own[i] = _wide(seen[i])
            factor = f32(1) / _softmax(own)
            for i in range(len(own)):
                seen[i] = _round(own[i] * factor)


@_inner
def _weigh(weights: Any, values: Any, first: int, end: int, ahead: int, out: Any) -> None:
    """out[h] = the sum of weights[h, c] · values[c] over the columns [first, end)."""
    heads, size = out.shape
    out[:] = 0
    column = first
    if size % LANES == 0:
        while column + LANES <= end:
            _prefetch_next(values, column, ahead)
            for head in range(heads):
                weigh_block(
                    weights[head, column:].ctypes.data,
                    values[column].ctypes.data,
                    out[head].ctypes.data,
                    size,
                )
            column += LANES
    while column < end:
        for head in range(heads):
            for d in range(size):
                out[head, d] += weights[head, column] * _wide(values[column, d])
        column += 1


@_threaded
def attend(pointer: Any) -> None:
    p = carray(pointer, 18)
    count, heads, kv_heads, size = p[9], p[10], p[11], p[12]
    group = heads // kv_heads
    scaling = f32(as_double(p[16]))
    queries = carray(halves(p[2]), (count, p[13]))
    new_keys = carray(halves(p[3]), (count, p[14]))
    new_values = carray(halves(p[4]), (count, p[15]))
    outputs = carray(halves(p[5]), (count, heads * size))
    rows = carray(longs(p[6]), (count, 4))
    blocks = carray(longs(p[7]), (p[8], 3))
    query, out = np.empty((group, size), np.float32), np.empty((group, size), np.float32)
    scores = np.empty((group, blocks[:, 2].max()), np.float32)
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        row, kv_head = task // kv_heads, task % kv_heads
        block, place, first, last = rows[row, 0], rows[row, 1], rows[row, 2], rows[row, 3]
        width = blocks[block, 2]
        offset = (place * kv_heads + kv_head) * width * size * 2
        keys = carray(halves(blocks[block, 0] + offset), (width, size))
        values = carray(halves(blocks[block, 1] + offset), (width, size))
        for d in range(size):
            keys[last, d] = new_keys[row, kv_head * size + d]
            values[last, d] = new_values[row, kv_head * size + d]
        for head in range(group):
            for d in range(size):
                query[head, d] = _wide(queries[row, (kv_head * group + head) * size + d]) * scaling
        _score(query, keys, first, last + 1, p[17], scores)
        for head in range(group):
            factor = f32(1) / _softmax(scores[head, first : last + 1])
            for column in range(first, last + 1):
                scores[head, column] *= factor
        _weigh(scores, values, first, last + 1, p[17], out)
        for head in range(group):
            for d in range(size):
                outputs[row, (kv_head * group + head) * size + d] = _round(out[head, d])
