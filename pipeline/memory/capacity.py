"""Decide how much may be in flight: free memory over the bytes that a token's keys and values take."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.common.gpu import Gpu
from pipeline.common.units import megabytes
from pipeline.config.quant import QuantConfig
from pipeline.engine.accelerators import describe, free_bytes
from pipeline.engine.limits import CPU, Limits
from pipeline.engine.model_facts import input_device
from pipeline.memory.architecture import Architecture, in_context, known_architecture
from pipeline.memory.peaks import activation_bytes, work_bytes
from pipeline.memory.plan import kv_bytes_per_token, kv_cache_bytes, row_state_bytes

log = logging.getLogger(__name__)

UNKNOWN_TOKENS = 1 << 20  # without a prediction: the engine finds the bound when memory runs out


@dataclass(frozen=True, slots=True)
class Place:
    """A device that holds layers, and so their keys and values."""

    name: str
    free_bytes: int
    layers: tuple[int, ...]
    gpus: tuple[Gpu, ...]  # the device itself; () is the CPU

    def part(self, arch: Architecture) -> Architecture:
        """Return the model as far as this device's keys and values go: with its layers only."""
        windows = tuple(arch.windows[layer] for layer in self.layers)
        return replace(
            arch,
            windows=windows,
            layer_keys=tuple(arch.layer_keys[layer] for layer in self.layers),
            layer_states=tuple(arch.layer_states[layer] for layer in self.layers if arch.layer_states),
            layer_state_bytes=tuple(
                arch.layer_state_bytes[layer] for layer in self.layers if arch.layer_states
            ),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """Say what a job may have in flight. Tokens are of prompt and completion."""

    max_rows: int
    max_tokens: int
    architecture: Architecture | None
    quant: QuantConfig
    places: tuple[Place, ...]
    prefill_tokens: int  # in one pass

    def refusal(self, prompt_tokens: int) -> str | None:
        """Say why a prompt can never fit, though nothing else were in flight; None if it can."""
        arch, quant = self.architecture, self.quant
        if arch is None:
            return None
        tokens = min(prompt_tokens, self.prefill_tokens)
        for place in self.places:
            kv_cache = kv_cache_bytes(place.part(arch), quant, [(1, prompt_tokens)], prefilling=True)
            work = activation_bytes(arch, quant, tokens, prompt_tokens, place.gpus)
            if kv_cache + work > place.free_bytes:
                return (
                    f"the prompt's {prompt_tokens} tokens take {megabytes(kv_cache)} of keys and values and "
                    f"{megabytes(work)} of work, and {megabytes(place.free_bytes)} are free on {place.name}. "
                    "Shorten the prompt, or choose a smaller model or quantization."
                )
        return None


def capacity(
    model: Any,
    quant: QuantConfig,
    *,
    arch: Architecture | None,
    limits: Limits,
    fraction: float,
    prefill_tokens: int,
    copies_logits: bool,
    max_rows: int | None,
    max_tokens: int | None,
    context: int | None = None,
) -> Capacity:
    """Decide the rows and tokens in flight: as asked, else what the free memory holds beside the work of a pass.

    Args:
        arch: None where the model could not be predicted: then its config is read as that of the commonest kind.
        limits: of the way that keys and values are held.
        fraction: of the free memory, for keys and values and the work of a pass.
        context: of one row, where it is not the config's own.
    """
    rows = max_rows or limits.max_rows
    arch = arch or kv_architecture(in_context(model.config.get_text_config().to_dict(), context))
    if arch is None:
        return Capacity(rows, max_tokens or UNKNOWN_TOKENS, None, quant, (), prefill_tokens)
    found = places(model)
    budgets = [
        int(place.free_bytes * fraction)
        - work_bytes(arch, quant, place.gpus, prefill_tokens, rows, copies_logits)
        for place in found
    ]
    rows = rows_for_states(arch, quant, found, budgets, rows)
    tokens = tokens_on_all(arch, quant, found, budgets, rows, limits)
    return Capacity(rows, max_tokens or tokens, arch, quant, found, prefill_tokens)


def places(model: Any) -> tuple[Place, ...]:
    """Find the devices that a model's layers compute on."""
    layers: dict[torch.device, list[int]] = {}
    for layer, device in enumerate(layer_devices(model)):
        layers.setdefault(device, []).append(layer)
    return tuple(
        Place("the CPU", free_bytes(device), tuple(own), ())
        if device.type == "cpu"
        else Place(str(device), free_bytes(device), tuple(own), (describe(device),))
        for device, own in layers.items()
    )


def layer_devices(model: Any) -> list[torch.device]:
    """Say where each decoder layer computes: on its weights' device, or the one they are brought to."""
    count = int(model.config.get_text_config().num_hidden_layers)
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    if (stack := next(stacks, None)) is None:
        return [input_device(model)] * count
    return [_device(layer) for layer in stack]


def _device(layer: nn.Module) -> torch.device:
    """Find the device of the layer's first weight; of one that is offloaded, where its hook brings it."""
    holder = next(m for m in layer.modules() if next(m.parameters(recurse=False), None) is not None)
    device = next(holder.parameters(recurse=False)).device
    return torch.device(holder._hf_hook.execution_device) if device.type == "meta" else device  # type: ignore[union-attr,arg-type]


def rows_for_states(
    arch: Architecture, quant: QuantConfig, places: Sequence[Place], budgets_bytes: Sequence[int], rows: int
) -> int:
    """Bound the rows by the states that each has: half of a budget, or all of it where there are no keys and values."""
    for place, budget in zip(places, budgets_bytes, strict=True):
        part = place.part(arch)
        if state_bytes := row_state_bytes(part, quant):
            share = budget // 2 if any(part.layer_keys) else budget
            rows = max(1, min(rows, share // state_bytes))
    return rows


def tokens_on_all(
    arch: Architecture,
    quant: QuantConfig,
    places: Sequence[Place],
    budgets_bytes: Sequence[int],
    rows: int,
    limits: Limits = CPU,
) -> int:
    """Find the most tokens of `rows` equal rows that every device holds: each has the keys of its own layers."""
    return min(
        tokens_that_fit(place.part(arch), quant, budget, rows, limits)
        for place, budget in zip(places, budgets_bytes, strict=True)
    )


def tokens_that_fit(
    arch: Architecture, quant: QuantConfig, budget_bytes: int, rows: int, limits: Limits = CPU
) -> int:
    """Find the most tokens of `rows` equal rows whose keys and values stay within the budget; at least 1.

    In rectangles, sliding layers count no more than their window; each row has a chunk allocated ahead.
    """
    per_token = sum(kv_bytes_per_token(arch, quant).values())
    low, high = 1, max(1, budget_bytes // max(per_token, 1))
    if limits.cuts_windows and any(arch.windows):  # a row can be longer than its full attention would let it
        high = max(high, rows * arch.max_position_embeddings)
    while low < high:
        middle = (low + high + 1) // 2
        held = _equal(middle, rows, limits)
        if kv_cache_bytes(arch, quant, [held], limits=limits) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _equal(tokens: int, rows: int, limits: Limits) -> tuple[int, int]:
    """Split so many tokens in equal rows: how many rows, and how long."""
    rows = max(1, min(rows, tokens // max(limits.chunk, 1)))
    return rows, -(-tokens // rows)


def kv_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Read the config of the part that makes text, where there is no formula as that of a Llama of the same sizes."""
    for kind in (config.get("model_type"), "llama"):
        if (arch := known_architecture({**config, "model_type": kind})) is not None:
            return arch
    log.warning("The memory of this model's keys and values is not known; the engine will find the bound")
    return None


def context_tokens(config: Any, asked: int | None = None) -> int:
    """Return the longest prompt and completion together: as asked, else from a transformers config."""
    return asked or int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
