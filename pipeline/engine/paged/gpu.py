"""Choose what a GPU computes attention and products with."""

import functools
import logging
from types import ModuleType
from typing import Any

import torch

log = logging.getLogger(__name__)

AMPERE = (8, 0)  # compute capability from which Triton and FlashAttention-2 run
HOPPER = 9  # major compute capability of the cards on which triton_four_bits.py was measured


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


def replace_products(model: Any, device: torch.device) -> None:
    """Let layers in 4 bits multiply by a kernel of our own, on the cards where that is faster."""
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        from pipeline.engine.paged.triton_four_bits import replace_linears

        log.info("%d layers in 4 bits multiply by the kernel", replace_linears(model))
