"""Loops behind kernels.py, compiled by numba: bf16 in and out, float32 in between.

A loop that threads run takes one pointer, to its parameters: a counter from which each thread takes its
next task, the number of tasks, and what the caller in kernels.py passes. Numbers in bf16 are held as
uint16, the upper half of a float32.
"""

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from pipeline.engine.cpu.kernels.threads import arrive, arrived, call, let_others_run, next_task, team
from pipeline.engine.cpu.kernels.vectors import as_bits, as_double, as_float, halves, longs

PATIENCE = 1000  # looks at a counter, some dozen nanoseconds each, before others may run
ROWS = 8  # of a norm or a product in one task
f32, i32, u32 = types.float32, types.int32, types.uint32

inner = njit(fastmath=True, error_model="numpy")
threaded = cfunc(types.void(types.CPointer(types.int64)), cache=True, fastmath=True, error_model="numpy")


@inner
def wide(half: Any) -> Any:
    """bf16 to float32: its upper half."""
    return as_float(u32(u32(half) << u32(16)))


@inner
def rounded(number: Any) -> Any:
    """float32 to bf16, to the nearest, ties to even."""
    bits = as_bits(f32(number))
    return types.uint16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


@inner
def aligned(count: int) -> Any:
    """`count` float32 numbers from the start of a cache line on."""
    numbers = np.empty(count + 16, np.float32)
    skipped = -numbers.ctypes.data % 64 // 4
    return numbers[skipped : skipped + count]


@inner
def exp(x: Any) -> Any:
    """e^x for x ≤ 0 in float32, vectorizable: 2^n times a polynomial on the rest (Cephes' expf)."""
    x = max(x, f32(-87.0))
    power = i32(x * f32(1.44269504) - f32(0.5))  # cut towards zero: the nearest
    n = f32(power)
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1)) * as_float(u32((power + i32(127)) << i32(23)))


@inner
def silu_times(gate: Any, up: Any) -> Any:
    """silu(gate) · up, all three and the silu in bf16."""
    x = wide(gate)
    e = exp(-abs(x))  # of a number that is not above 0
    silu = x * (f32(1) if x > 0 else e) / (f32(1) + e)
    return rounded(wide(rounded(silu)) * wide(up))


@threaded
def rms_norm(pointer: Any) -> None:
    p = carray(pointer, 11)
    rows, width, heads, stride, eps = p[6], p[7], p[8], p[9], f32(as_double(p[10]))
    inputs = carray(halves(p[2]), rows * stride)
    additions = carray(halves(p[3]), rows * stride)
    weight = carray(halves(p[4]), width)
    outputs = carray(halves(p[5]), rows * stride)
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows * heads)):
            start = row // heads * stride + row % heads * width
            x, y = inputs[start : start + width], outputs[start : start + width]
            if p[3]:
                addition = additions[start : start + width]
                for d in range(width):
                    x[d] = rounded(wide(x[d]) + wide(addition[d]))
            total = f32(0)
            for d in range(width):
                total += wide(x[d]) * wide(x[d])
            scale = f32(1) / math.sqrt(total / f32(width) + eps)
            for d in range(width):
                y[d] = rounded(wide(rounded(wide(x[d]) * scale)) * wide(weight[d]))


@threaded
def silu_multiply(pointer: Any) -> None:
    p = carray(pointer, 9)
    rows, width = p[5], p[6]
    gates = carray(halves(p[2]), (rows, p[7]))
    ups = carray(halves(p[3]), (rows, p[8]))
    outputs = carray(halves(p[4]), (rows, width))
    while True:
        task = next_task(pointer)
        if task >= p[1]:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows)):
            gate, up, output = gates[row], ups[row], outputs[row]
            for d in range(width):
                output[d] = silu_times(gate[d], up[d])


@inner
def _order(half: Any) -> Any:
    """bf16 as a whole number in the same order, -0 as 0."""
    bits = i32(types.int16(half))
    return bits if bits >= 0 else -(bits & i32(0x7FFF))


@threaded
def argmax(pointer: Any) -> None:
    p = carray(pointer, 6)
    rows, width = p[4], p[5]
    inputs = carray(halves(p[2]), (rows, width))
    outputs = carray(longs(p[3]), rows)
    while True:
        row = next_task(pointer)
        if row >= p[1]:
            break
        numbers = inputs[row]
        most = _order(numbers[0])
        for i in range(width):
            most = max(most, _order(numbers[i]))
        place = 0
        while _order(numbers[place]) != most:
            place += 1
        outputs[row] = place


@threaded
def run(pointer: Any) -> None:
    """Kernels one after the other; the threads meet after each."""
    p = carray(pointer, 4)
    kernels, counter, threads = carray(longs(p[0]), (p[1], 2)), p[2], team(p[3])
    for i in range(p[1]):
        call(kernels[i, 0], kernels[i, 1])
        arrive(counter)
        looks = 0
        while arrived(counter) < threads * (i + 1):
            looks += 1
            if looks % PATIENCE == 0:  # another process may hold the core that the last thread needs
                let_others_run()
