"""Describe a GPU without opening it. All that is decided by device is a function of this."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or a part of one. None is what cannot be read."""

    backend: str  # cuda, rocm, xpu or mps
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None  # CUDA's compute capability
    uuid: str | None = None  # as CUDA_VISIBLE_DEVICES names it: GPU-… or MIG-…

    @property
    def bf16(self) -> bool:
        """Say whether it multiplies in bfloat16 itself: CUDA does from compute capability 8.0 on, the others do.

        Below, torch emulates it, and bitsandbytes' kernel for 4-bit products takes 4 rows instead of 32 to 128.
        """
        return self.backend != "cuda" or self.capability is None or self.capability >= (8, 0)

    @property
    def mig(self) -> bool:
        """Say whether it is a part that NVIDIA's Multi-Instance GPU has cut off."""
        return self.uuid is not None and self.uuid.startswith("MIG-")


def have_bf16(gpus: Iterable[Gpu]) -> bool:
    """Say whether all of them multiply in bfloat16; a CPU, which is no GPU at all, counts as if it did."""
    return all(gpu.bf16 for gpu in gpus)
