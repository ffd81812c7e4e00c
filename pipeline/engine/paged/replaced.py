"""Put products of our own in the place of bitsandbytes', where a GPU has them and they prove right on it."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.model_facts import is_adapted, outside_adapters
from pipeline.engine.paged.gpu import HOPPER, choose_kernels

log = logging.getLogger(__name__)

TRIED_ROWS = (1, 5, 17, 64, 128)  # of each height of a program's tile, filled and not
# How far a number may be off beside a 50th of itself, as a share of its row's median. What experts in 8 bits round
# to bfloat16 on the way makes 0.03.
NEAR = 0.15


def replace_products(model: Any) -> int:
    """Let quantized layers on one GPU multiply by kernels of our own: experts, 8 bits, and 4 where that is faster.

    The first layer of each kind is tried on the card: where it fails, or is wrong, all of that kind stay
    bitsandbytes'. On ROCm they do, too: the kernels for 4 bits are written in PTX, and none has been run there.

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

    count = 0
    if model.dtype in (torch.float16, torch.bfloat16):
        count += replace_linears(model, EightBitLinear, model.dtype)
        count += replace_experts(model, GroupedExperts, model.dtype)
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

    def tries() -> Iterator[tuple[Tensor, Tensor]]:
        layer = found[0][2]
        tried = kind(layer)
        states = _numbers(layer, TRIED_ROWS[-1] + 1, layer.in_features).to(dtype or layer.compute_dtype)
        wanted = tried(states)  # so many rows are multiplied by the dequantized weight
        for rows in TRIED_ROWS:
            for made in (tried(states[:rows]), *kind.joined([tried] * 3, states[:rows])):
                yield made, wanted[:rows]

    if not found or not _prove_right(kind, tries):
        return 0
    for module, name, child in found:
        setattr(module, name, kind(child))
    return len(found)


def replace_experts(model: nn.Module, kind: Any, dtype: torch.dtype) -> int:
    """Have experts that this kind can multiply by go through it; return how many modules' they are."""
    found: list[Any] = [module for module in model.modules() if kind.can_replace(module)]

    def tries() -> Iterator[tuple[Tensor, Tensor]]:
        module, tokens = found[0], TRIED_ROWS[-1]
        count, hidden, _ = module.quantized_experts["down_proj"].shape
        states = _numbers(module, tokens, hidden).to(dtype)
        weights, chosen = _numbers(module, tokens, count).abs().to(dtype).topk(min(2, count))
        tried, wanted = kind(module, dtype), module(states, chosen, weights)
        for tile in kind.TILES:
            yield tried(states, chosen, weights, tile), wanted

    if not found or not _prove_right(kind, tries):
        return 0
    for module in found:
        module.grouped_experts = module.forward = kind(module, dtype)
    return len(found)


def _numbers(module: nn.Module, rows: int, columns: int) -> Tensor:
    """Draw numbers for a trial, the same each time, without a change to what is drawn after it. [rows, columns]."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return drawn.to(next(module.parameters()).device)


@torch.inference_mode()
def _prove_right(kind: type, tries: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> bool:
    """Say whether all that a kernel makes is what is wanted, and warn if not."""
    try:
        apart = [_apart(made.float(), wanted.float()) for made, wanted in tries()]
    except Exception as error:  # Triton's own are of no common kind; of memory the first pass will speak
        log.info("It fails", exc_info=True)
        said = f"it fails: {error}".splitlines()[0]
    else:
        wrong = [share for share in apart if not share <= NEAR]  # as NaN
        if not wrong:
            return True
        said = f"a number is off by {wrong[0]:.2g} times the median"
    log.warning("%s is not used on this GPU, and bitsandbytes' products are: %s", kind.__name__, said)
    return False


def _apart(made: Tensor, wanted: Tensor) -> float:
    """Measure how far the worst number is off. Outputs with a large bias round by more, and hide no others."""
    beyond = (made - wanted).abs() - wanted.abs() / 50
    return float((beyond.amax(-1) / wanted.abs().median(-1).values).max())
