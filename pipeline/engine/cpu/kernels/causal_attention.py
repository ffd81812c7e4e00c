"""Attend from a prefill's queries in compiled code, each to no columns but those that it sees.

By the products of weights: a row's keys of one head are brought into the order of a weight whose outputs are columns,
for scores, and its values into that of one whose inputs are.
"""

from collections import namedtuple
from typing import Any

import numpy as np
from numba import carray

from pipeline.engine.cpu.kernels.attention import NONE, new_weights
from pipeline.engine.cpu.kernels.attention_vectors import exponentials, largest
from pipeline.engine.cpu.kernels.blocks import BLOCK, TILE_ROWS
from pipeline.engine.cpu.kernels.loops import aligned, f32, u32
from pipeline.engine.cpu.kernels.precision import DTYPES, either, held, inner, item_bytes, rounded, threaded
from pipeline.engine.cpu.kernels.row_products import multiply, widen
from pipeline.engine.cpu.kernels.slots import read, slots
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.tiles import has_tiles
from pipeline.engine.cpu.kernels.vectors import HAS_BF16, ROWS, as_double, longs, words

OWN_DTYPES = DTYPES[1:] if has_tiles() else DTYPES  # tiles attend in bf16 by whole products
SPAN = 256  # queries of a task, those of all its heads together: keys and values are ordered once for them

# What a thread works in: ROWS queries as a product takes them, a query's scores, weights of ROWS queries as a product
# takes them, and their totals; what products write, [strips, ROWS, 32] each.
Room = namedtuple("Room", "inputs own weights totals scores sums")


@inner
def _order_keys(keys: Any, count: int, blocks: Any) -> None:
    """Order keys as a weight [columns, D]. In words, n a block: [count, D n/32] → [strips, D/32, 2, n, 16]."""
    in_block = blocks.shape[3]
    for column in range((count + BLOCK - 1) // BLOCK * BLOCK):
        strip, tile, lane = column // BLOCK, column % BLOCK // TILE_ROWS, column % TILE_ROWS
        for block in range(blocks.shape[1]):
            for n in range(in_block):
                word = keys[column, block * in_block + n] if column < count else u32(0)
                blocks[strip, block, tile, n, lane] = word


@inner
def _order_pairs(values: Any, count: int, blocks: Any) -> None:
    """Order values as a weight [D, columns]. values [count, D] → pairs in words [D/32, columns/32, 2, 16, 16]."""
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
def _order_floats(values: Any, count: int, blocks: Any) -> None:
    """Do the same in float32. [count, D] → [D/32, columns/32, 2, 32, 16]."""
    numbers = blocks.view(np.float32)
    for column in range((count + BLOCK - 1) // BLOCK * BLOCK):
        value = values[min(column, count - 1)]
        for strip in range(len(blocks)):
            for tile in range(2):
                line = numbers[strip, column // BLOCK, tile, column % BLOCK]
                for lane in range(TILE_ROWS):
                    line[lane] = value[strip * BLOCK + tile * TILE_ROWS + lane]


_order_values = either(_order_pairs, _order_floats)


@inner
def _widened(kind: Any, inputs: int, count: int, room: int) -> int:
    """Widen inputs in bf16; return where they are."""
    widen(inputs, count, room)
    return room


@inner
def _as_they_are(kind: Any, inputs: int, count: int, room: int) -> int:
    return inputs


_taken = either(_as_they_are if HAS_BF16 else _widened, _as_they_are)  # inputs as a product takes them


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
    total = exponentials(weights, own.ctypes.data, most, scaling, weights.ctypes.data, count)
    weights[:first] = 0
    weights[end:count] = 0
    return total


@inner
def _products(pointer: Any, rows: int, input: int, stride: int, blocks: int, weights: Any, sums: Any) -> None:
    """Multiply rows by the first blocks of each strip of weights, to sums [strips, ROWS, 32]."""
    for strip in range(len(sums)):
        for row in range(rows):
            for d in range(BLOCK):
                sums[strip, row, d] = 0
        here = weights[strip].ctypes.data
        multiply(pointer, rows, input, stride, blocks, sums[strip].ctypes.data, here, here, 0)


@inner
def _attend_span(
    pointer: Any, p: Any, place: int, begin: int, end: int, base: int, keys: Any, values: Any, room: Any
) -> None:
    """Attend from the queries [begin, end) of one head of a row, ROWS at a time.

    Args:
        place: of the head's first query among all.
        base: the column of the first key.
        keys, values: ordered.
    """
    size, scaling = p.size, f32(as_double(p.scaling))
    row_bytes, number = size * item_bytes(pointer), room.weights.itemsize  # bytes of what a product takes
    groups = (end - begin + ROWS - 1) // ROWS  # of nearly one size
    for group in range(groups):
        here = begin + (end - begin) * group // groups
        rows = begin + (end - begin) * (group + 1) // groups - here
        queries = p.queries + (place + here) * row_bytes
        input = _taken(pointer, queries, rows * size, room.inputs.ctypes.data)
        end_column = p.first + here + 1 - base  # one beyond the last that the first of them sees
        low = max(0, end_column - p.window) // BLOCK  # the first strip that one of them sees
        high = (end_column + rows - 1 + BLOCK - 1) // BLOCK
        scores, before = room.scores[: high - low], low * BLOCK
        _products(pointer, rows, input, size * number, size // BLOCK, keys[low:high], scores)
        for row in range(rows):
            last = end_column + row
            seen = max(0, last - p.window) - before, last - before
            room.totals[row] = _weigh(scores, row, *seen, scaling, room.own, room.weights[row])
        line = room.weights.shape[1] * number
        _products(pointer, rows, room.weights.ctypes.data, line, high - low, values[:, low:high], room.sums)
        outputs = carray(held(pointer, p.outputs + (place + here) * row_bytes), (rows, size // BLOCK, BLOCK))
        for row in range(rows):
            factor = f32(1) / room.totals[row]
            for strip in range(size // BLOCK):
                for d in range(BLOCK):
                    outputs[row, strip, d] = rounded(room.sums[strip, row, d] * factor, outputs)


CausalAttend = slots(
    "queries keys values starts outputs",
    "rows heads kv_heads columns size width first window span scaling",
)


@threaded(*OWN_DTYPES)
def causal_attend(pointer: Any) -> None:
    """Attend from `span` queries of a row, in all heads that share a key head, a task."""
    p = read(pointer, CausalAttend)
    rows, kv_heads, columns, size, first, span = p.rows, p.kv_heads, p.columns, p.size, p.first, p.span
    strips, spans = (first + columns + BLOCK - 1) // BLOCK, (columns + span - 1) // span
    starts = carray(longs(p.starts), rows)
    item = item_bytes(pointer)
    in_block = BLOCK * item // 4  # words of 32 bits
    keys = np.empty((strips, size // BLOCK, 2, in_block, TILE_ROWS), np.uint32)
    values = np.empty((size // BLOCK, strips, 2, in_block, TILE_ROWS), np.uint32)
    room = Room(
        aligned(ROWS * size),
        aligned(strips * BLOCK),
        new_weights(pointer, ROWS, strips * BLOCK),
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
        offset = ((row * kv_heads + kv_head) * p.width + base) * size * item
        _order_keys(carray(words(p.keys + offset), (count, size * item // 4)), count, keys)
        _order_values(carray(held(pointer, p.values + offset), (count, size)), count, values)
        group = p.heads // kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            place = (row * p.heads + head) * columns
            _attend_span(pointer, p, place, begin, end, base, keys, values, room)
