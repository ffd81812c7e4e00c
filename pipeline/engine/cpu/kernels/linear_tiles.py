"""Multiply by packed weights on a CPU's matrix tiles.

A strip is 32 outputs. Its weights are read once for all rows of a chunk, in parts that stay in the L1 cache.
"""

from typing import Any

import torch

from pipeline.engine.cpu.kernels.blocks import BLOCK, BLOCK_BYTES, LINE_BYTES, TILE_ROWS, Linear
from pipeline.engine.cpu.kernels.epilogue import store
from pipeline.engine.cpu.kernels.loops import aligned
from pipeline.engine.cpu.kernels.precision import inner, threaded
from pipeline.engine.cpu.kernels.quantized import block_bytes, unpack
from pipeline.engine.cpu.kernels.slots import read
from pipeline.engine.cpu.kernels.threads import next_task
from pipeline.engine.cpu.kernels.tiles import configure, multiply_block, release

FEWEST_ROWS = TILE_ROWS  # that a product takes
ROWS = BLOCK  # whose sums are in registers at once
PART = 9  # blocks that a sum runs over before the next rows: theirs of weights stay in the L1 cache
UNPACKED = 8  # the same, of quantized weights: an even number, and their codes are in the cache too


@inner
def _halves_of_block(row: int, rows: int) -> tuple[int, int]:
    """Return the first rows of a block's halves. Where less is left, the last 16 rows are computed again."""
    return min(row, rows - TILE_ROWS), min(row + TILE_ROWS, rows - TILE_ROWS)


@inner
def _store(pointer: Any, p: Any, strip: int, row: int, sums: Any) -> None:
    """Store a block of sums at its place in the output."""
    rows, outputs, gated = p.rows, p.width_out, p.gated
    scales = p.scales + strip * BLOCK * 4 if p.scales else 0
    bias = p.bias + strip * BLOCK * 2 if p.bias else 0
    width = outputs * 2 // (1 + gated)
    for half, place in enumerate(_halves_of_block(row, rows)):
        own = sums[half * TILE_ROWS].ctypes.data
        output = p.outputs + place * width + strip * BLOCK * 2 // (1 + gated)
        store(pointer, own, TILE_ROWS, scales, bias, output, width, gated)


@inner
def _strip(pointer: Any, p: Any, strip: int, start: int, end: int, sums: Any, unpacked: int) -> None:
    """Multiply the rows [start, end) by one strip."""
    rows, inputs, stride, threads = p.rows, p.width_in, p.stride * 2, p.threads
    blocks = inputs // BLOCK
    parts = -(-blocks // PART)
    part = UNPACKED if p.values or p.scales else -(-blocks // parts)
    size = block_bytes(p)
    weights = p.weights + strip * blocks * size
    next_weights = weights + threads * blocks * size * (1 + p.gated)
    # Each group of rows asks for its share of the next strip.
    lines = size // 2 // (end - start + BLOCK - 1) + 1
    for block in range(0, blocks, part):
        count = min(part, blocks - block)
        here = weights + block * size
        if p.values or p.scales:
            unpack(p, here, count, unpacked)
            here = unpacked
        for index in range((end - start + BLOCK - 1) // BLOCK):
            row = start + index * BLOCK
            first, second = _halves_of_block(row, rows)
            multiply_block(
                p.inputs + first * stride + block * LINE_BYTES,
                p.inputs + second * stride + block * LINE_BYTES,
                stride,
                here,
                count,
                sums[index].ctypes.data,
                block,
                next_weights + block * size + index * count * lines * 64,
                lines,
            )
            # The sums before these are stored while the tiles are at work.
            if block + count == blocks and index > 0:
                _store(pointer, p, strip, row - BLOCK, sums[index - 1])
    last = (end - start - 1) // BLOCK
    _store(pointer, p, strip, start + last * BLOCK, sums[last])


@threaded(torch.bfloat16)
def linear(pointer: Any) -> None:
    """Multiply one chunk of rows by one strip a task; gated, by the two strips that share a line of the output."""
    p = read(pointer, Linear)
    rows, strips, together, chunk = p.rows, p.width_out // BLOCK, 1 + p.gated, p.chunk
    sums = aligned((chunk // BLOCK + 1) * BLOCK * BLOCK).reshape((-1, BLOCK, BLOCK))
    unpacked = aligned(UNPACKED * BLOCK_BYTES // 4)
    per_chunk = -(-strips // together)
    configure(p.configuration)
    while True:
        task = next_task(pointer)
        if task >= p.tasks:
            break
        start, first = task // per_chunk * chunk, task % per_chunk * together
        for strip in range(first, min(first + together, strips)):
            _strip(pointer, p, strip, start, min(start + chunk, rows), sums, unpacked.ctypes.data)
    release()
