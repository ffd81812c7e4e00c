"""What the CPU kernels need below numba's own language: LLVM instructions on addresses and vectors.

Each function marked `intrinsic` is called from compiled code; its inner `codegen` writes the instructions.
numba's cache of the loops does not see a change in this file: touch those too.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
PAIRS = 2 * LANES  # bf16 numbers in a vector
VECTOR = ir.VectorType(ir.FloatType(), LANES)
LANE_NUMBERS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
initialize_native_asmparser()  # reads the one instruction that is written as text

# Places in two vectors, one after the other. In each eight of a vector, the lower four and the upper four:
LOWER_FOURS = [8 * eight + i for eight in range(4) for i in range(4)]
UPPER_FOURS = [place + 4 for place in LOWER_FOURS]
FIRST_HALF = [*range(4), *range(16, 20), *range(4, 8), *range(20, 24)]
SECOND_HALF = [place + 8 for place in FIRST_HALF]
INTERLEAVE_LOWER = [place + PAIRS * second for place in LOWER_FOURS for second in (0, 1)]
INTERLEAVE_UPPER = [place + 4 for place in INTERLEAVE_LOWER]


def compiles_for(feature: str) -> bool:
    """Whether numba compiles for a CPU that has this feature: the one at hand, unless it was told otherwise."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return f"+{feature}" in features.split(",")


HAS_BF16 = compiles_for("avx512bf16")


def _cast(function: Any, source: Any, target: Any) -> Any:
    """An intrinsic that is one LLVM instruction."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, function)(arguments[0], context.get_value_type(target))

        return target(source), codegen

    return cast


halves = _cast("inttoptr", types.int64, types.CPointer(types.uint16))
floats = _cast("inttoptr", types.int64, types.CPointer(types.float32))
longs = _cast("inttoptr", types.int64, types.CPointer(types.int64))
as_double = _cast("bitcast", types.int64, types.float64)
as_float = _cast("bitcast", types.uint32, types.float32)
as_bits = _cast("bitcast", types.float32, types.uint32)


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address that will soon be read; any address will do."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch_line(builder, arguments[0], cache=1)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def prefetch_line(builder: Any, address: Any, cache: int) -> None:
    """The same, in the middle of an intrinsic, into the first or the second level's cache."""
    line, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, line), number(0), number(4 - cache), number(1)])


@intrinsic
def largest(context: Any, numbers: Any, count: Any) -> Any:
    """The largest of `count` float32 numbers, a multiple of LANES that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, count = arguments
        most = cgutils.alloca_once_value(builder, _load_floats(builder, numbers, count.type(0)))
        with cgutils.for_range_slice(
            builder, count.type(LANES), count, count.type(LANES), intp=count.type
        ) as (i, _):
            pair = builder.load(most), _load_floats(builder, numbers, i)
            builder.store(_call(builder, "llvm.maxnum.v16f32", VECTOR, *pair), most)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), builder.load(most))

    return types.float32(numbers, count), codegen


@intrinsic
def score_block(context: Any, query: Any, keys: Any, scores: Any, size: Any, soon: Any, step: Any) -> Any:
    """scores[c] = query · keys[c] for LANES columns in bf16. size: a multiple of PAIRS.

    One vector of partial sums a column; they are added up across lanes only at the end. With each load of
    keys, the cache line at `soon` is asked for, `step` bytes further each time.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, keys, scores, size, soon, step = arguments
        sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(LANES)]
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(PAIRS), intp=size.type) as (d, _):
            q = _load_pairs(builder, query, d)
            for column, total in enumerate(sums):
                place = builder.add(builder.mul(size, size.type(column)), d)
                k = _load_pairs(builder, keys, place)
                _prefetch_after(builder, soon, step, d, column)
                builder.store(_dot_pairs(builder, builder.load(total), q, k), total)
        _store(builder, _sum_lanes(builder, [builder.load(total) for total in sums]), scores, size.type(0))
        return context.get_dummy_value()

    return types.void(query, keys, scores, size, soon, step), codegen


@intrinsic
def weigh_block(context: Any, weights: Any, values: Any, out: Any, size: Any, soon: Any, step: Any) -> Any:
    """out += the sum of weights[c] · values[c] over LANES columns in bf16. size: a multiple of PAIRS.

    Two columns at a time: their values are interleaved, which leaves each result in two vectors of which
    one holds the lower four of every eight numbers and the other the upper four. Prefetches as in score_block.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, values, out, size, soon, step = arguments
        spread = [_broadcast_pair(builder, weights, c) for c in range(0, LANES, 2)]
        with cgutils.for_range_slice(builder, size.type(0), size, size.type(PAIRS), intp=size.type) as (d, _):
            middle = builder.add(d, d.type(LANES))
            left, right = _load_floats(builder, out, d), _load_floats(builder, out, middle)
            sums = [shuffle(builder, left, right, places) for places in (LOWER_FOURS, UPPER_FOURS)]
            for number, pair in enumerate(spread):
                places = [builder.add(builder.mul(size, size.type(2 * number + i)), d) for i in (0, 1)]
                a, b = (load(builder, values, place, ir.IntType(16), PAIRS, 2) for place in places)
                for i in (0, 1):
                    _prefetch_after(builder, soon, step, d, 2 * number + i)
                for half, order in enumerate((INTERLEAVE_LOWER, INTERLEAVE_UPPER)):
                    v = builder.bitcast(shuffle(builder, a, b, order), LANE_NUMBERS)
                    sums[half] = _dot_pairs(builder, sums[half], pair, v)
            lower, upper = sums
            _store(builder, shuffle(builder, lower, upper, FIRST_HALF), out, d)
            _store(builder, shuffle(builder, lower, upper, SECOND_HALF), out, middle)
        return context.get_dummy_value()

    return types.void(weights, values, out, size, soon, step), codegen


def _prefetch_after(builder: Any, soon: Any, step: Any, d: Any, column: int) -> None:
    """The next line to ask for, one for each column of each PAIRS numbers."""
    number = builder.add(builder.lshr(d, d.type(1)), d.type(column))  # PAIRS numbers come with LANES columns
    prefetch_line(builder, builder.add(soon, builder.mul(number, step)), cache=1)


def _dot_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """sums[i] + a[2i] · b[2i] + a[2i + 1] · b[2i + 1], of bf16 numbers two by two: one instruction, or four."""
    if HAS_BF16:
        kind = ir.FunctionType(VECTOR, [VECTOR, LANE_NUMBERS, LANE_NUMBERS])
        return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, a, b], side_effect=False)
    sixteen = ir.Constant(LANE_NUMBERS, [16] * LANES)
    upper = ir.Constant(LANE_NUMBERS, [0xFFFF0000] * LANES)
    lower_halves = [builder.shl(x, sixteen) for x in (a, b)]
    upper_halves = [builder.and_(x, upper) for x in (a, b)]
    for halves in (lower_halves, upper_halves):
        left, right = (builder.bitcast(x, VECTOR) for x in halves)
        sums = _add(builder, _times(builder, left, right), sums)
    return sums


def _call(builder: Any, name: str, result: Any, *vectors: Any) -> Any:
    kind = ir.FunctionType(result, [VECTOR] * len(vectors))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, name), vectors, fastmath=["fast"]
    )


def exp_vector(builder: Any, x: Any) -> Any:
    """e^x of each lane, x held between -87 and 87: 2^n times a polynomial on the rest (Cephes' expf)."""
    x = _call(builder, "llvm.maxnum.v16f32", VECTOR, x, constant(-87.0))
    x = _call(builder, "llvm.minnum.v16f32", VECTOR, x, constant(87.0))
    n = _call(builder, "llvm.rint.v16f32", VECTOR, _times(builder, x, constant(1.44269504)))
    rest = _add(builder, x, _times(builder, n, constant(-0.693359375)))
    rest = _add(builder, rest, _times(builder, n, constant(2.12194440e-4)))
    total = constant(1.9875691500e-4)
    for factor in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
        1.0,
        1.0,
    ):
        total = _add(builder, _times(builder, total, rest), constant(factor))
    bias = ir.Constant(LANE_NUMBERS, [127] * LANES)
    power = builder.shl(
        builder.add(builder.fptosi(n, LANE_NUMBERS), bias), ir.Constant(LANE_NUMBERS, [23] * LANES)
    )
    return _times(builder, total, builder.bitcast(power, VECTOR))


def constant(number: float) -> Any:
    return ir.Constant(VECTOR, [number] * LANES)


def _times(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b, flags=["fast"])


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
            _add(builder, shuffle(builder, a, b, left), shuffle(builder, a, b, right))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        stride *= 2
    return vectors[0]


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of a and then of b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def load(builder: Any, address: Any, index: Any, element: Any, lanes: int, size: int) -> Any:
    """`lanes` elements of `size` bytes from address[index] on; one lane is a plain number."""
    place = builder.add(address, builder.mul(index, index.type(size)))
    kind = ir.VectorType(element, lanes) if lanes > 1 else element
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=size)


def _load_floats(builder: Any, address: Any, index: Any) -> Any:
    return load(builder, address, index, ir.FloatType(), LANES, 4)


def _load_pairs(builder: Any, address: Any, index: Any) -> Any:
    """PAIRS bf16 numbers, two in each lane."""
    return builder.bitcast(load(builder, address, index, ir.IntType(16), PAIRS, 2), LANE_NUMBERS)


def _store(builder: Any, vector: Any, address: Any, index: Any) -> None:
    place = builder.add(address, builder.mul(index, index.type(4)))
    builder.store(vector, builder.inttoptr(place, VECTOR.as_pointer()), align=4)


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=["fast"])


def _broadcast_pair(builder: Any, address: Any, index: int) -> Any:
    """Two bf16 numbers in every lane."""
    pair = load(builder, address, address.type(index // 2), ir.IntType(32), 1, 4)
    vector = builder.insert_element(ir.Constant(LANE_NUMBERS, ir.Undefined), pair, ir.IntType(32)(0))
    return shuffle(builder, vector, vector, [0] * LANES)
