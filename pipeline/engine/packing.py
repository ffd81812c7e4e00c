"""Linear layers on a CPU in bf16: reorder their weights once instead of at every call.

oneDNN multiplies blocked matrices. `F.linear` reorders the whole weight to blocks at each call, which at
few rows takes longer than the product. The operators that pack a weight once are those which torch's
inductor uses when it freezes a model; they are private, so they are used here alone, and only after they
gave the very bits of `F.linear` on the weight at hand. The result of every product stays the same.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in oneDNN's own order. [.., in] → [.., out]."""

    def __init__(self, packed: Tensor, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = packed

    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self._packed, self.bias)


def pack_weights(model: Any) -> int:
    """Replace the model's plain bf16 linear layers on the CPU by packed ones.

    The unpacked weights are freed as it goes, but not one that the embedding shares.

    Returns:
        How many layers were packed: 0 where this torch or this CPU cannot.
    """
    shared = model.get_input_embeddings().weight
    count = 0
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and _on_cpu(module):
            packed = _pack(module)
            if packed is None:
                break
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PackedLinear(packed, module))
            if module.weight is not shared:
                module.weight.data = module.weight.new_empty(0)
            count += 1
    return count


def _on_cpu(module: nn.Linear) -> bool:
    return module.weight.device.type == "cpu" and not hasattr(module, "_hf_hook")


def _pack(module: nn.Linear) -> Tensor | None:
    """The packed weight, or None where packing is not to be had or changes a bit of the result."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    weight = module.weight.detach()
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        trial = weight[: min(4, len(weight))].contiguous()  # [4, in]: any rows of the right width
        same = torch.equal(_product(trial, packed, module.bias), F.linear(trial, weight, module.bias))
    except (RuntimeError, AttributeError, TypeError) as error:
        log.info("Weights are not packed: %s", error)
        return None
    if not same:
        log.info("Weights are not packed: the product's bits would change")
    return packed if same else None


def _product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output
