"""Write LLVM instructions on addresses and vectors, where numba's own language does not reach.

Each function marked `intrinsic` is called from compiled code; its inner `codegen` writes the instructions.
A vector has 16 lanes on any CPU; where its registers are shorter, LLVM takes several.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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


def compiles_for(feature: str) -> bool:
    """Say whether numba compiles for a CPU that has this feature: the one at hand, unless told otherwise."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return f"+{feature}" in features.split(",")


HAS_AVX2 = compiles_for("avx2") and compiles_for("fma")  # some virtual machines hide the latter
HAS_AVX512, HAS_BF16 = compiles_for("avx512bw"), compiles_for("avx512bf16")
REGISTERS = 1 if HAS_AVX512 else 2  # that a vector takes
REGISTER_LANES = LANES // REGISTERS
ROWS = 12 if HAS_AVX512 else 6  # of a product, whose sums leave room for the rest in the registers


def _cast(function: Any, source: Any, target: Any) -> Any:
    """Make an intrinsic of one LLVM instruction."""

    @intrinsic
    def cast(context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, function)(arguments[0], context.get_value_type(target))

        return target(source), codegen

    return cast


halves = _cast("inttoptr", types.int64, types.CPointer(types.uint16))
words = _cast("inttoptr", types.int64, types.CPointer(types.uint32))
floats = _cast("inttoptr", types.int64, types.CPointer(types.float32))
longs = _cast("inttoptr", types.int64, types.CPointer(types.int64))
as_double = _cast("bitcast", types.int64, types.float64)
as_float = _cast("bitcast", types.uint32, types.float32)
as_bits = _cast("bitcast", types.float32, types.uint32)


def prefetch_line(builder: Any, address: Any, cache: int) -> None:
    """Ask for the cache line at an address that will soon be read, into the first or second level's cache.

    Any address will do: one that is not mapped is passed over, so that none needs a check.
    """
    line, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, line), number(0), number(4 - cache), number(1)])


@contextmanager
def stepwise(builder: Any, end: Any, width: int) -> Iterator[Any]:
    """Write a loop over 0, width, 2 · width … below `end`: the instructions within get the index."""
    first, step = end.type(0), end.type(width)
    with cgutils.for_range_slice(builder, first, end, step, intp=end.type) as (index, _):
        yield index


def spread(builder: Any, number: Any, lanes: int = LANES) -> Any:
    """Put a number of 32 bits in every lane."""
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    vector = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return shuffle(builder, vector, vector, [0] * lanes)


def for_each_count(builder: Any, number: Any, most: int, write: Any) -> None:
    """Write instructions for each count from 1 to `most`, as `write(count)` does; `number` chooses."""
    end = builder.append_basic_block()
    choice = builder.switch(number, end)
    for count in range(1, most + 1):
        case = builder.append_basic_block()
        choice.add_case(number.type(count), case)
        builder.position_at_end(case)
        write(count)
        builder.branch(end)
    builder.position_at_end(end)


def dot_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add a[2i] · b[2i] + a[2i + 1] · b[2i + 1] to sums[i], in bf16, where vectors have it."""
    kind = ir.FunctionType(VECTOR, [VECTOR, LANE_NUMBERS, LANE_NUMBERS])
    return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, a, b], side_effect=False)


def halves_of_pairs(builder: Any, pairs: Any) -> list[Any]:
    """Widen bf16 pairs to float32: each lane's first number, and its second."""
    kind = pairs.type
    first = builder.shl(pairs, ir.Constant(kind, [16] * kind.count))
    second = builder.and_(pairs, ir.Constant(kind, [0xFFFF0000] * kind.count))
    return [builder.bitcast(x, ir.VectorType(ir.FloatType(), kind.count)) for x in (first, second)]


def call(builder: Any, name: str, result: Any, *vectors: Any) -> Any:
    """Call one of LLVM's own functions on vectors."""
    kind = ir.FunctionType(result, [VECTOR] * len(vectors))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, name), vectors, fastmath=["fast"]
    )


def exp_vector(builder: Any, x: Any) -> Any:
    """Compute e^x of each lane, x held between -87 and 87: 2^n times a polynomial on the rest (Cephes' expf)."""
    x = call(builder, "llvm.maxnum.v16f32", VECTOR, x, constant(-87.0))
    x = call(builder, "llvm.minnum.v16f32", VECTOR, x, constant(87.0))
    n = call(builder, "llvm.rint.v16f32", VECTOR, times(builder, x, constant(1.44269504)))
    rest = add(builder, x, times(builder, n, constant(-0.693359375)))
    rest = add(builder, rest, times(builder, n, constant(2.12194440e-4)))
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
        total = add(builder, times(builder, total, rest), constant(factor))
    bias = ir.Constant(LANE_NUMBERS, [127] * LANES)
    power = builder.shl(
        builder.add(builder.fptosi(n, LANE_NUMBERS), bias), ir.Constant(LANE_NUMBERS, [23] * LANES)
    )
    return times(builder, total, builder.bitcast(power, VECTOR))


def constant(number: float) -> Any:
    return ir.Constant(VECTOR, [number] * LANES)


def times(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b, flags=["fast"])


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Pick lanes: those of a are numbered first, then those of b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Sum vectors to one of as many lanes, at most their own, whose lane i is the sum of vector i's lanes.

    Two become one, which holds the first's sums over two lanes in its even places and the second's in its odd ones;
    then over four lanes, and so on; at last the vector is folded.
    """
    count, stride, lanes = len(vectors), 1, vectors[0].type.count
    while len(vectors) > 1:
        left = [i + (lanes if i & stride else 0) for i in range(lanes)]  # in their own places
        right = [(i ^ stride) + (lanes if i & stride else 0) for i in range(lanes)]
        vectors = [
            add(builder, shuffle(builder, a, b, left), shuffle(builder, a, b, right))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        stride *= 2
    (vector,) = vectors
    while lanes > count:
        lanes //= 2
        halves = (shuffle(builder, vector, vector, [n + i for i in range(lanes)]) for n in (0, lanes))
        vector = add(builder, *halves)
    return vector


def load(builder: Any, address: Any, index: Any, element: Any, lanes: int, size: int) -> Any:
    """Load `lanes` elements of `size` bytes from address[index] on; one lane is a plain number."""
    place = builder.add(address, builder.mul(index, index.type(size)))
    kind = ir.VectorType(element, lanes) if lanes > 1 else element
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=size)


def load_floats(builder: Any, address: Any, index: Any) -> Any:
    return load(builder, address, index, ir.FloatType(), LANES, 4)


def load_pairs(builder: Any, address: Any, index: Any) -> Any:
    """Load PAIRS bf16 numbers, two in each lane."""
    return builder.bitcast(load(builder, address, index, ir.IntType(16), PAIRS, 2), LANE_NUMBERS)


def load_halves(builder: Any, address: Any, index: Any) -> Any:
    """Load LANES bf16 numbers as float32."""
    return widened(builder, load(builder, address, index, ir.IntType(16), LANES, 2))


def widened(builder: Any, numbers: Any) -> Any:
    """Widen bf16 to float32."""
    sixteen = ir.Constant(LANE_NUMBERS, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(numbers, LANE_NUMBERS), sixteen), VECTOR)


def narrowed(builder: Any, numbers: Any) -> Any:
    """Round float32 to bf16, to the nearest, ties to even: by one instruction, or by six."""
    if HAS_BF16:
        kind = ir.FunctionType(HALVES, [VECTOR])
        return builder.asm(kind, "vcvtneps2bf16 $1, $0", "=v,v", [numbers], side_effect=False)
    sixteen, half, one = (ir.Constant(LANE_NUMBERS, [n] * LANES) for n in (16, 0x7FFF, 1))
    bits = builder.bitcast(numbers, LANE_NUMBERS)
    odd = builder.and_(builder.lshr(bits, sixteen), one)
    return builder.trunc(builder.lshr(builder.add(builder.add(bits, half), odd), sixteen), HALVES)


def store_halves(builder: Any, vector: Any, address: Any, index: Any) -> None:
    """Store float32 as bf16."""
    place = builder.add(address, builder.mul(index, index.type(2)))
    builder.store(narrowed(builder, vector), builder.inttoptr(place, HALVES.as_pointer()), align=2)


def store(builder: Any, vector: Any, address: Any, index: Any) -> None:
    place = builder.add(address, builder.mul(index, index.type(4)))
    builder.store(vector, builder.inttoptr(place, VECTOR.as_pointer()), align=4)


def add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=["fast"])


def broadcast_pair(builder: Any, address: Any, index: int) -> Any:
    """Load two bf16 numbers into every lane."""
    return spread(builder, load(builder, address, address.type(index // 2), ir.IntType(32), 1, 4))
