"""How much may be in flight: free memory over the bytes that a token's keys and values take."""

from typing import Any

import psutil
import torch

MAX_ROWS = 128  # more rows make no step faster on any device measured so far


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """2 · L · H_kv · D · bytes, from a transformers config; sliding windows count as full attention."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What a device can still hold."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def in_flight(model: Any, fraction: float, max_rows: int | None, max_tokens: int | None) -> tuple[int, int]:
    """Rows and tokens in flight: as asked, else what the free memory holds.

    Args:
        fraction: of the free memory, for keys and values and the work of a pass.
    """
    weight = model.get_input_embeddings().weight
    per_token = kv_bytes_per_token(model.config.get_text_config(), model.dtype)
    tokens = max_tokens or int(free_bytes(weight.device) * fraction) // per_token
    return max_rows or MAX_ROWS, tokens


def context_tokens(config: Any) -> int:
    """The longest prompt and completion together, from a transformers config."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
