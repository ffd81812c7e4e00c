"""Multiply by packed weights in float32 on a CPU's vectors: strip by strip, a few rows at a time."""

from typing import Any

import torch

from pipeline.engine.cpu.kernels.blocks import BLOCK, Linear
from pipeline.engine.cpu.kernels.epilogue import store
from pipeline.engine.cpu.kernels.loops import aligned
from pipeline.engine.cpu.kernels.precision import inner, threaded
from pipeline.engine.cpu.kernels.row_products import multiply_groups
from pipeline.engine.cpu.kernels.slots import read
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.vectors import ROWS as ROWS

FEWEST_ROWS = 1  # that a product takes
BLOCK_BYTES = BLOCK * BLOCK * 4  # of weights
PART = 32  # blocks that meet all rows before the next do: they stay in the L2 cache, beside the inputs


@inner
def _strip(pointer: Any, p: Any, strip: int, start: int, rows: int, sums: Any) -> None:
    """Multiply some rows by one strip."""
    blocks, gated, stride = p.width_in // BLOCK, p.gated, p.stride * 4
    inputs = p.inputs + start * stride
    weights = p.weights + strip * blocks * BLOCK_BYTES
    soon = weights + p.threads * blocks * BLOCK_BYTES * (1 + gated)
    sums[:] = 0
    for first in range(0, blocks, PART):
        count, along = min(PART, blocks - first), first * BLOCK_BYTES
        own = inputs + first * BLOCK * 4
        multiply_groups(pointer, rows, own, stride, count, weights + along, soon + along, BLOCK_BYTES, sums)
    width = p.width_out * 4 // (1 + gated)
    bias = p.bias + strip * BLOCK * 4 if p.bias else 0
    output = p.outputs + start * width + strip * BLOCK * 4 // (1 + gated)
    store(pointer, sums.ctypes.data, rows, 0, bias, output, width, gated)


@threaded(torch.float32)
def linear(pointer: Any) -> None:
    """Multiply one chunk of rows by one strip a task; gated, by the two strips that share a line of the output."""
    p = read(pointer, Linear)
    rows, strips, together, chunk = p.rows, p.width_out // BLOCK, 1 + p.gated, p.chunk
    sums = aligned(min(rows, chunk) * BLOCK)
    per_chunk = -(-strips // together)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        start, first = task // per_chunk * chunk, task % per_chunk * together
        count = min(chunk, rows - start)
        for strip in range(first, min(first + together, strips)):
            _strip(pointer, p, strip, start, count, sums[: count * BLOCK])
