"""What the CPU kernels need below numba's own language: LLVM instructions on addresses and vectors.

Each function marked `intrinsic` is called from compiled code; its inner `codegen` writes the instructions.
numba's cache of cpu_loops.py does not see a change in this file: touch that one too.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
VECTOR = ir.VectorType(ir.FloatType(), LANES)
LANE_NUMBERS = ir.VectorType(ir.IntType(32), LANES)


def _cast(function: Any, source: Any, target: Any) -> Any:
    """An intrinsic that is one LLVM instruction."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, function)(arguments[0], context.get_value_type(target))

        return target(source), codegen

    return cast


halves = _cast("inttoptr", types.int64, types.CPointer(types.uint16))
longs = _cast("inttoptr", types.int64, types.CPointer(types.int64))
as_double = _cast("bitcast", types.int64, types.float64)
as_float = _cast("bitcast", types.uint32, types.float32)
as_bits = _cast("bitcast", types.float32, types.uint32)


@intrinsic
def next_task(context: Any, pointer: Any) -> Any:
    """The counter before it is raised by one, whichever thread asks."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), codegen


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address that will soon be read; any address will do."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], line), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def score_block(context: Any, query: Any, keys: Any, scores: Any, size: Any) -> Any:
    """scores[c] = query · keys[c] for LANES columns. size: a multiple of LANES.

    One vector of partial sums a column; they are added up across lanes only at the end.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, scores, size = arguments
        sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(LANES)]
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(LANES), intp=size.type) as (d, _):
            q = _load_floats(builder, query, d)
            for column, total in enumerate(sums):
                place = builder.add(builder.mul(size, size.type(column)), d)
                k = _load_halves(builder, keys, place)
                builder.store(_multiply_add(builder, q, k, builder.load(total)), total)
        _store(builder, _sum_lanes(builder, [builder.load(total) for total in sums]), scores, size.type(0))
        return context.get_dummy_value()

    return types.void(query, keys, scores, size), codegen


@intrinsic
def weigh_block(context: Any, weights: Any, values: Any, out: Any, size: Any) -> Any:
    """out += the sum of weights[c] · values[c] over LANES columns. size: a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, out, size = arguments
        spread = [_broadcast(builder, weights, c) for c in range(LANES)]
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(LANES), intp=size.type) as (d, _):
            sums = [_load_floats(builder, out, d), *[ir.Constant(VECTOR, [0.0] * LANES)] * 3]
            for column, weight in enumerate(spread):
                place = builder.add(builder.mul(size, size.type(column)), d)
                v = _load_halves(builder, values, place)
                sums[column % 4] = _multiply_add(builder, weight, v, sums[column % 4])
            total = _add(builder, _add(builder, sums[0], sums[1]), _add(builder, sums[2], sums[3]))
            _store(builder, total, out, d)
        return context.get_dummy_value()

    return types.void(weights, values, out, size), codegen


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """LANES vectors to one: its lane i is the sum of vector i's lanes.

    Pairs become one, which holds the first's sums over two lanes in its even places and the second's in its
    odd ones; then over four lanes, and so on.
    """
    stride = 1
    while len(vectors) > 1:
        left = [i + (LANES - stride if i & stride else 0) for i in range(LANES)]
        right = [i + (LANES if i & stride else stride) for i in range(LANES)]
        vectors = [
            _add(builder, _shuffle(builder, a, b, left), _shuffle(builder, a, b, right))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        stride *= 2
    return vectors[0]


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of a and, from LANES on, of b."""
    return builder.shuffle_vector(a, b, ir.Constant(LANE_NUMBERS, lanes))


def _load(builder: Any, address: Any, index: Any, element: Any, lanes: int, size: int) -> Any:
    """`lanes` elements of `size` bytes from address[index] on; one lane is a plain number."""
    place = builder.add(address, builder.mul(index, index.type(size)))
    kind = ir.VectorType(element, lanes) if lanes > 1 else element
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=size)


def _load_floats(builder: Any, address: Any, index: Any) -> Any:
    return _load(builder, address, index, ir.FloatType(), LANES, 4)


def _load_halves(builder: Any, address: Any, index: Any) -> Any:
    """LANES bf16 numbers as float32."""
    upper = builder.zext(_load(builder, address, index, ir.IntType(16), LANES, 2), LANE_NUMBERS)
    return builder.bitcast(builder.shl(upper, ir.Constant(LANE_NUMBERS, [16] * LANES)), VECTOR)


def _store(builder: Any, vector: Any, address: Any, index: Any) -> None:
    place = builder.add(address, builder.mul(index, index.type(4)))
    builder.store(vector, builder.inttoptr(place, VECTOR.as_pointer()), align=4)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _add(builder, builder.fmul(a, b, flags=["fast"]), c)


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=["fast"])


def _broadcast(builder: Any, address: Any, index: int) -> Any:
    number = _load(builder, address, address.type(index), ir.FloatType(), 1, 4)
    vector = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return _shuffle(builder, vector, vector, [0] * LANES)
