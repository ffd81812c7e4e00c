"""Come between a model and its attention.

The function is registered with transformers under ATTENTION, and gets the pass that it belongs to as the
keyword argument `batch`, which models hand down to it: that knows where keys and values are. No mask function
is registered beside it: then transformers makes no mask, and does not look for packed samples, which would
wait for the device.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "pipeline"

# What models hand down that changes no attention: positions are in the rotation already.
NO_MATTER = {"position_ids", "cache_position", "return_dict", "output_router_logits", "output_attentions"}


class Pass(Protocol):
    """Know what one forward pass over rows of the running batch attends to."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Give each layer's sliding window; None is full attention."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store new keys and values, and attend. query [N, H, D], key and value [N, H_kv, D] → [N, H, D]."""
        ...


def batch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    batch: Pass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it. query [1, H, N, D], key and value [1, H_kv, N, D] → [1, N, H, D].

    Raises:
        NotImplementedError: the model asks for something that this attention does not compute.
    """
    if batch is None:
        raise NotImplementedError("this model does not hand a pass down to its attention")
    if attention_mask is not None:
        raise NotImplementedError("this model makes an attention mask of its own")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if unknown := [name for name, value in options.items() if _asks(name, value, batch.windows[layer])]:
        raise NotImplementedError(f"this model's attention is asked for {', '.join(sorted(unknown))}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return batch.attend(layer, q, k, v, scaling or query.shape[-1] ** -0.5)[None], None


def _asks(name: str, value: Any, window: int | None) -> bool:
    """Say whether an option asks for something else than causal attention in this window."""
    if name == "sliding_window":
        return bool(value != window)
    if name == "is_causal":
        return value is False
    return name not in NO_MATTER and (isinstance(value, Tensor) or value not in (None, 0))


AttentionInterface.register(ATTENTION, batch_attention)
