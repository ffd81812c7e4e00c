"""Reorder the weights of linear layers on a CPU in bf16 once, instead of at every call.

A CPU with AVX2 or more multiplies by kernels of our own (linear_vectors.py, linear_tiles.py), but for layers
that do not fill whole blocks. There oneDNN multiplies blocked matrices, and `F.linear` reorders the whole
weight to blocks at each call, which at few rows takes longer than the product. The operators that pack a
weight once are those which torch's inductor uses when it freezes a model; they are private, so they are used
here alone, and only after they gave the very bits of `F.linear` on the weight at hand.
"""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.cpu import load_kernels

# Layers that models call one after the other on the same input.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedWeight:
    """Hold one weight, or those of siblings one below the other, in an order for products."""

    weight: Tensor  # [M/32, K/32, 2, 16, 16, 2] for our own, else in oneDNN's own order
    bias: Tensor | None  # [M]
    kernels: ModuleType | None  # cpu.kernels.operators, where they multiply
    interleaved: bool = False  # 16 outputs of the first and 16 of the second sibling take turns

    def product(self, input: Tensor) -> Tensor:
        """Multiply. [.., K] → [.., M]."""
        output: Tensor = (
            self.kernels.linear(input, self.weight, self.bias)
            if self.kernels
            else torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        )
        return output

    def gated(self, input: Tensor) -> Tensor:
        """Compute silu(first sibling) · second. [.., K] → [.., M/2]."""
        assert self.kernels is not None
        assert self.interleaved
        output: Tensor = self.kernels.linear(input, self.weight, self.bias, gated=True)
        return output

    def split(self, output: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """Split an output into the siblings' own."""
        if not self.interleaved:
            return torch.split(output, sizes, -1)
        turns = output.view(*output.shape[:-1], -1, 2, 16)
        return [turns[..., i, :].flatten(-2) for i in (0, 1)]


class PackedLinear(nn.Module):
    """Replace a linear layer by one whose weight is in a better order. [.., in] → [.., out]."""

    def __init__(self, packed: PackedWeight, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = packed

    def forward(self, input: Tensor) -> Tensor:
        return self.packed.product(input)


class _Siblings:
    """Compute linear layers of one input as one product, which takes less time than two or three narrow ones."""

    def __init__(self, packed: PackedWeight, linears: Sequence[nn.Linear]) -> None:
        self.packed = packed
        self._sizes = [linear.out_features for linear in linears]
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # not yet asked for

    def output(self, index: int, input: Tensor) -> Tensor:
        """Hand out one layer's output: computed with its siblings' when the first is asked for."""
        if input is not self._input or index not in self._outputs:
            outputs = self.packed.split(self.packed.product(input), self._sizes)
            self._input, self._outputs = input, dict(enumerate(outputs))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class PackedSibling(nn.Module):
    """Replace one of several linear layers that are packed as one. [.., in] → [.., out], a slice."""

    def __init__(self, siblings: _Siblings, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._siblings, self._index = siblings, index

    @property
    def packed(self) -> PackedWeight:
        return self._siblings.packed

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
    """Name a module's own linear layers that can be packed; those of one input together."""
    names = [name for name, child in module.named_children() if _can_pack(child)]
    families = [list(family) for family in FAMILIES if set(family) <= set(names) and _alike(module, family)]
    return families + [[name] for name in names if not any(name in family for family in families)]


def _alike(module: nn.Module, names: Sequence[str]) -> bool:
    """Say whether all have a bias, or none."""
    return len({getattr(module, name).bias is None for name in names}) == 1


def _can_pack(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear and not hasattr(module, "_hf_hook")
    return plain and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Join their weights, one below the other, and their biases."""
    if len(linears) == 1:
        return linears[0].weight.detach(), linears[0].bias
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    return torch.cat(weights).detach(), None if biases[0] is None else torch.cat(biases).detach()


def _pack(linears: Sequence[nn.Linear]) -> PackedWeight | None:
    """Pack their weights together; None where packing is not to be had."""
    weight, bias = _joined(linears)
    kernels = load_kernels()
    if kernels is not None and kernels.products is not None and all(size % 32 == 0 for size in weight.shape):
        return _pack_blocks(weight, bias, kernels, [linear.out_features for linear in linears])
    return _pack_onednn(linears, weight, bias)


def _pack_blocks(weight: Tensor, bias: Tensor | None, kernels: ModuleType, sizes: list[int]) -> PackedWeight:
    """Pack for the kernels. Two siblings of one size, gate and up, take turns, to lie side by side."""
    interleaved = len(sizes) == 2 and sizes[0] == sizes[1]
    if interleaved:
        weight = weight.view(2, -1, 16, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
        bias = bias if bias is None else bias.view(2, -1, 16).transpose(0, 1).flatten()
    return PackedWeight(kernels.pack_blocks(weight), bias, kernels, interleaved)


def onednn_packs() -> bool:
    """Say whether oneDNN has packed weights in bf16 here. On Arm their products differ in bits now and then."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack_onednn(linears: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """Pack for oneDNN; None where torch or this CPU cannot, or where that changes a bit of the result."""
    if not onednn_packs():
        return None
    try:
        packed = PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias, None)
        trial = weight[: min(4, len(weight))].contiguous()  # [4, in]: any rows of the right width
        expected = torch.cat([F.linear(trial, linear.weight, linear.bias) for linear in linears], -1)
        same = torch.equal(packed.product(trial), expected)
    except (RuntimeError, AttributeError, TypeError) as error:
        log.info("Weights are not packed: %s", error)
        return None
    if not same:
        log.info("Weights are not packed: the product's bits would change")
    return packed if same else None
