"""Attend from a prefill's queries in compiled code, each to no columns but those that it sees.

By the products of weights: a row's keys of one head are brought into the order of a weight whose outputs are columns,
for scores, and its values into that of one whose inputs are.
"""

from collections import namedtuple
from typing import Any

import numpy as np
from numba import carray

from pipeline.engine.cpu.kernels.attention import NONE, WEIGHT, write_weights
from pipeline.engine.cpu.kernels.attention_vectors import largest
from pipeline.engine.cpu.kernels.blocks import BLOCK, TILE_ROWS
from pipeline.engine.cpu.kernels.loops import aligned, f32, inner, rounded, threaded, u32
from pipeline.engine.cpu.kernels.row_products import INPUT_BYTES, multiply, widen
from pipeline.engine.cpu.kernels.slots import read, slots
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.vectors import ROWS, as_double, halves, longs, words

SPAN = 256  # queries of a task, those of all its heads together: keys and values are ordered once for them
PAIRS = BLOCK // 2  # of inputs in a block

# What a thread works in: ROWS queries as a product takes them, a query's scores, weights of ROWS queries as a product
# takes them, and their totals; what products write, [strips, ROWS, 32] each.
Room = namedtuple("Room", "inputs own weights totals scores sums")


@inner
def _order_keys(keys: Any, count: int, blocks: Any) -> None:
    """Order keys as a weight [columns, D]. keys [count, D/2] pairs → blocks [strips, D/32, 2, 16, 16]."""
    for column in range((count + BLOCK - 1) // BLOCK * BLOCK):
        strip, tile, lane = column // BLOCK, column % BLOCK // TILE_ROWS, column % TILE_ROWS
        for block in range(blocks.shape[1]):
            for pair in range(PAIRS):
                number = keys[column, block * PAIRS + pair] if column < count else u32(0)
                blocks[strip, block, tile, pair, lane] = number


@inner
def _order_values(values: Any, count: int, blocks: Any) -> None:
    """Order values as a weight [D, columns]. values [count, D] → blocks [D/32, columns/32, 2, 16, 16]."""
    for column in range(0, (count + BLOCK - 1) // BLOCK * BLOCK, 2):
        block, pair = column // BLOCK, column % BLOCK // 2
        first, second = values[min(column, count - 1)], values[min(column + 1, count - 1)]
        # Beyond the last column it is written again: what weighs 0 must be finite.
        for strip in range(len(blocks)):
            for tile in range(2):
                start = strip * BLOCK + tile * TILE_ROWS
                line = blocks[strip, block, tile, pair]
                for lane in range(TILE_ROWS):
                    line[lane] = u32(first[start + lane]) | u32(second[start + lane]) << u32(16)


@inner
def _weigh(scores: Any, row: int, first: int, end: int, scaling: Any, own: Any, weights: Any) -> Any:
    """Write e^(scaling · (score − the largest)) for the columns [first, end), 0 for others; return their sum.

    Args:
        scores: [strips, ROWS, 32].
        own, weights: room for the columns of all strips, in float32 and as a product takes them.
    """
    for strip in range(len(scores)):
        for d in range(BLOCK):  # numba is slow at copying a short slice
            own[strip * BLOCK + d] = scores[strip, row, d]
    count = len(scores) * BLOCK
    own[:first] = NONE
    own[end:count] = NONE
    most = largest(own.ctypes.data, count)
    total = write_weights(own.ctypes.data, most, scaling, weights.ctypes.data, count)
    weights[:first] = 0
    weights[end:count] = 0
    return total


@inner
def _products(rows: int, input: int, stride: int, blocks: int, weights: Any, sums: Any) -> None:
    """Multiply rows by the first blocks of each strip of weights, to sums [strips, ROWS, 32]."""
    for strip in range(len(sums)):
        for row in range(rows):
            for d in range(BLOCK):
                sums[strip, row, d] = 0
        here = weights[strip].ctypes.data
        multiply(rows, input, stride, blocks, sums[strip].ctypes.data, here, here, 0)


@inner
def _attend_span(
    p: Any, place: int, begin: int, end: int, base: int, keys: Any, values: Any, room: Any
) -> None:
    """Attend from the queries [begin, end) of one head of a row, ROWS at a time.

    Args:
        place: of the head's first query among all.
        base: the column of the first key.
        keys, values: ordered.
    """
    size, scaling = p.size, f32(as_double(p.scaling))
    groups = (end - begin + ROWS - 1) // ROWS  # of nearly one size
    for group in range(groups):
        here = begin + (end - begin) * group // groups
        rows = begin + (end - begin) * (group + 1) // groups - here
        input = p.queries + (place + here) * size * 2
        if INPUT_BYTES == 4:
            widen(input, rows * size, room.inputs.ctypes.data)
            input = room.inputs.ctypes.data
        end_column = p.first + here + 1 - base  # one beyond the last that the first of them sees
        low = max(0, end_column - p.window) // BLOCK  # the first strip that one of them sees
        high = (end_column + rows - 1 + BLOCK - 1) // BLOCK
        scores, before = room.scores[: high - low], low * BLOCK
        _products(rows, input, size * INPUT_BYTES, size // BLOCK, keys[low:high], scores)
        for row in range(rows):
            last = end_column + row
            seen = max(0, last - p.window) - before, last - before
            room.totals[row] = _weigh(scores, row, *seen, scaling, room.own, room.weights[row])
        line = room.weights.shape[1] * INPUT_BYTES
        _products(rows, room.weights.ctypes.data, line, high - low, values[:, low:high], room.sums)
        outputs = carray(halves(p.outputs + (place + here) * size * 2), (rows, size // BLOCK, BLOCK))
        for row in range(rows):
            factor = f32(1) / room.totals[row]
            for strip in range(size // BLOCK):
                for d in range(BLOCK):
                    outputs[row, strip, d] = rounded(room.sums[strip, row, d] * factor)


CausalAttend = slots(
    "queries keys values starts outputs",
    "rows heads kv_heads columns size width first window span scaling",
)


@threaded
def causal_attend(pointer: Any) -> None:
    """Attend from `span` queries of a row, in all heads that share a key head, a task."""
    p = read(pointer, CausalAttend)
    rows, kv_heads, columns, size, first, span = p.rows, p.kv_heads, p.columns, p.size, p.first, p.span
    strips, spans = (first + columns + BLOCK - 1) // BLOCK, (columns + span - 1) // span
    starts = carray(longs(p.starts), rows)
    keys = np.empty((strips, size // BLOCK, 2, PAIRS, TILE_ROWS), np.uint32)
    values = np.empty((size // BLOCK, strips, 2, PAIRS, TILE_ROWS), np.uint32)
    room = Room(
        aligned(ROWS * size),
        aligned(strips * BLOCK),
        np.empty((ROWS, strips * BLOCK), WEIGHT),
        np.empty(ROWS, np.float32),
        aligned(strips * ROWS * BLOCK).reshape(strips, ROWS, BLOCK),
        aligned(ROWS * size).reshape(size // BLOCK, ROWS, BLOCK),
    )
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        # A row's last queries see most: they come first.
        number, row, kv_head = spans - 1 - task // (rows * kv_heads), task // kv_heads % rows, task % kv_heads
        begin, end = max(number * span, starts[row] - first), min((number + 1) * span, columns)
        if begin >= end:
            continue  # padding
        base = max(starts[row], first + begin + 1 - p.window)  # the first column that one of them sees
        count = first + end - base
        offset = ((row * kv_heads + kv_head) * p.width + base) * size * 2
        _order_keys(carray(words(p.keys + offset), (count, size // 2)), count, keys)
        _order_values(carray(halves(p.values + offset), (count, size)), count, values)
        group = p.heads // kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            place = (row * p.heads + head) * columns
            _attend_span(p, place, begin, end, base, keys, values, room)
