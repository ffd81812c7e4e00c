"""Linear layers on a CPU in bf16: reorder their weights once instead of at every call.

oneDNN multiplies blocked matrices. `F.linear` reorders the whole weight to blocks at each call, which at
few rows takes longer than the product. The operators that pack a weight once are those which torch's
inductor uses when it freezes a model; they are private, so they are used here alone, and only after they
gave the very bits of `F.linear` on the weight at hand. The result of every product stays the same.
"""

import logging
from collections.abc import Sequence as Ordered
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Layers that models call one after the other on the same input.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

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


class _Siblings:
    """Linear layers of one input as one product, which takes less time than two or three narrow ones."""

    def __init__(self, packed: Tensor, linears: Ordered[nn.Linear]) -> None:
        self._packed = packed
        self._sizes = [linear.out_features for linear in linears]
        self._bias = _joined(linears)[1]
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # not yet asked for

    def output(self, index: int, input: Tensor) -> Tensor:
        """One layer's output: computed with its siblings' when the first is asked for, then handed out."""
        if input is not self._input or index not in self._outputs:
            outputs = torch.split(_product(input, self._packed, self._bias), self._sizes, -1)
            self._input, self._outputs = input, dict(enumerate(outputs))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class PackedSibling(nn.Module):
    """One of several linear layers that are packed as one. [.., in] → [.., out], a slice."""

    def __init__(self, siblings: _Siblings, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._siblings, self._index = siblings, index

    def forward(self, input: Tensor) -> Tensor:
        return self._siblings.output(self._index, input)


def pack_weights(model: Any) -> int:
    """Replace the model's plain bf16 linear layers on the CPU by packed ones.

    The unpacked weights are freed as it goes, but not one that the embedding shares.

    Returns:
        How many layers were packed: 0 where this torch or this CPU cannot.
    """
    shared = model.get_input_embeddings().weight
    count = 0
    for module in list(model.modules()):
        for names in _families(module):
            linears = [getattr(module, name) for name in names]
            packed = _pack(linears)
            if packed is None:
                return count
            siblings = _Siblings(packed, linears)
            for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
                alone = len(linears) == 1
                new = PackedLinear(packed, linear) if alone else PackedSibling(siblings, index, linear)
                setattr(module, name, new)
                if linear.weight is not shared:
                    linear.weight.data = linear.weight.new_empty(0)
                count += 1
    return count


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear | PackedSibling) for module in model.modules())


def _families(module: nn.Module) -> list[list[str]]:
    """The names of a module's own linear layers that can be packed; those of one input together."""
    names = [name for name, child in module.named_children() if _can_pack(child)]
    families = [list(family) for family in FAMILIES if set(family) <= set(names) and _alike(module, family)]
    return families + [[name] for name in names if not any(name in family for family in families)]


def _alike(module: nn.Module, names: Ordered[str]) -> bool:
    """All with a bias, or none."""
    return len({getattr(module, name).bias is None for name in names}) == 1


def _can_pack(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and not hasattr(module, "_hf_hook")
    return plain and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def _joined(linears: Ordered[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Their weights, one below the other, and their biases."""
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].bias
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    return torch.cat(weights).detach(), None if biases[0] is None else torch.cat(biases).detach()


def _pack(linears: Ordered[nn.Linear]) -> Tensor | None:
    """The packed weight, or None where packing is not to be had or changes a bit of the result."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    weight, bias = _joined(linears)
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        trial = weight[: min(4, len(weight))].contiguous()  # [4, in]: any rows of the right width
        expected = torch.cat([F.linear(trial, linear.weight, linear.bias) for linear in linears], -1)
        same = torch.equal(_product(trial, packed, bias), expected)
    except (RuntimeError, AttributeError, TypeError) as error:
        log.info("Weights are not packed: %s", error)
        return None
    if not same:
        log.info("Weights are not packed: the product's bits would change")
    return packed if same else None


def _product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output
