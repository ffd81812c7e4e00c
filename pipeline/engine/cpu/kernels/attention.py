"""Loop over rows and heads in compiled code: a prefill's way into its rectangle and out, and a decode step."""

from typing import Any

import numpy as np
import torch
from numba import carray

from pipeline.engine.cpu.kernels.attention_floats import (
    HEADS,
    in_runs,
    runs_in_order,
    score_heads,
    weigh_heads,
)
from pipeline.engine.cpu.kernels.attention_vectors import (
    exponentials,
    in_order,
    largest,
    rotate,
    score_block,
    weigh_block,
)
from pipeline.engine.cpu.kernels.loops import copy, f32
from pipeline.engine.cpu.kernels.precision import (
    DTYPES,
    either,
    held,
    inner,
    item_bytes,
    rounded,
    threaded,
    wide,
)
from pipeline.engine.cpu.kernels.slots import read, slots
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.vectors import HAS_BF16, LANES, PAIRS, as_double, longs

AHEAD = 32  # columns between what is read and what is asked for
NONE = np.float32(-1e30)  # the score of a column that is not there; fast math knows no −inf
COLUMNS = 16  # of a row in one task, where a prefill is taken apart and put together


@inner
def _halves(kind: Any, rows: int, columns: int) -> Any:
    return np.empty((rows, columns), np.uint16)


@inner
def _floats(kind: Any, rows: int, columns: int) -> Any:
    return np.empty((rows, columns), np.float32)


new_states = either(_halves, _floats)  # as a kernel's tensors hold them
new_weights = either(_halves if HAS_BF16 else _floats, _floats)  # what values are weighed by
weigh = either(weigh_block if HAS_BF16 else weigh_heads, weigh_heads)
put_in_order = either(in_order if HAS_BF16 else runs_in_order, runs_in_order)


@inner
def _rotate(states: Any, cos: Any, sin: Any, out: Any) -> None:
    """Rotate one head by its position; copy it where the tables are empty."""
    if len(cos) == 0:
        copy(states, out)
        return
    half = len(out) // 2
    if half % LANES == 0:
        rotate(out, states.ctypes.data, cos.ctypes.data, sin.ctypes.data, out.ctypes.data, half)
        return
    left, right, out_left, out_right = states[:half], states[half:], out[:half], out[half:]
    for d in range(half):
        a, b, c, s = wide(left[d]), wide(right[d]), wide(cos[d]), wide(sin[d])
        out_left[d] = rounded(a * c - b * s, out)
        out_right[d] = rounded(b * c + a * s, out)


Place = slots(
    "queries keys values cos sin starts padded kept_keys kept_values",
    "count heads kv_heads size rows first last width query_stride key_stride value_stride table_width",
)


@threaded(*DTYPES)
def place(pointer: Any) -> None:
    """Bring tokens to their places in the rectangle, COLUMNS columns of a row a task."""
    p = read(pointer, Place)
    count, heads, kv_heads, size = p.count, p.heads, p.kv_heads, p.size
    rows, first, last, width = p.rows, p.first, p.last, p.width
    queries = carray(held(pointer, p.queries), (count, p.query_stride))
    new_keys = carray(held(pointer, p.keys), (count, p.key_stride))
    new_values = carray(held(pointer, p.values), (count, p.value_stride))
    cosines = carray(held(pointer, p.cos), (count, p.table_width))
    sines = carray(held(pointer, p.sin), (count, p.table_width))
    starts = carray(longs(p.starts), (rows, 2))
    padded = carray(held(pointer, p.padded), (rows, heads, last - first, size))
    keys = carray(held(pointer, p.kept_keys), (rows, kv_heads, width, size))
    values = carray(held(pointer, p.kept_values), (rows, kv_heads, width, size))
    blocks = (last - first + COLUMNS - 1) // COLUMNS
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        row, begin = task // blocks, first + task % blocks * COLUMNS
        for column in range(begin, min(begin + COLUMNS, last)):
            if column < starts[row, 1]:  # padding
                for head in range(heads):
                    padded[row, head, column - first, :] = 0
                continue
            token = starts[row, 0] + column - max(first, starts[row, 1])
            cos, sin = cosines[token], sines[token]
            for head in range(heads):
                query = queries[token, head * size : (head + 1) * size]
                _rotate(query, cos, sin, padded[row, head, column - first])
            for head in range(kv_heads):
                here = slice(head * size, (head + 1) * size)
                _rotate(new_keys[token, here], cos, sin, keys[row, head, column])
                copy(new_values[token, here], values[row, head, column])


CopyPrefix = slots("store prefix starts rows heads width count prefix_width")


@threaded(*DTYPES)
def copy_prefix(pointer: Any) -> None:
    """Copy the prefix to one head of one row a task: what each row has of it is in one piece."""
    p = read(pointer, CopyPrefix)
    rows, heads, width, count, prefix_width = p.rows, p.heads, p.width, p.count, p.prefix_width
    target = carray(held(pointer, p.store), (rows, heads, width))
    source = carray(held(pointer, p.prefix), (heads, prefix_width))
    starts = carray(longs(p.starts), rows)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        row, head = task // heads, task % heads
        start = starts[row]
        copy(source[head], target[row, head, start : start + count])


Collect = slots("padded starts outputs rows heads first last size count")


@threaded(*DTYPES)
def collect(pointer: Any) -> None:
    """Undo what `place` did to queries, COLUMNS columns of a row a task."""
    p = read(pointer, Collect)
    rows, heads, first, last, size, count = p.rows, p.heads, p.first, p.last, p.size, p.count
    padded = carray(held(pointer, p.padded), (rows, heads, last - first, size))
    starts = carray(longs(p.starts), (rows, 2))
    outputs = carray(held(pointer, p.outputs), (count, heads, size))
    blocks = (last - first + COLUMNS - 1) // COLUMNS
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        row, begin = task // blocks, first + task % blocks * COLUMNS
        for column in range(max(begin, starts[row, 1]), min(begin + COLUMNS, last)):
            token = starts[row, 0] + column - max(first, starts[row, 1])
            for head in range(heads):
                copy(padded[row, head, column - first], outputs[token, head])


@inner
def _filled(scores: Any, count: int) -> Any:
    """Fill up `count` scores to whole vectors, for which there is room; return the largest, and how many they are."""
    whole = (count + LANES - 1) // LANES * LANES
    scores[count:whole] = NONE
    return largest(scores.ctypes.data, whole), whole


CausalSoftmax = slots("scores starts rows heads columns width first window scaling")


@threaded(torch.bfloat16)
def causal_softmax(pointer: Any) -> None:
    """Take the softmax of one head of one row a task, query by query."""
    p = read(pointer, CausalSoftmax)
    rows, heads, columns, width, first, window = p.rows, p.heads, p.columns, p.width, p.first, p.window
    scaling = f32(as_double(p.scaling))
    scores = carray(held(pointer, p.scores), (rows * heads, columns, width))
    starts = carray(longs(p.starts), rows)
    own = np.empty(width + LANES, np.float32)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        for column in range(columns):
            line = scores[task, column]
            end = first + column + 1
            start = max(starts[task // heads], end - window)  # the first column that this query sees
            if start >= end:
                line[:] = 0
                continue
            line[:start] = 0
            line[end:] = 0
            seen = line[start:end]
            for i in range(len(seen)):
                own[i] = wide(seen[i])
            most, whole = _filled(own, len(seen))
            factor = f32(1) / exponentials(own, own.ctypes.data, most, scaling, own.ctypes.data, whole)
            for i in range(len(seen)):
                seen[i] = rounded(own[i] * factor, seen)


@inner
def _soon(states: Any, column: int, end: int, then: int) -> Any:
    """Return the address a little ahead of a column; beyond `end`, that much behind the address `then`."""
    size = states.shape[1] * states.itemsize
    ahead = column + AHEAD
    return states.ctypes.data + ahead * size if ahead < end else then + (ahead - end) * size


@inner
def _as_it_is(query: Any, widened: Any) -> None:
    """Leave it: pairs in bf16 are multiplied as they lie."""


_in_runs = either(_as_it_is if HAS_BF16 else in_runs, in_runs)


@inner
def _score_in_pairs(queries: Any, widened: Any, keys: Any, column: int, soon: int, scores: Any) -> None:
    """Write the scores of LANES columns, a head at a time."""
    heads, size = queries.shape
    step = 64 // heads
    for head in range(heads):
        score_block(
            queries[head].ctypes.data,
            keys[column].ctypes.data,
            scores[head, column:].ctypes.data,
            size,
            soon + head * step * size // 2,
            step,
        )


@inner
def _score_in_floats(queries: Any, widened: Any, keys: Any, column: int, soon: int, scores: Any) -> None:
    """Write the scores of LANES columns, some heads at a time."""
    heads, size = queries.shape
    together = (heads + HEADS - 1) // HEADS
    step = 64 // together
    for number in range(together):
        head = number * HEADS
        score_heads(
            keys,
            min(HEADS, heads - head),
            widened[head].ctypes.data,
            size * 4,
            keys[column].ctypes.data,
            scores[head, column:].ctypes.data,
            scores.shape[1] * 4,
            size,
            soon + number * step * size * keys.itemsize // 4,
            step,
        )


_score_columns = either(_score_in_pairs if HAS_BF16 else _score_in_floats, _score_in_floats)


@inner
def _score(queries: Any, widened: Any, keys: Any, first: int, end: int, then: int, scores: Any) -> None:
    """Write scores[h, c] = queries[h] · keys[c] for the columns [first, end). A block of keys serves all heads.

    Args:
        widened: room for the queries in order of runs, where scores are sums in float32.
    """
    heads, size = queries.shape
    if end - first < LANES or size % PAIRS:
        for column in range(first, end):
            for head in range(heads):
                total = f32(0)
                for d in range(size):
                    total += wide(queries[head, d]) * wide(keys[column, d])
                scores[head, column] = total
        return
    for head in range(heads):
        _in_runs(queries[head], widened[head])
    column = first
    while column < end:
        column = min(column, end - LANES)  # the last block ends at `end`, and may repeat some columns
        _score_columns(queries, widened, keys, column, _soon(keys, column, end, then), scores)
        column += LANES


@inner
def _weigh(weights: Any, values: Any, first: int, end: int, then: int, out: Any) -> None:
    """Sum weights[h, c] · values[c] over the columns [first, end) to out[h].

    The last block ends at `end`: those of its columns weigh 0 that an earlier block has added, or that are
    padding.
    """
    heads, size = out.shape
    out[:] = 0
    if end < LANES or size % PAIRS:
        for column in range(first, end):
            for head in range(heads):
                weight = wide(weights[head, column])
                for d in range(size):
                    out[head, d] += weight * wide(values[column, d])
        return
    together = (heads + HEADS - 1) // HEADS
    step = 64 // together
    column = first
    while column < end:
        start = min(column, end - LANES)
        soon = _soon(values, start, end, then)
        weights[:, start:column] = 0
        for number in range(together):
            head = number * HEADS
            weigh(
                values,
                min(HEADS, heads - head),
                weights[head, start:].ctypes.data,
                weights.shape[1] * weights.itemsize,
                values[start].ctypes.data,
                out[head].ctypes.data,
                size,
                soon + number * step * size * values.itemsize // 4,
                step,
            )
        column += LANES
    for head in range(heads):
        put_in_order(values, out[head].ctypes.data, size)


@inner
def _softened(scores: Any, count: int, scaling: Any, weights: Any) -> Any:
    """Write what values are weighed by; return the sum that it still has to be divided by."""
    most, whole = _filled(scores, count)
    return exponentials(weights, scores.ctypes.data, most, scaling, weights.ctypes.data, whole)


Attend = slots(
    "queries keys values cos sin outputs row_table block_table block_count",
    "count heads kv_heads size query_stride key_stride value_stride table_width scaling threads",
)


@threaded(*DTYPES)
def attend(pointer: Any) -> None:
    """Attend from one row's newest token, a key head and the query heads that share it a task.

    The task first writes its own new key and value: nobody else reads them in this step.
    """
    p = read(pointer, Attend)
    count, heads, kv_heads, size = p.count, p.heads, p.kv_heads, p.size
    group, ahead = heads // kv_heads, p.threads
    scaling = f32(as_double(p.scaling))
    queries = carray(held(pointer, p.queries), (count, p.query_stride))
    new_keys = carray(held(pointer, p.keys), (count, p.key_stride))
    new_values = carray(held(pointer, p.values), (count, p.value_stride))
    cosines = carray(held(pointer, p.cos), (count, p.table_width))
    sines = carray(held(pointer, p.sin), (count, p.table_width))
    outputs = carray(held(pointer, p.outputs), (count, heads, size))
    rows = carray(longs(p.row_table), (count, 4))
    blocks = carray(longs(p.block_table), (p.block_count, 3))
    widest = 0
    for block in range(p.block_count):
        widest = max(widest, blocks[block, 2] + LANES)  # room for whole vectors
    query, out = new_states(pointer, group, size), np.empty((group, size), np.float32)
    widened, totals = np.empty((group, size), np.float32), np.empty(group, np.float32)
    scores, weights = np.empty((group, widest), np.float32), new_weights(pointer, group, widest)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        row, kv_head = task // kv_heads, task % kv_heads
        block, place, first, last = rows[row, 0], rows[row, 1], rows[row, 2], rows[row, 3]
        width = blocks[block, 2]
        offset = (place * kv_heads + kv_head) * width * size * item_bytes(pointer)
        keys = carray(held(pointer, blocks[block, 0] + offset), (width, size))
        values = carray(held(pointer, blocks[block, 1] + offset), (width, size))
        cos, sin = cosines[row], sines[row]
        here = slice(kv_head * size, (kv_head + 1) * size)
        _rotate(new_keys[row, here], cos, sin, keys[last])
        copy(new_values[row, here], values[last])
        for head in range(group):
            start = (kv_head * group + head) * size
            _rotate(queries[row, start : start + size], cos, sin, query[head])
        _score(query, widened, keys, first, last + 1, values[first].ctypes.data, scores)
        for head in range(group):
            totals[head] = _softened(scores[head, first:], last + 1 - first, scaling, weights[head, first:])
        # What this thread will want next are, most likely, the keys as many tasks on as there are threads.
        then = keys[first].ctypes.data + ahead * keys.size * keys.itemsize
        _weigh(weights, values, first, last + 1, then, out)
        for head in range(group):
            output, factor = outputs[row, kv_head * group + head], f32(1) / totals[head]
            for d in range(size):
                output[d] = rounded(out[head, d] * factor, output)
