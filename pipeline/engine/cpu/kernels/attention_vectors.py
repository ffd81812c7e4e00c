"""Write attention's inner loops in LLVM's vectors: scores, exponentials, weighted sums, rotation.

Written out, because LLVM's own vectoriser finds neither the instruction for bf16 nor where to prefetch.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.precision import in_floats
from pipeline.engine.cpu.kernels.vectors import (
    LANE_NUMBERS,
    LANES,
    PAIRS,
    VECTOR,
    add,
    broadcast_pair,
    call,
    constant,
    dot_pairs,
    exp_vector,
    for_each_count,
    load,
    load_floats,
    load_halves,
    load_pairs,
    prefetch_line,
    shuffle,
    spread,
    stepwise,
    store,
    store_halves,
    sum_lanes,
    times,
)

HEADS = 4  # that are weighed together at most

# Places in two vectors, one after the other. Interleaved, and of that the lower and the upper four of each eight:
INTERLEAVE_LOWER = [
    8 * eight + i + PAIRS * second for eight in range(4) for i in range(4) for second in (0, 1)
]
INTERLEAVE_UPPER = [place + 4 for place in INTERLEAVE_LOWER]
# Back: of the lower and the upper fours, the first and the last sixteen.
FIRST_HALF = [*range(4), *range(16, 20), *range(4, 8), *range(20, 24)]
SECOND_HALF = [place + 8 for place in FIRST_HALF]


@intrinsic
def largest(context: Any, numbers: Any, count: Any) -> Any:
    """Find the largest of `count` float32 numbers, a multiple of LANES that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, count = arguments
        most = cgutils.alloca_once_value(builder, load_floats(builder, numbers, count.type(0)))
        with stepwise(builder, count, LANES) as i:
            pair = builder.load(most), load_floats(builder, numbers, i)
            builder.store(call(builder, "llvm.maxnum.v16f32", VECTOR, *pair), most)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), builder.load(most))

    return types.float32(numbers, count), codegen


@intrinsic
def exponentials(
    context: Any, kind: Any, scores: Any, most: Any, scaling: Any, weights: Any, count: Any
) -> Any:
    """Write weights = e^((scores − most) · scaling); return their sum, unrounded.

    Args:
        kind: an array that holds what weights do.
        scores, weights: addresses of `count` numbers, a multiple of LANES; scores in float32.
        most: not below any score.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _exponentials(builder, store if in_floats(kind) else store_halves, *arguments[1:])

    return types.float32(kind, scores, types.float32, types.float32, weights, count), codegen


def _exponentials(
    builder: Any, store_weight: Any, scores: Any, most: Any, scaling: Any, weights: Any, count: Any
) -> Any:
    """Write its instructions."""
    most, scaling = spread(builder, most), spread(builder, scaling)
    total = cgutils.alloca_once_value(builder, constant(0.0))
    with stepwise(builder, count, LANES) as i:
        x = builder.fsub(load_floats(builder, scores, i), most, flags=["fast"])
        weight = exp_vector(builder, times(builder, x, scaling))
        builder.store(add(builder, builder.load(total), weight), total)
        store_weight(builder, weight, weights, i)
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), VECTOR])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(function, [ir.FloatType()(0.0), builder.load(total)], fastmath=["fast"])


@intrinsic
def rotate(context: Any, kind: Any, states: Any, cos: Any, sin: Any, out: Any, half: Any) -> Any:
    """Rotate one head. kind: an array that holds what it does; half: of its size, a multiple of LANES."""
    read, write = (load_floats, store) if in_floats(kind) else (load_halves, store_halves)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, states, cos, sin, out, half = arguments
        with stepwise(builder, half, LANES) as d:
            right = builder.add(d, half)
            a, b = read(builder, states, d), read(builder, states, right)
            c, s = read(builder, cos, d), read(builder, sin, d)
            left = builder.fsub(times(builder, a, c), times(builder, b, s), flags=["fast"])
            write(builder, left, out, d)
            write(builder, add(builder, times(builder, b, c), times(builder, a, s)), out, right)
        return context.get_dummy_value()

    return types.void(kind, states, cos, sin, out, half), codegen


@intrinsic
def score_block(context: Any, query: Any, keys: Any, scores: Any, size: Any, soon: Any, step: Any) -> Any:
    """Write scores[c] = query · keys[c] for LANES columns in bf16. size: a multiple of PAIRS.

    One vector of partial sums a column; they are added up across lanes only at the end. With each load of
    keys, the cache line at `soon` is asked for, `step` bytes further each time.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, scores, size, soon, step = arguments
        sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(LANES)]
        with stepwise(builder, size, PAIRS) as d:
            q = load_pairs(builder, query, d)
            for column, total in enumerate(sums):
                place = builder.add(builder.mul(size, size.type(column)), d)
                k = load_pairs(builder, keys, place)
                _prefetch_after(builder, soon, step, d, column)
                builder.store(dot_pairs(builder, builder.load(total), q, k), total)
        store(builder, sum_lanes(builder, [builder.load(total) for total in sums]), scores, size.type(0))
        return context.get_dummy_value()

    return types.void(query, keys, scores, size, soon, step), codegen


@intrinsic
def weigh_block(
    context: Any,
    kind: Any,
    heads: Any,
    weights: Any,
    width: Any,
    values: Any,
    out: Any,
    size: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Add the sum of weights[h, c] · values[c] over LANES columns in bf16 to out[h], for 1 to HEADS heads.

    Two columns at a time: their values are interleaved, once for all heads, which leaves each result in two
    vectors of which one holds the lower four of every eight numbers and the other the upper four:
    `in_order` mends that. Prefetches as in score_block.

    Args:
        width: bytes from one head's weights to the next.
        size: a multiple of PAIRS.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, heads, *rest = arguments
        for_each_count(builder, heads, HEADS, lambda count: _weigh(builder, count, rest))
        return context.get_dummy_value()

    return types.void(kind, heads, weights, width, values, out, size, soon, step), codegen


def _weigh(builder: Any, heads: int, arguments: list[Any]) -> None:
    """Write `weigh_block` for one number of heads: sums stay in registers only if it is known."""
    weights, width, values, out, size, soon, step = arguments

    def number(count: int) -> Any:
        return size.type(count)

    with stepwise(builder, size, PAIRS) as d:
        places = [builder.add(d, builder.mul(size, number(head))) for head in range(heads)]
        halves = [[place, builder.add(place, number(LANES))] for place in places]
        sums = [[load_floats(builder, out, half) for half in both] for both in halves]
        for c in range(0, LANES, 2):
            lines = [builder.add(builder.mul(size, number(c + i)), d) for i in (0, 1)]
            a, b = (load(builder, values, line, ir.IntType(16), PAIRS, 2) for line in lines)
            orders = INTERLEAVE_LOWER, INTERLEAVE_UPPER
            pairs = [builder.bitcast(shuffle(builder, a, b, order), LANE_NUMBERS) for order in orders]
            for i in (0, 1):
                _prefetch_after(builder, soon, step, d, c + i)
            for head, both in enumerate(sums):
                own = builder.add(weights, builder.mul(width, number(head)))
                weight = broadcast_pair(builder, own, c)
                both[:] = [dot_pairs(builder, s, weight, p) for s, p in zip(both, pairs, strict=True)]
        for both, vectors in zip(halves, sums, strict=True):
            for half, vector in zip(both, vectors, strict=True):
                store(builder, vector, out, half)


@intrinsic
def in_order(context: Any, kind: Any, out: Any, size: Any) -> Any:
    """Put what `weigh_block` has left in `out`, `size` float32 numbers, in their order."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, out, size = arguments
        with stepwise(builder, size, PAIRS) as d:
            middle = builder.add(d, d.type(LANES))
            lower, upper = load_floats(builder, out, d), load_floats(builder, out, middle)
            store(builder, shuffle(builder, lower, upper, FIRST_HALF), out, d)
            store(builder, shuffle(builder, lower, upper, SECOND_HALF), out, middle)
        return context.get_dummy_value()

    return types.void(kind, out, size), codegen


def _prefetch_after(builder: Any, soon: Any, step: Any, d: Any, column: int) -> None:
    """Ask for the next line: one for each column of each PAIRS numbers."""
    number = builder.add(builder.lshr(d, d.type(1)), d.type(column))  # PAIRS numbers come with LANES columns
    prefetch_line(builder, builder.add(soon, builder.mul(number, step)), cache=1)
