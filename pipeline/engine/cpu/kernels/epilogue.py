"""Finish a product: from sums in float32 over bias and silu(gate) · up to an output in bf16."""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engine.cpu.kernels.blocks import BLOCK, TILE_ROWS
from pipeline.engine.cpu.kernels.loops import inner, wide
from pipeline.engine.cpu.kernels.vectors import (
    HAS_BF16,
    LANES,
    PAIRS,
    VECTOR,
    constant,
    exp_vector,
    floats,
    halves,
    narrowed,
    store_halves,
    widened,
)

_NUMBER = ir.IntType(64)


@inner
def store(sums: int, rows: int, scales: int, bias: int, output: int, stride: int, gated: int) -> None:
    """Store the sums of a strip at their place in the output, in bf16.

    Args:
        sums: address of [rows, 32] float32.
        scales: address of the strip's 32 numbers in float32, or 0.
        bias: address of its 32 numbers in bf16, or 0.
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
        offsets = carray(halves(bias), BLOCK)
        for row in range(rows):
            for d in range(BLOCK):
                numbers[row, d] += wide(offsets[d])
    if gated:
        _store_gated(sums, rows, output, stride)
    else:
        _store_plain(sums, rows, output, stride)


@intrinsic
def _store_plain(context: Any, sums: Any, rows: Any, output: Any, stride: Any) -> Any:
    """Round two vectors of sums to the 32 outputs of a row."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(16), PAIRS)
        kind = ir.FunctionType(line, [VECTOR, VECTOR])
        for left, right, place in _each_row(builder, arguments):
            if not HAS_BF16:
                store_halves(builder, left, place, _NUMBER(0))
                store_halves(builder, right, place, _NUMBER(LANES))
                continue
            both = builder.asm(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [right, left], side_effect=False)
            builder.store(both, builder.inttoptr(place, line.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, rows, output, stride), codegen


@intrinsic
def _store_gated(context: Any, sums: Any, rows: Any, output: Any, stride: Any) -> Any:
    """Round gate, up and the silu to bf16, as they are between torch's operators, and store 16 outputs."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for gate, up, place in _each_row(builder, arguments):
            gate, up = (_rounded(builder, x) for x in (gate, up))
            exponential = exp_vector(builder, builder.fneg(gate))
            silu = builder.fdiv(gate, builder.fadd(exponential, constant(1.0)), flags=["fast"])
            store_halves(builder, builder.fmul(_rounded(builder, silu), up), place, _NUMBER(0))
        return context.get_dummy_value()

    return types.void(sums, rows, output, stride), codegen


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
