"""Order a weight for products of our own: in blocks of 32 outputs and 32 inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, int32

from pipeline.engine.cpu.kernels.slots import slots
from pipeline.engine.cpu.kernels.vectors import HAS_AVX512, HAS_BF16

BLOCK = 32  # inputs and outputs of a block
TILE_ROWS, LINE_BYTES = 16, 64  # a matrix tile, and two inputs of 16 outputs in one vector, or one in float32
BLOCK_BYTES = 2 * TILE_ROWS * LINE_BYTES  # of weights in bf16
SCALED = 64  # inputs that share a scale, in 4 bits: two blocks
CODE_BYTES, SCALE_BYTES = BLOCK * SCALED // 2, BLOCK * 4  # of the two blocks
CODED_BYTES = (CODE_BYTES + SCALE_BYTES) // 2  # of one block
INT8_BLOCK_BYTES = BLOCK * BLOCK  # of one block in 8 bits
IN_WHOLE_NUMBERS = not HAS_BF16  # are weights in 4 and in 8 bits multiplied, else in bf16
CHUNK_BYTES = 1 << 19  # of inputs that meet all weights before the next do: they stay in the L2 cache

# What a product reads, on vectors and on tiles.
Linear = slots(
    "inputs weights values scales bias outputs configuration",
    "rows width_in width_out stride gated threads chunk",
)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Hold a weight [M, K] in the order in which `linear` reads it.

    One strip of 32 outputs after the other; in it one block of 32 inputs after the other; in that two tiles of
    16 outputs. In bf16 a lane has two neighbouring inputs of an output, in float32 one. In 4 bits 16 bytes have a
    block's inputs of an output, the first 16 in their lower halves, and a line has every fourth output of a tile; or,
    for whole numbers, 32 bytes have two inputs of a strip's outputs, which take turns, the first tile in their lower
    halves. After every two blocks come the scales of their outputs. In 8 bits 16 bytes have an input of a tile's
    outputs; or, for whole numbers, 32 bytes have two, which take turns.
    """

    # bf16 [M/32, K/32, 2, 16, 16, 2], float32 [M/32, K/32, 2, 32, 16],
    # int8 [M/32, K/32, 2, 16, 2, 16] or, for whole numbers, [..., 16, 2],
    # or int32 [M/32, K/64, 288]: 256 of codes, 32 scales
    numbers: Tensor
    values: Tensor | None = None  # [16] float32: what a code of 4 bits is
    scales: Tensor | None = None  # [M] float32: what a weight of 8 bits is a multiple of

    @property
    def outputs(self) -> int:
        return len(self.numbers) * BLOCK

    @property
    def inputs(self) -> int:
        return self.numbers.shape[1] * (BLOCK if self.values is None else SCALED)

    @property
    def dtype(self) -> torch.dtype:
        """Return what inputs and outputs are in."""
        return torch.float32 if self.numbers.dtype == torch.float32 else torch.bfloat16


def chunk_rows(row_bytes: int, together: int) -> int:
    """Return the rows of a chunk: a multiple of those that are multiplied together."""
    return max(together, CHUNK_BYTES // row_bytes // together * together)


def pack_blocks(weight: Tensor) -> Blocks:
    """Reorder a weight. [M, K] in bf16 or float32, multiples of 32."""
    if weight.dtype == torch.float32:
        return Blocks(_in_blocks(weight.contiguous(), BLOCK))
    pairs = weight.contiguous().view(int32)  # in one piece they move faster
    packed = _in_blocks(pairs, TILE_ROWS).view(weight.dtype)
    return Blocks(packed.view(*packed.shape[:-1], TILE_ROWS, 2))


def pack_codes(codes: Tensor, scales: Tensor, values: Tensor) -> Blocks:
    """Reorder a weight in 4 bits, M a multiple of 32 and K of 64.

    Args:
        codes: [M, K/2] bytes, the first of two inputs in the upper half.
        scales: [M, K/64] float32.
        values: [16] float32.
    """
    strips, groups = len(codes) // BLOCK, scales.shape[1]
    words = (_by_inputs if IN_WHOLE_NUMBERS else _by_outputs)(codes, strips, groups)
    parts = words.reshape(strips, groups, -1), _in_blocks(scales.contiguous().view(int32), 1)
    return Blocks(torch.cat([part.view(strips, groups, -1) for part in parts], -1), values.float())


def _by_outputs(codes: Tensor, strips: int, groups: int) -> Tensor:
    """Reorder codes so that 16 bytes have a block's inputs of an output."""
    first, second = codes.reshape(len(codes), -1, 2, BLOCK // 4).unbind(2)
    halves = torch.stack((first >> 4 | second & 0xF0, first & 0x0F | second << 4), -1).view(len(codes), -1)
    return halves.view(int32).view(strips, 2, 4, 4, groups, 2, 4).permute(0, 4, 1, 5, 3, 2, 6)


def _by_inputs(codes: Tensor, strips: int, groups: int) -> Tensor:
    """Reorder codes so that 32 bytes have two inputs of a strip's outputs."""
    lower, upper = codes.view(strips, 2, 2, 2, 4, groups, -1).unbind(1)
    both = torch.stack((lower >> 4 | upper & 0xF0, lower & 0x0F | upper << 4), -1)
    # AVX2 interleaves the bytes of the two halves of its registers: then the outputs are in their order.
    turned = both if HAS_AVX512 else both.transpose(1, 2)
    return turned.permute(0, 4, 5, 1, 2, 3, 6).contiguous().view(strips, groups, -1).view(int32)


def pack_bytes(weight: Tensor, scales: Tensor) -> Blocks:
    """Reorder a weight in 8 bits. [M, K] int8, multiples of 32, and [M] float32."""
    lines = _in_blocks(weight.contiguous().view(torch.int16), TILE_ROWS).view(torch.int8)
    lines = lines.view(*lines.shape[:-1], TILE_ROWS, 2)
    lines = lines if IN_WHOLE_NUMBERS else lines.transpose(-1, -2).contiguous()
    return Blocks(lines, scales=scales.float().contiguous())


def _in_blocks(words: Tensor, width: int) -> Tensor:
    """Reorder numbers, `width` of an output in a block. [M, W] → [M/32, W/width, 2, width, 16]."""
    outputs, count = words.shape
    blocks = words.view(outputs // BLOCK, 2, TILE_ROWS, count // width, width)
    return blocks.permute(0, 3, 1, 4, 2).contiguous()
