"""How much may be in flight: free memory over the bytes that a token's keys and values take."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.accelerators import model_gpus
from pipeline.architecture import Architecture, architecture
from pipeline.devices import host_free_bytes
from pipeline.engine.forward import input_device
from pipeline.errors import ConfigError
from pipeline.memory_peaks import activation_bytes, logits_bytes, scratch_bytes
from pipeline.memory_plan import KV_CHUNK, Quant, kv_bytes_per_token, kv_cache_bytes

log = logging.getLogger(__name__)

MAX_ROWS = 128  # more rows make no step faster on any device measured so far
UNKNOWN_TOKENS = 1 << 20  # without a prediction: the engine finds the bound when memory runs out


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a job may have in flight. Tokens are of prompt and completion."""

    max_rows: int
    max_tokens: int
    architecture: Architecture | None
    quant: Quant
    free_bytes: int
    prefill_tokens: int  # in one pass

    def refusal(self, prompt_tokens: int) -> str | None:
        """Why a prompt can never fit, though nothing else were in flight; None if it can."""
        if self.architecture is None:
            return None
        arch, quant = self.architecture, self.quant
        kv_cache = kv_cache_bytes(arch, quant, [(1, prompt_tokens)], prefilling=True)
        work = activation_bytes(arch, quant, min(prompt_tokens, self.prefill_tokens), prompt_tokens)
        if kv_cache + work <= self.free_bytes:
            return None
        return (
            f"the prompt's {prompt_tokens} tokens take {kv_cache / 1e6:,.1f} MB of keys and values and "
            f"{work / 1e6:,.1f} MB of work, and {self.free_bytes / 1e6:,.1f} MB are free. "
            "Shorten the prompt, or choose a smaller model or quantization."
        )


def capacity(
    model: Any,
    quant: Quant,
    *,
    fraction: float,
    prefill_tokens: int,
    sampled: bool,
    max_rows: int | None,
    max_tokens: int | None,
) -> Capacity:
    """Rows and tokens in flight: as asked, else what the free memory holds beside the work of a pass.

    Args:
        fraction: of the free memory, for keys and values and the work of a pass.
    """
    device = input_device(model)
    rows = max_rows or MAX_ROWS
    arch = kv_architecture(model.config.get_text_config().to_dict())
    free = free_bytes(device)
    if arch is None:
        return Capacity(rows, max_tokens or UNKNOWN_TOKENS, None, quant, free, prefill_tokens)
    work = (
        activation_bytes(arch, quant, prefill_tokens, prefill_tokens)
        + scratch_bytes(arch, quant, model_gpus(model))
        + logits_bytes(arch, quant, rows, sampled=sampled)
    )
    tokens = tokens_that_fit(arch, quant, int(free * fraction) - work, rows)
    return Capacity(rows, max_tokens or tokens, arch, quant, free, prefill_tokens)


def tokens_that_fit(arch: Architecture, quant: Quant, budget_bytes: int, rows: int) -> int:
    """The most tokens of `rows` equal rows whose keys and values stay within the budget; at least 1.

    Sliding layers count no more than their window, and each row has a chunk allocated ahead.
    """
    per_token = sum(kv_bytes_per_token(arch, quant).values())
    low, high = 1, max(1, budget_bytes // per_token)
    if any(arch.windows):  # a row can be longer than its full attention would let it
        high = max(high, rows * arch.max_position_embeddings)
    while low < high:
        middle = (low + high + 1) // 2
        if kv_cache_bytes(arch, quant, [_equal(middle, rows)]) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _equal(tokens: int, rows: int) -> tuple[int, int]:
    """So many tokens in equal rows: how many rows, and how long."""
    rows = max(1, min(rows, tokens // KV_CHUNK))
    return rows, -(-tokens // rows)


def kv_architecture(config: dict[str, Any]) -> Architecture | None:
    """The architecture; of a model that the memory plan does not know, the same sizes as a Llama, whose
    keys and values are the common kind."""
    for kind in (str(config.get("model_type")), "llama"):
        try:
            return architecture({**config, "model_type": kind})
        except (ConfigError, TypeError, ValueError):
            continue
    log.warning("The memory of this model's keys and values is not known; the engine will find the bound")
    return None


def free_bytes(device: torch.device) -> int:
    """What a device can still hold."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return host_free_bytes()


def context_tokens(config: Any) -> int:
    """The longest prompt and completion together, from a transformers config."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
