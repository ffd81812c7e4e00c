"""Put products of our own in the place of bitsandbytes', where a GPU has them and they prove right on it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.model_facts import is_adapted, outside_adapters
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.gpu import choose_kernels

log = logging.getLogger(__name__)

HOPPER = 9  # major compute capability of the cards on which triton_four_bits.py was measured
TRIED_ROWS = (1, 5, 17, 128)  # for few, with tiles that are not full, and the most
NEAR = 0.02  # relative: a few times what roundings to bfloat16 make


def replace_products(model: Any) -> int:
    """Let quantized layers on one GPU multiply by kernels of our own: experts, 8 bits, and 4 where that is faster.

    The first layer of each kind is tried on the card: where it fails, or is wrong, all stay bitsandbytes'. On ROCm
    they do, too: the kernels for 4 bits are written in PTX, and none has been run there.

    Returns:
        How many layers were replaced, a mixture's experts as one.
    """
    devices = {p.device for p in model.parameters()}
    device = devices.pop()
    if devices or torch.version.hip is not None or choose_kernels(device)[0] is None:
        return 0
    from pipeline.engine.paged.triton_eight_bits import EightBitLinear
    from pipeline.engine.paged.triton_experts import GroupedExperts
    from pipeline.engine.paged.triton_four_bits import FourBitLinear

    dtype, count = model.get_input_embeddings().weight.dtype, 0
    if dtype in (torch.float16, torch.bfloat16):
        count += replace_linears(model, EightBitLinear, dtype) + replace_experts(model, GroupedExperts, dtype)
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        count += replace_linears(model, FourBitLinear)
    return count


def replace_linears(model: nn.Module, kind: Any, dtype: torch.dtype | None = None) -> int:
    """Replace the layers that this kind can stand in for; return how many.

    Args:
        dtype: of the layers' inputs; None is that of their products.
    """
    found: list[tuple[nn.Module, str, Any]] = [
        (module, name, child)
        for module in outside_adapters(model)
        for name, child in module.named_children()
        if not isinstance(module, kind) and not is_adapted(child) and kind.can_replace(child)
    ]
    if not found:
        return 0
    layer = found[0][2]
    tried = kind(layer)
    states = _numbers(layer, TRIED_ROWS[-1] + 1, layer.in_features).to(dtype or layer.compute_dtype)
    # So many rows are multiplied by the dequantized weight.
    if not _proves_right(lambda rows: tried(states[:rows]), lambda: tried(states)):
        return 0
    for module, name, child in found:
        setattr(module, name, kind(child))
    return len(found)


def replace_experts(model: nn.Module, kind: Any, dtype: torch.dtype) -> int:
    """Have experts that this kind can multiply by go through it; return how many modules' they are."""
    found: list[Any] = [module for module in model.modules() if kind.can_replace(module)]
    if not found:
        return 0
    module, rows = found[0], TRIED_ROWS[-1]
    count, hidden, _ = module.quantized_experts["down_proj"].shape
    states = _numbers(module, rows, hidden).to(dtype)
    weights, chosen = _numbers(module, rows, count).abs().to(dtype).topk(min(2, count))
    tried = kind(module)
    if not _proves_right(
        lambda rows: tried(states[:rows], chosen[:rows], weights[:rows]),
        lambda: module(states, chosen, weights),
    ):
        return 0
    for module in found:
        module.grouped_experts = module.forward = kind(module)
    return len(found)


def _numbers(module: nn.Module, rows: int, columns: int) -> Tensor:
    """Draw numbers for a trial, the same each time, without a change to what is drawn after it. [rows, columns]."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return drawn.to(next(module.parameters()).device)


@torch.inference_mode()
def _proves_right(ours: Callable[[int], Tensor], theirs: Callable[[], Tensor]) -> bool:
    """Say whether a kernel gives the first so many rows what the dequantized weight gives them."""
    try:
        wanted = theirs().float()
        apart = [_apart(ours(rows).float(), wanted[:rows]) for rows in TRIED_ROWS]
    except Exception as error:  # Triton's own are of no common kind
        if is_out_of_memory(error):
            raise
        log.info("It fails", exc_info=True)
        apart = [float("inf")]
    if max(apart) <= NEAR:
        return True
    log.warning(
        "Products of our own are not used on this GPU: %s", f"{max(apart):.2g} off where they were tried"
    )
    return False


def _apart(made: Tensor, wanted: Tensor) -> float:
    """Measure a difference, as a share of what is wanted; NaN counts as infinite."""
    found = float((made - wanted).norm() / wanted.norm())
    return found if found == found else float("inf")
