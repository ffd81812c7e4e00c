"""Multiply by packed weights on a CPU's vectors, where it has no matrix tiles: strip by strip, a few rows at a time.

A row's 32 outputs of a strip are two vectors of sums, so that a dozen rows fill AVX-512's registers: for every
two inputs, two vectors of weights are loaded, and each row's pair of inputs is spread over a third. AVX2 has room
for half as many rows, by one tile.
"""

from typing import Any

import torch

from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, Linear
from pipeline.engine.cpu.kernels.epilogue import store
from pipeline.engine.cpu.kernels.loops import aligned
from pipeline.engine.cpu.kernels.precision import inner, threaded
from pipeline.engine.cpu.kernels.quantized import (
    block_bytes,
    convert,
    converted_bytes,
    few_rows,
    multiply_few,
    unpack,
)
from pipeline.engine.cpu.kernels.row_products import INPUT_BYTES, multiply_groups
from pipeline.engine.cpu.kernels.slots import read
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.vectors import ROWS as ROWS

FEWEST_ROWS = 1  # that a product takes
UNPACKED = 8  # blocks of quantized weights that are turned to bf16 at once: they stay in the L1 cache


@inner
def _strip(
    pointer: Any,
    p: Any,
    strip: int,
    rows: int,
    inputs: int,
    stride: int,
    outputs: int,
    sums: Any,
    unpacked: int,
) -> None:
    """Multiply some rows by one strip, in groups of nearly one size.

    Args:
        inputs: address of the first row as a product takes it, `stride` bytes before the second.
        outputs: address of the first row of the output.
        unpacked: address of room for UNPACKED blocks.
    """
    blocks, gated = p.width_in // BLOCK, p.gated
    size = block_bytes(p)
    part = UNPACKED if p.values or p.scales else blocks
    weights = p.weights + strip * blocks * size
    soon = weights + p.threads * blocks * size * (1 + gated)
    sums[:] = 0
    few = rows <= few_rows(p)
    if few:
        multiply_few(p, rows, inputs, stride, weights, sums.ctypes.data)
    for first in range(0, 0 if few else blocks, part):
        count = min(part, blocks - first)
        here = weights + first * size
        if p.values or p.scales:
            unpack(p, here, count, unpacked)
            here = unpacked
        own = inputs + first * BLOCK * INPUT_BYTES
        multiply_groups(pointer, rows, own, stride, count, here, soon + first * size, size, sums)
    width = p.width_out * 2 // (1 + gated)
    scales = p.scales + strip * BLOCK * 4 if p.scales else 0
    bias = p.bias + strip * BLOCK * 2 if p.bias else 0
    output = outputs + strip * BLOCK * 2 // (1 + gated)
    store(pointer, sums.ctypes.data, rows, scales, bias, output, width, gated)


@threaded(torch.bfloat16)
def linear(pointer: Any) -> None:
    """Multiply one chunk of rows by one strip a task; gated, by the two strips that share a line of the output."""
    p = read(pointer, Linear)
    rows, strips, together, chunk = p.rows, p.width_out // BLOCK, 1 + p.gated, p.chunk
    most = min(rows, chunk)
    sums, unpacked = aligned(most * BLOCK), aligned(UNPACKED * BLOCK_BYTES // 4)
    per_chunk = -(-strips // together)
    size, converted_start = converted_bytes(p), -1
    converted = aligned(most * size // 4)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        start, first = task // per_chunk * chunk, task % per_chunk * together
        end = min(start + chunk, rows)
        inputs, stride = p.inputs + start * p.stride * 2, p.stride * 2
        if size:
            if converted_start != start:
                convert(p, start, end, converted.ctypes.data)
                converted_start = start
            inputs, stride = converted.ctypes.data, size
        outputs = p.outputs + start * p.width_out * 2 // together
        for strip in range(first, min(first + together, strips)):
            own = sums[: (end - start) * BLOCK]
            _strip(pointer, p, strip, end - start, inputs, stride, outputs, own, unpacked.ctypes.data)
