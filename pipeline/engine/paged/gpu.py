"""Choose what a GPU computes attention with, by its compute capability."""

import functools
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)

AMPERE = (8, 0)  # compute capability from which Triton and FlashAttention-2 run
HOPPER = (
    9  # major compute capability of the cards on which our 4-bit products and recorded mixtures were measured
)


@functools.cache
def choose_kernels(device: torch.device) -> tuple[ModuleType | None, bool]:
    """Import Triton's kernels, where they run, and say whether FlashAttention does."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, False
    if torch.cuda.get_device_capability(device) < AMPERE:
        return None, False
    try:
        from pipeline.engine.paged import triton_kernels as kernels
    except ImportError as error:
        log.info("Without Triton's kernels: %s", error)
        return None, torch.version.hip is None
    return kernels, torch.version.hip is None
