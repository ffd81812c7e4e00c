"""Write a decode step's inner loops of attention in float32, for what is in it and for vectors that have no bf16.

A run of numbers is two registers. In bf16 it is widened once for all heads: to the numbers in even places and to those
in odd ones. So queries, and what values are added up to, have each run in that order.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.loops import copy
from pipeline.engine.cpu.kernels.precision import either, in_floats, inner, wide
from pipeline.engine.cpu.kernels.vectors import (
    LANES,
    PAIRS,
    REGISTER_LANES,
    add,
    for_each_count,
    halves_of_pairs,
    load,
    prefetch_line,
    shuffle,
    spread,
    stepwise,
    sum_lanes,
    times,
)

HEADS = 4  # that are computed together at most
RUN = 2 * REGISTER_LANES
COLUMNS = {1: 8, 2: 4, 3: 4, 4: 2}  # whose sums are in registers at once, for so many heads

_WORDS = ir.VectorType(ir.IntType(32), REGISTER_LANES)
_FLOATS = ir.VectorType(ir.FloatType(), REGISTER_LANES)


@inner
def _halves_in_runs(query: Any, widened: Any) -> None:
    """Widen one head's query, and order it as `score_heads` takes it."""
    for start in range(0, len(query), RUN):
        for i in range(RUN // 2):
            widened[start + i] = wide(query[start + 2 * i])
            widened[start + RUN // 2 + i] = wide(query[start + 2 * i + 1])


in_runs = either(_halves_in_runs, copy)  # in float32 a run is in its own order


@intrinsic
def score_heads(
    context: Any,
    kind: Any,
    heads: Any,
    queries: Any,
    query_bytes: Any,
    keys: Any,
    scores: Any,
    score_bytes: Any,
    size: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Write scores[h, c] = queries[h] · keys[c] for LANES columns, for 1 to HEADS heads.

    With each line of a key, the cache line at `soon` is asked for, `step` bytes further each time.

    Args:
        kind: an array that holds what keys do.
        queries: address of float32 numbers in order of runs.
        query_bytes, score_bytes: from one head to the next.
        size: a multiple of PAIRS.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, heads, *rest = arguments
        for_each_count(builder, heads, HEADS, lambda count: _score(builder, in_floats(kind), count, *rest))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 9), codegen


def _score(
    builder: Any,
    floats: bool,
    heads: int,
    queries: Any,
    query_bytes: Any,
    keys: Any,
    scores: Any,
    score_bytes: Any,
    size: Any,
    soon: Any,
    step: Any,
) -> None:
    """Write `score_heads` for one number of heads, some columns at a time."""
    number, together = size.type, COLUMNS[heads]
    own = [builder.add(queries, builder.mul(query_bytes, number(head))) for head in range(heads)]
    with stepwise(builder, number(LANES), together) as column:
        sums = [
            [_sum(builder, ir.Constant(_FLOATS, [0.0] * REGISTER_LANES)) for _ in range(together)]
            for _ in own
        ]
        lines = [builder.mul(builder.add(column, number(c)), size) for c in range(together)]
        with stepwise(builder, size, RUN) as d:
            for c, line in enumerate(lines):
                _ask(builder, floats, soon, step, builder.add(line, d))
                key = _run(builder, floats, keys, builder.add(line, d))
                for query, totals in zip(own, sums, strict=True):
                    for half in range(2):
                        place = builder.add(d, number(half * REGISTER_LANES))
                        q = load(builder, query, place, ir.FloatType(), REGISTER_LANES, 4)
                        _add_product(builder, totals[c], q, key[half])
        for head, totals in enumerate(sums):
            line = builder.add(scores, builder.mul(score_bytes, number(head)))
            place = builder.add(line, builder.mul(column, number(4)))
            vector = sum_lanes(builder, [builder.load(total) for total in totals])
            builder.store(vector, builder.inttoptr(place, vector.type.as_pointer()), align=4)


@intrinsic
def weigh_heads(
    context: Any,
    kind: Any,
    heads: Any,
    weights: Any,
    weight_bytes: Any,
    values: Any,
    out: Any,
    size: Any,
    soon: Any,
    step: Any,
) -> Any:
    """Add the sum of weights[h, c] · values[c] over LANES columns to out[h], in order of runs, for 1 to HEADS heads.

    Prefetches as in score_heads.

    Args:
        kind: an array that holds what values do.
        weights: address of float32 numbers, `weight_bytes` from one head to the next.
        size: a multiple of PAIRS.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, heads, *rest = arguments
        for_each_count(builder, heads, HEADS, lambda count: _weigh(builder, in_floats(kind), count, *rest))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8), codegen


def _weigh(
    builder: Any,
    floats: bool,
    heads: int,
    weights: Any,
    weight_bytes: Any,
    values: Any,
    out: Any,
    size: Any,
    soon: Any,
    step: Any,
) -> None:
    """Write `weigh_heads` for one number of heads, a run of all columns at a time."""
    number = size.type
    own = [builder.add(weights, builder.mul(weight_bytes, number(head))) for head in range(heads)]
    with stepwise(builder, size, RUN) as d:
        ends = [
            builder.add(out, builder.mul(builder.add(builder.mul(size, number(head)), d), number(4)))
            for head in range(heads)
        ]
        places = [[builder.add(end, number(half * REGISTER_LANES * 4)) for half in range(2)] for end in ends]
        pointers = [[builder.inttoptr(p, _FLOATS.as_pointer()) for p in both] for both in places]
        sums = [[_sum(builder, builder.load(pointer, align=4)) for pointer in both] for both in pointers]
        with stepwise(builder, number(LANES), 1) as column:
            place = builder.add(builder.mul(column, size), d)
            _ask(builder, floats, soon, step, place)
            value = _run(builder, floats, values, place)
            for head, both in zip(own, sums, strict=True):
                weight = load(builder, head, column, ir.FloatType(), 1, 4)
                everywhere = spread(builder, weight, REGISTER_LANES)
                for total, half in zip(both, value, strict=True):
                    _add_product(builder, total, everywhere, half)
        for totals, both in zip(sums, pointers, strict=True):
            for total, pointer in zip(totals, both, strict=True):
                builder.store(builder.load(total), pointer, align=4)


@intrinsic
def runs_in_order(context: Any, kind: Any, out: Any, size: Any) -> Any:
    """Put what `weigh_heads` has left in `out`, `size` float32 numbers, in their order."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, out, size = arguments
        if not in_floats(kind):
            with stepwise(builder, size, RUN) as d:
                _put_run_in_order(builder, out, d)
        return context.get_dummy_value()

    return types.void(kind, out, size), codegen


def _put_run_in_order(builder: Any, out: Any, d: Any) -> None:
    middle = builder.add(d, d.type(REGISTER_LANES))
    even, odd = (load(builder, out, place, ir.FloatType(), REGISTER_LANES, 4) for place in (d, middle))
    turns = [n + half * REGISTER_LANES for n in range(REGISTER_LANES) for half in range(2)]
    vector = shuffle(builder, even, odd, turns)
    place = builder.add(out, builder.mul(d, d.type(4)))
    builder.store(vector, builder.inttoptr(place, vector.type.as_pointer()), align=4)


def _ask(builder: Any, floats: bool, soon: Any, step: Any, place: Any) -> None:
    """Ask for the next line: `step` bytes for each line's numbers."""
    numbers = LANES if floats else PAIRS
    line = builder.lshr(place, place.type(numbers.bit_length() - 1))
    prefetch_line(builder, builder.add(soon, builder.mul(line, step)), cache=1)


def _run(builder: Any, floats: bool, states: Any, place: Any) -> list[Any]:
    """Load a run as two registers of float32: in bf16 those in even places, and those in odd ones."""
    if floats:
        middle = builder.add(place, place.type(REGISTER_LANES))
        return [load(builder, states, d, ir.FloatType(), REGISTER_LANES, 4) for d in (place, middle)]
    words = builder.bitcast(load(builder, states, place, ir.IntType(16), RUN, 2), _WORDS)
    return halves_of_pairs(builder, words)


def _sum(builder: Any, first: Any) -> Any:
    """Begin a sum at this place."""
    total = cgutils.alloca_once(builder, first.type)
    builder.store(first, total)
    return total


def _add_product(builder: Any, total: Any, a: Any, b: Any) -> None:
    builder.store(add(builder, builder.load(total), times(builder, a, b)), total)
