"""Loop over rows in compiled code: norms, silu, argmax, and the program that runs one kernel after the other.

Numbers come in and go out in a kernel's precision, and what lies between is float32.
"""

import math
from collections import namedtuple
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from pipeline.engine.cpu.kernels.precision import DTYPES, OPTIONS, held, inner, rounded, threaded, wide
from pipeline.engine.cpu.kernels.slots import read, slots
from pipeline.engine.cpu.kernels.threads import arrive, arrived, call_at, let_others_run, next_task, team
from pipeline.engine.cpu.kernels.vectors import as_double, as_float, halves, longs

PATIENCE = 1000  # looks at a counter, some dozen nanoseconds each, before others may run
ROWS = 8  # of a norm or a product in one task
f32, i32, u32 = types.float32, types.int32, types.uint32


@inner
def aligned(count: int) -> Any:
    """Make room for `count` float32 numbers, from the start of a cache line on."""
    numbers = np.empty(count + 16, np.float32)
    skipped = -numbers.ctypes.data % 64 // 4
    return numbers[skipped : skipped + count]


@inner
def copy(source: Any, target: Any) -> None:
    """Fill the target from the beginning of the source."""
    # A slice that is assigned would be slow where it is short, and numba would compile the text of its error, too.
    for d in range(len(target)):
        target[d] = source[d]


@inner
def exp(x: Any) -> Any:
    """Compute e^x for x ≤ 0 in float32, vectorizable: 2^n times a polynomial on the rest (Cephes' expf)."""
    x = max(x, f32(-87.0))  # below, 2^n is no normal number
    power = i32(x * f32(1.44269504) - f32(0.5))  # cut towards zero: the nearest
    n = f32(power)
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts, of which the first is exact
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * r * r + r + f32(1)) * as_float(u32((power + i32(127)) << i32(23)))  # 2^n by its bits


@inner
def silu_times(gate: Any, up: Any, output: Any) -> Any:
    """Compute silu(gate) · up, all three and the silu as an output holds them."""
    x = wide(gate)
    e = exp(-abs(x))  # e^x would overflow where x is large
    silu = x * (f32(1) if x > 0 else e) / (f32(1) + e)
    return rounded(wide(rounded(silu, output)) * wide(up), output)


Norm = slots("inputs additions weight outputs rows width heads stride eps")


@threaded(*DTYPES)
def rms_norm(pointer: Any) -> None:
    """Norm heads of `width` numbers, ROWS of them a task, after the addition where there is one."""
    p = read(pointer, Norm)
    rows, width, heads, stride, eps = p.rows, p.width, p.heads, p.stride, f32(as_double(p.eps))
    inputs = carray(held(pointer, p.inputs), rows * stride)
    additions = carray(held(pointer, p.additions), rows * stride)
    weight = carray(held(pointer, p.weight), width)
    outputs = carray(held(pointer, p.outputs), rows * stride)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows * heads)):
            start = row // heads * stride + row % heads * width
            x, y = inputs[start : start + width], outputs[start : start + width]
            if p.additions:
                addition = additions[start : start + width]
                for d in range(width):
                    x[d] = rounded(wide(x[d]) + wide(addition[d]), x)
            total = f32(0)
            for d in range(width):
                total += wide(x[d]) * wide(x[d])
            scale = f32(1) / math.sqrt(total / f32(width) + eps)
            for d in range(width):
                y[d] = rounded(wide(rounded(wide(x[d]) * scale, y)) * wide(weight[d]), y)


Silu = slots("gates ups outputs rows width gate_stride up_stride")


@threaded(*DTYPES)
def silu_multiply(pointer: Any) -> None:
    """Multiply silu(gate) by up, ROWS rows a task."""
    p = read(pointer, Silu)
    rows, width = p.rows, p.width
    gates = carray(held(pointer, p.gates), (rows, p.gate_stride))
    ups = carray(held(pointer, p.ups), (rows, p.up_stride))
    outputs = carray(held(pointer, p.outputs), (rows, width))
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        for row in range(task * ROWS, min(task * ROWS + ROWS, rows)):
            gate, up, output = gates[row], ups[row], outputs[row]
            for d in range(width):
                output[d] = silu_times(gate[d], up[d], output)


@inner
def _order(half: Any) -> Any:
    """Turn bf16 to a whole number in the same order, -0 to 0."""
    # bf16 is a sign and a magnitude: only the negative ones are in the wrong order.
    bits = i32(types.int16(half))
    return bits if bits >= 0 else -(bits & i32(0x7FFF))


Argmax = slots("scores places rows width")


@threaded(torch.bfloat16)
def argmax(pointer: Any) -> None:
    """Find the first of each row's largest numbers, a row a task."""
    p = read(pointer, Argmax)
    rows, width = p.rows, p.width
    inputs = carray(halves(p.scores), (rows, width))
    outputs = carray(longs(p.places), rows)
    while True:
        row = next_task(pointer)
        if row >= p.tasks:
            break
        numbers = inputs[row]
        most = _order(numbers[0])
        for i in range(width):
            most = max(most, _order(numbers[i]))
        # A second look is cheaper than carrying places along, which would keep the first one scalar.
        place = 0
        while _order(numbers[place]) != most:
            place += 1
        outputs[row] = place


Forbid = slots("scores height width which allowed words")


@threaded(torch.bfloat16)
def forbid(pointer: Any) -> None:
    """Put −inf where the bit of a number is not set, 64 bits a word, a row a task; and beyond the last word."""
    p = read(pointer, Forbid)
    width = p.width
    inputs = carray(halves(p.scores), (p.height, width))
    which, words = carray(longs(p.which), p.tasks), carray(longs(p.allowed), (p.tasks, p.words))
    least = types.uint16(0xFF80)  # −inf
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        numbers = inputs[which[task]]
        for word in range(p.words):
            allowed, first = words[task, word], 64 * word
            if allowed != -1:  # most of a vocabulary may come within a free text, little of it elsewhere
                for i in range(min(64, width - first)):
                    if not (allowed >> i) & 1:
                        numbers[first + i] = least
        for i in range(64 * p.words, width):
            numbers[i] = least


Run = namedtuple("Run", "calls count arrived team")


@cfunc(types.void(types.CPointer(types.int64)), cache=True, **OPTIONS)
def run(pointer: Any) -> None:
    """Run kernels one after the other; the threads meet after each."""
    p = read(pointer, Run)
    kernels, threads = carray(longs(p.calls), (p.count, 2)), team(p.team)
    for i in range(p.count):
        call_at(kernels[i, 0], kernels[i, 1])
        arrive(p.arrived)
        looks = 0
        # Within a run the counter only rises, so no thread can miss a meeting that the others have left.
        while arrived(p.arrived) < threads * (i + 1):
            looks += 1
            if looks % PATIENCE == 0:  # another process may hold the core that the last thread needs
                let_others_run()
