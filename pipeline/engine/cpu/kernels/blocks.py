"""Order a weight for products of our own: in blocks of 32 outputs and 32 inputs."""

from torch import Tensor, int32

BLOCK = 32  # inputs and outputs of a block
TILE_ROWS, TILE_BYTES = 16, 64  # a matrix tile, and two inputs of 16 outputs in one vector
BLOCK_BYTES = 2 * TILE_ROWS * TILE_BYTES  # of weights
CHUNK_BYTES = 1 << 19  # of inputs that meet all weights before the next do: they stay in the L2 cache


def chunk_rows(inputs: int, together: int) -> int:
    """Return the rows of a chunk: a multiple of those that are multiplied together."""
    return max(together, CHUNK_BYTES // (inputs * 2) // together * together)


def pack_blocks(weight: Tensor) -> Tensor:
    """Reorder a weight as `linear` reads it. [M, K] in bf16, multiples of 32 → [M/32, K/32, 2, 16, 16, 2].

    One block of 32 outputs after the other; in it one of 32 inputs after the other; in that two tiles of 16
    outputs, each with two neighbouring inputs in a lane.
    """
    outputs, inputs = weight.shape
    pairs = weight.contiguous().view(int32)  # in one piece they move faster
    blocks = pairs.view(outputs // BLOCK, 2, TILE_ROWS, inputs // BLOCK, TILE_ROWS)
    packed = blocks.permute(0, 3, 1, 4, 2).contiguous().view(weight.dtype)
    return packed.view(outputs // BLOCK, inputs // BLOCK, 2, TILE_ROWS, TILE_ROWS, 2)
