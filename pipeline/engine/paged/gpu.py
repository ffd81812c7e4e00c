"""Choose what a GPU computes attention and products with."""

import functools
import logging
from types import ModuleType
from typing import Any

import torch

log = logging.getLogger(__name__)

AMPERE = (8, 0)  # compute capability from which Triton and FlashAttention-2 run
GROUPED_PRODUCTS = (
    9,
    0,
)  # from which torch multiplies by experts in bfloat16 without asking how many rows each has
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


def replace_products(model: Any) -> int:
    """Let quantized layers on one GPU multiply by kernels of our own: experts, 8 bits, and 4 where that is faster.

    On ROCm they stay bitsandbytes': the kernels for 4 bits are written in PTX, and none has been run there.

    Returns:
        How many layers were replaced, a mixture's experts as one.
    """
    devices = {p.device for p in model.parameters()}
    device = devices.pop()
    if devices or torch.version.hip is not None or choose_kernels(device)[0] is None:
        return 0
    from pipeline.engine.paged import triton_eight_bits, triton_experts, triton_four_bits

    half = model.get_input_embeddings().weight.dtype in (torch.float16, torch.bfloat16)
    count = triton_eight_bits.replace_linears(model) + triton_experts.replace_experts(model) if half else 0
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        count += triton_four_bits.replace_linears(model)
    return count
