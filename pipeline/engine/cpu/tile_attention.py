"""A decode step's attention on a CPU's matrix tiles, for heads of a multiple of 64 numbers.

Scores: 16 keys are a tile's rows as they lie, and the queries of all heads that share them its columns.
Outputs: the weights of those heads are a tile's rows, and the values of 32 columns, two by two, its columns.

numba's cache of this file does not see a change in those that it imports: touch this one too.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.attention import close_task, open_task, softmax, soon_after, widest_block
from pipeline.engine.cpu.loops import aligned, f32, inner, threaded
from pipeline.engine.cpu.threads import next_task
from pipeline.engine.cpu.tiles import (
    TILE_BYTES,
    TILE_ROWS,
    configure,
    load_tile,
    multiply_tiles,
    release,
    store_tile,
    zero_tile,
)
from pipeline.engine.cpu.vectors import (
    INTERLEAVE_LOWER,
    INTERLEAVE_UPPER,
    LOWER_FOURS,
    PAIRS,
    as_double,
    load,
    prefetch_line,
    shuffle,
)

GROUP = 64  # numbers of a head whose sums are held in tiles at a time
COLUMNS = 32  # whose values are added at a time
HEADS = TILE_ROWS  # that may share a key, at most

_NUMBER = ir.IntType(64)
_LOWER_FOURS = np.array(LOWER_FOURS)


@intrinsic
def _score_tile(
    context: Any, keys: Any, stride: Any, queries: Any, tiles: Any, scores: Any, soon: Any
) -> Any:
    """scores [16 columns, 16 heads] = keys, `stride` bytes apart, times queries in `tiles` tiles.

    As many cache lines as the keys have are asked for from `soon` on.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, stride, queries, tiles, scores, soon = arguments
        zero_tile(builder, 0)
        with cgutils.for_range(builder, tiles, intp=_NUMBER) as tile:
            load_tile(builder, 1, builder.add(keys, builder.mul(tile.index, _NUMBER(TILE_BYTES))), stride)
            place = builder.mul(tile.index, _NUMBER(TILE_ROWS * TILE_BYTES))
            load_tile(builder, 2, builder.add(queries, place), _NUMBER(TILE_BYTES))
            multiply_tiles(builder, 0, 1, 2)
            for line in range(TILE_ROWS):
                prefetch_line(builder, builder.add(builder.add(soon, place), _NUMBER(line * 64)), cache=1)
        store_tile(builder, 0, scores, _NUMBER(TILE_BYTES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def _zero_sums(context: Any) -> Any:
    """The tiles that _weigh_tile adds to."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in range(4):
            zero_tile(builder, tile)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _weigh_tile(
    context: Any, weights: Any, weight_stride: Any, values: Any, stride: Any, pairs: Any, soon: Any
) -> Any:
    """Add weights [16 heads, 32 columns] times GROUP numbers of 32 values to four tiles.

    `pairs` is room for the values two by two. As many cache lines are asked for from `soon` on.
    """
    halves = ir.IntType(16)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, weight_stride, values, stride, pairs, soon = arguments
        kind = ir.VectorType(halves, PAIRS).as_pointer()
        with cgutils.for_range(builder, _NUMBER(TILE_ROWS), intp=_NUMBER) as row:
            first = builder.add(values, builder.mul(row.index, builder.mul(stride, _NUMBER(2))))
            second = builder.add(first, stride)
            target = builder.add(pairs, builder.mul(row.index, _NUMBER(TILE_BYTES)))
            ahead = builder.add(soon, builder.mul(row.index, _NUMBER(4 * 64)))
            for part in range(GROUP // PAIRS):
                a, b = (
                    load(builder, place, _NUMBER(part * PAIRS), halves, PAIRS, 2) for place in (first, second)
                )
                for half, order in enumerate((INTERLEAVE_LOWER, INTERLEAVE_UPPER)):
                    place = builder.add(target, _NUMBER((2 * part + half) * TILE_ROWS * TILE_BYTES))
                    builder.store(shuffle(builder, a, b, order), builder.inttoptr(place, kind), align=2)
                    line = builder.add(ahead, _NUMBER((2 * part + half) * 64))
                    prefetch_line(builder, line, cache=1)
        load_tile(builder, 4, weights, weight_stride)
        for tile in range(4):
            place = builder.add(pairs, _NUMBER(tile * TILE_ROWS * TILE_BYTES))
            load_tile(builder, 5, place, _NUMBER(TILE_BYTES))
            multiply_tiles(builder, tile, 4, 5)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def _store_sums(context: Any, sums: Any) -> Any:
    """The four tiles, one after the other."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for tile in range(4):
            place = builder.add(arguments[0], _NUMBER(tile * TILE_ROWS * TILE_BYTES))
            store_tile(builder, tile, place, _NUMBER(TILE_BYTES))
        return context.get_dummy_value()

    return types.void(sums), codegen


@inner
def _score(
    query: Any, keys: Any, first: int, end: int, then: int, tiles: Any, block: Any, scores: Any
) -> None:
    """scores[h, c] = query[h] · keys[c] for the columns [first, end). tiles and block are room."""
    heads, size = query.shape
    for head in range(heads):
        for d in range(0, size, 2):
            for i in range(2):
                tiles[d // PAIRS, d % PAIRS // 2, 2 * head + i] = query[head, d + i]
    width = len(keys)
    for column in range(first, end, TILE_ROWS):
        start = min(column, width - TILE_ROWS)
        _score_tile(
            keys[start].ctypes.data,
            size * 2,
            tiles.ctypes.data,
            size // PAIRS,
            block.ctypes.data,
            soon_after(keys, start, end, then),
        )
        for head in range(heads):
            for i in range(column, min(column + TILE_ROWS, end)):
                scores[head, i] = block[i - start, head]


@inner
def _weigh(
    weights: Any, values: Any, first: int, end: int, then: int, tail: Any, pairs: Any, sums: Any, out: Any
) -> None:
    """out[h] = the sum of weights[h, c] · values[c] over the columns [first, end). tail, pairs and sums are room."""
    heads, size = out.shape
    rest = first + (end - first - 1) // COLUMNS * COLUMNS  # the last block: beyond its end, weights are 0
    start = min(rest, len(values) - COLUMNS)
    tail[:heads] = 0
    for head in range(heads):
        for column in range(rest, end):
            tail[head, column - start] = weights[head, column]
    for group in range(0, size, GROUP):
        _zero_sums()
        for column in range(first, rest, COLUMNS):
            _weigh_tile(
                weights.ctypes.data + column * 2,
                weights.shape[1] * 2,
                values[column].ctypes.data + group * 2,
                size * 2,
                pairs.ctypes.data,
                soon_after(values, column, end, then) + group * COLUMNS * 2,
            )
        soon = soon_after(values, start, end, then) + group * COLUMNS * 2
        place = values[start].ctypes.data + group * 2
        _weigh_tile(tail.ctypes.data, COLUMNS * 2, place, size * 2, pairs.ctypes.data, soon)
        _store_sums(sums.ctypes.data)
        for head in range(heads):
            for part in range(GROUP // PAIRS):
                for i in range(TILE_ROWS):
                    number = group + part * PAIRS + _LOWER_FOURS[i]
                    out[head, number] = sums[2 * part, head, i]
                    out[head, number + 4] = sums[2 * part + 1, head, i]


@threaded
def attend(pointer: Any) -> None:
    p = carray(pointer, 22)
    heads, size, scaling, widest = p[12] // p[13], p[14], f32(as_double(p[19])), widest_block(pointer)
    query, out = np.empty((heads, size), np.uint16), np.empty((heads, size), np.float32)
    scores, totals = np.empty((heads, widest), np.float32), np.empty(heads, np.float32)
    weights, tail = np.zeros((HEADS, widest), np.uint16), np.zeros((HEADS, COLUMNS), np.uint16)
    tiles = np.zeros((size // PAIRS, TILE_ROWS, PAIRS), np.uint16)
    block = aligned(TILE_ROWS * HEADS).reshape((TILE_ROWS, HEADS))
    pairs = aligned(4 * TILE_ROWS * 16)
    sums = aligned(4 * HEADS * 16).reshape((4, HEADS, 16))
    configure(p[21])
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        keys, values, first, last, then = open_task(pointer, task, query)
        _score(query, keys, first, last + 1, values[first].ctypes.data, tiles, block, scores)
        for head in range(heads):
            seen, own = scores[head, first : last + 1], weights[head, first : last + 1]
            totals[head] = softmax(seen, scaling, own)
        _weigh(weights, values, first, last + 1, then, tail, pairs, sums, out)
        close_task(pointer, task, out, totals)
    release()
