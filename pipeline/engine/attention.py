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


class Pass(Protocol):
    """Know what one forward pass over rows of the running batch attends to."""

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
    if batch is None or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("this model's attention is not plain scaled dot-product attention")
    layer: int = module.layer_idx  # type: ignore[assignment]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return batch.attend(layer, q, k, v, scaling or query.shape[-1] ** -0.5)[None], None


AttentionInterface.register(ATTENTION, batch_attention)
