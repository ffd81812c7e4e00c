"""Multiply in float32 by a weight as it lies, on a CPU's vectors: for a few rows, at which MKL is slow.

Some outputs and some rows are multiplied together: both are read along the inputs, and each pair of them has a
vector of sums, whose lanes are added up at the end.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from pipeline.engine.cpu.kernels.loops import inner, threaded
from pipeline.engine.cpu.kernels.slots import prepare, read, slots
from pipeline.engine.cpu.kernels.threads import next_task, run
from pipeline.engine.cpu.kernels.vectors import compiles_for, floats, for_each_count, load, prefetch_line

WIDE = compiles_for("avx512f")
LANES = 16 if WIDE else 8  # of a register
OUTPUTS = 4  # together
ROWS = 6 if WIDE else 2  # whose sums of OUTPUTS are in registers at once
TASK = 32  # outputs
FEW_ROWS = 64  # more are as fast or faster by MKL
AHEAD = 512  # bytes: so far ahead weights are asked for

_NUMBER = ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
LinearFloats = slots("inputs weights bias outputs", "rows width_in width_out stride")


@intrinsic
def _multiply_rows(
    context: Any, rows: Any, input: Any, stride: Any, weights: Any, width: Any, sums: Any
) -> Any:
    """Multiply 1 to ROWS rows at `input`, `stride` bytes apart, by OUTPUTS rows of `width` weights each.

    Args:
        sums: address of [ROWS, OUTPUTS] float32.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        for_each_count(builder, rows, ROWS, lambda count: _multiply(builder, count, *rest))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def _multiply(builder: Any, rows: int, input: Any, stride: Any, weights: Any, width: Any, sums: Any) -> None:
    """Write the product of some rows."""
    apart = builder.mul(width, _NUMBER(4))
    left = [builder.add(input, builder.mul(stride, _NUMBER(row))) for row in range(rows)]
    right = [builder.add(weights, builder.mul(apart, _NUMBER(output))) for output in range(OUTPUTS)]
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in right] for _ in left]
    with cgutils.for_range(builder, builder.udiv(width, _NUMBER(LANES)), intp=_NUMBER) as step:
        first = builder.mul(step.index, _NUMBER(LANES))
        numbers = [load(builder, place, first, ir.FloatType(), LANES, 4) for place in right]
        for place in right:
            along = builder.add(builder.mul(first, _NUMBER(4)), _NUMBER(AHEAD))
            prefetch_line(builder, builder.add(place, along), cache=1)
        for place, own in zip(left, totals, strict=True):
            row = load(builder, place, first, ir.FloatType(), LANES, 4)
            for total, number in zip(own, numbers, strict=True):
                product = builder.fmul(row, number, flags=["fast"])
                builder.store(builder.fadd(builder.load(total), product, flags=["fast"]), total)
    for index, total in enumerate(total for own in totals for total in own):
        place = builder.add(sums, _NUMBER(4 * index))
        builder.store(
            _summed(builder, builder.load(total)), builder.inttoptr(place, ir.FloatType().as_pointer())
        )


def _summed(builder: Any, vector: Any) -> Any:
    """Add up a vector's lanes."""
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector.type])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [ir.Constant(ir.FloatType(), 0.0), vector], fastmath=["fast"])


@inner
def _store(p: Any, first: int, row: int, rows: int, sums: Any) -> None:
    """Store the sums of some rows, with their bias, at their place in the output."""
    outputs = carray(floats(p.outputs), (p.rows, p.width_out))
    for other in range(rows):
        for output in range(OUTPUTS):
            outputs[row + other, first + output] = sums[other, output]
    if p.bias:
        offsets = carray(floats(p.bias), p.width_out)
        for other in range(rows):
            for output in range(first, first + OUTPUTS):
                outputs[row + other, output] += offsets[output]


@threaded
def linear(pointer: Any) -> None:
    """Multiply all rows by TASK outputs a task."""
    p = read(pointer, LinearFloats)
    sums = np.empty((ROWS, OUTPUTS), np.float32)
    groups = (p.rows + ROWS - 1) // ROWS  # of nearly one size
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        for first in range(task * TASK, min(task * TASK + TASK, p.width_out), OUTPUTS):
            weights = p.weights + first * p.width_in * 4
            for group in range(groups):
                row, after = p.rows * group // groups, p.rows * (group + 1) // groups
                input = p.inputs + row * p.stride * 4
                _multiply_rows(after - row, input, p.stride * 4, weights, p.width_in, sums.ctypes.data)
                _store(p, first, row, after - row, sums)


def linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a contiguous weight as it lies, all in float32. [.., K] and [M, K] → [.., M].

    K is a multiple of 16, M one of 4.
    """
    outputs, inputs = weight.shape
    states = input.reshape(-1, inputs)
    states = states if states.stride(1) == 1 else states.contiguous()
    output = states.new_empty(len(states), outputs)
    run(
        prepare(
            linear,
            LinearFloats,
            -(-outputs // TASK),
            inputs=states,
            weights=weight,
            bias=0 if bias is None else bias,
            outputs=output,
            rows=len(states),
            width_in=inputs,
            width_out=outputs,
            stride=states.stride(0),
        )
    )
    return output.view(*input.shape[:-1], outputs)
