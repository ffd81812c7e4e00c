"""Decide which dtypes a model is loaded in, and name those that it computes in."""

import logging
from functools import cache
from typing import Any

import torch

from pipeline.common import terminal
from pipeline.common.gpu import Gpu
from pipeline.config.quant import Dtype, QuantConfig, settle_dtypes
from pipeline.engine.accelerators import usable_gpus
from pipeline.engine.cpu import load_kernels
from pipeline.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def settle_here(quant: QuantConfig, checkpoint: Checkpoint, device_map: Any) -> QuantConfig:
    """Decide what `auto` is for this checkpoint on the devices that a job may use."""
    return settle(quant, own_dtype(checkpoint), usable_gpus(device_map))


def settle(quant: QuantConfig, own: str | None, gpus: tuple[Gpu, ...]) -> QuantConfig:
    """Decide what `auto` is on these GPUs (config/quant.py), and say so where it is not bfloat16."""
    settled = settle_dtypes(quant, own, gpus)
    slow = next((gpu.name for gpu in gpus if not gpu.bf16), None)
    products = quant.four_bit and quant.compute_dtype is Dtype.auto
    if slow is not None and (settled.dtype is not quant.dtype or products):
        _say_once(slow)
    return settled


@cache
def _say_once(gpu: str) -> None:
    line = f"{gpu} has no bfloat16 of its own: what is not quantized, and 4-bit products, are in float16."
    log.info(line)
    terminal.say(line, style="yellow")


def compile_kernels(quant: QuantConfig, checkpoint: Checkpoint, device_map: Any) -> None:
    """Compile what a CPU runs a model in these dtypes through, where it will run on one."""
    if not usable_gpus(device_map) and (kernels := load_kernels()):
        name = own_dtype(checkpoint) if quant.dtype is Dtype.auto else quant.dtype.value
        kernels.compile_for(getattr(torch, str(name), torch.float32))


def computed_in(model: Any, quant: QuantConfig) -> dict[str, str | None]:
    """Return the dtypes that a loaded model computes in: of what is not quantized, and of 4-bit products."""
    return {
        "plain": str(model.dtype).removeprefix("torch."),
        "products_4bit": quant.compute_dtype.value if quant.four_bit else None,
    }


def own_dtype(checkpoint: Checkpoint) -> str | None:
    """Read the dtype that its config names, for the whole or for the text part."""
    config = checkpoint.read_config()
    values = {**(config.get("text_config") or {}), **config}
    found = values.get("dtype") or values.get("torch_dtype")
    return found and str(found)
