"""Finish a product: from sums in float32 over bias and silu(gate) · up to an output."""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, TILE_ROWS
from pipeline.engine.cpu.kernels.precision import held, in_floats, inner, wide
from pipeline.engine.cpu.kernels.vectors import (
    HAS_BF16,
    LANES,
    PAIRS,
    VECTOR,
    constant,
    exp_vector,
    floats,
    narrowed,
    store_halves,
    widened,
)
from pipeline.engine.cpu.kernels.vectors import store as store_floats

_NUMBER = ir.IntType(64)


@inner
def store(
    kind: Any, sums: int, rows: int, scales: int, bias: int, output: int, stride: int, gated: int
) -> None:
    """Store the sums of a strip at their place in the output.

    Args:
        kind: a pointer to what bias and output hold.
        sums: address of [rows, 32] float32.
        scales: address of the strip's 32 numbers in float32, or 0.
        bias: address of its 32 numbers, or 0.
        output: address of the first row, `stride` bytes before the second.
        gated: not 0: 16 gates and 16 ups are silu(gate) · up, 16 outputs.
    """
    numbers = carray(floats(sums), (rows, BLOCK))
    if scales:
        factors = carray(floats(scales), BLOCK)
        for row in range(rows):
            for d in range(BLOCK):
                numbers[row, d] *= factors[d]
    if bias:
        offsets = carray(held(kind, bias), BLOCK)
        for row in range(rows):
            for d in range(BLOCK):
                numbers[row, d] += wide(offsets[d])
    if gated:
        _store_gated(kind, sums, rows, output, stride)
    else:
        _store_plain(kind, sums, rows, output, stride)


@intrinsic
def _store_plain(context: Any, kind: Any, sums: Any, rows: Any, output: Any, stride: Any) -> Any:
    """Store two vectors of sums as the 32 outputs of a row."""
    write, _ = _ways(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(16), PAIRS)
        narrow = ir.FunctionType(line, [VECTOR, VECTOR])
        for left, right, place in _each_row(builder, arguments[1:]):
            if in_floats(kind) or not HAS_BF16:
                write(builder, left, place, _NUMBER(0))
                write(builder, right, place, _NUMBER(LANES))
                continue
            both = builder.asm(
                narrow, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [right, left], side_effect=False
            )
            builder.store(both, builder.inttoptr(place, line.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(kind, sums, rows, output, stride), codegen


@intrinsic
def _store_gated(context: Any, kind: Any, sums: Any, rows: Any, output: Any, stride: Any) -> Any:
    """Store silu(gate) · up, 16 outputs; in bf16 all three rounded, as they are between torch's operators."""
    write, cut = _ways(kind)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for gate, up, place in _each_row(builder, arguments[1:]):
            gate, up = (cut(builder, x) for x in (gate, up))
            exponential = exp_vector(builder, builder.fneg(gate))
            silu = builder.fdiv(gate, builder.fadd(exponential, constant(1.0)), flags=["fast"])
            write(builder, builder.fmul(cut(builder, silu), up), place, _NUMBER(0))
        return context.get_dummy_value()

    return types.void(kind, sums, rows, output, stride), codegen


def _ways(kind: Any) -> Any:
    """Return how a vector of float32 is stored in this precision, and how it is rounded to it before that."""
    return (store_floats, lambda builder, numbers: numbers) if in_floats(kind) else (store_halves, _rounded)


def _each_row(builder: Any, arguments: Any) -> Any:
    """Write a loop over rows: yield a row's two vectors of sums and its place in the output, once."""
    sums, rows, output, stride = arguments
    with cgutils.for_range(builder, rows, intp=_NUMBER) as loop:
        left = builder.add(sums, builder.mul(loop.index, _NUMBER(BLOCK * 4)))
        right = builder.add(left, _NUMBER(TILE_ROWS * 4))
        vectors = (builder.load(builder.inttoptr(h, VECTOR.as_pointer()), align=4) for h in (left, right))
        yield *vectors, builder.add(output, builder.mul(loop.index, stride))


def _rounded(builder: Any, numbers: Any) -> Any:
    """Round to what bf16 holds, and stay in float32."""
    return widened(builder, narrowed(builder, numbers))
