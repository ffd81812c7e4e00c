"""Reorder the weights of linear layers on a CPU once, instead of at every call.

A CPU with AVX2 or more multiplies by kernels of our own (linear_vectors.py, linear_tiles.py, linear_floats.py), in
bf16, in float32 and in bitsandbytes' 4 and 8 bits, but for layers that do not fill whole blocks. Those that are
quantized stay bitsandbytes' own. For those in bf16, oneDNN multiplies blocked matrices, and `F.linear` reorders the
whole weight to blocks at each call, which at few rows takes longer than the product. The operators that pack a weight
once are those which torch's inductor uses when it freezes a model; they are private, so they are used here alone, and
only after they gave the very bits of `F.linear` on the weight at hand.
"""

import logging
import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.cpu import onednn_has_bf16
from pipeline.engine.cpu.packed_experts import pack_experts
from pipeline.engine.cpu.packed_weight import (
    PackedWeight,
    fills_blocks,
    multiplies,
    one_below_the_other,
    pack_matrices,
)
from pipeline.engine.cpu.read_weights import read_weights
from pipeline.engine.model_facts import is_adapted, outside_adapters

# Layers that models call one after the other on the same input.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """Replace a linear layer by one whose weight is in a better order. [.., in] → [.., out]."""

    def __init__(self, packed: PackedWeight, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = _stand_in(linear), linear.bias
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
        self.weight = _stand_in(linear)
        self._siblings, self._index = siblings, index

    @property
    def packed(self) -> PackedWeight:
        return self._siblings.packed

    def forward(self, input: Tensor) -> Tensor:
        return self._siblings.output(self._index, input)


def pack_weights(model: Any) -> int:
    """Replace the model's linear layers on the CPU by those of the kernels.

    Plain ones in bf16 or float32 and bitsandbytes' in 4 and 8 bits are packed, as are the experts of mixtures; the
    unpacked weights are freed as it goes, but not one that the embedding shares.

    Returns:
        How many layers were replaced, a layer's experts as one: 0 where this torch or this CPU cannot.
    """
    shared = model.get_input_embeddings().weight
    count = 0
    made: dict[tuple[Tensor, ...], PackedWeight] = {}  # Zamba has one weight in several layers
    # What a layer is given. bitsandbytes rounds it to bf16 on some CPUs, where float32 would have been multiplied: the
    # last bit of another operator would change a text, so a model of its layers in float32 stays all as it is.
    by_bitsandbytes = getattr(model, "quantization_method", None) == "bitsandbytes"
    if shared.dtype not in (torch.bfloat16, *([] if by_bitsandbytes else [torch.float32])):
        return count
    # The head comes last: what it takes twice is the most, and no layer's own copies come on top of it.
    for module in reversed(outside_adapters(model)):
        count += pack_experts(module, shared.dtype)
        for names in _families(module, shared.dtype):
            linears = [getattr(module, name) for name in names]
            weights = tuple(linear.weight for linear in linears)
            packed = made.get(weights) or _pack(linears)
            if packed is None:
                continue
            made[weights] = packed
            siblings = _Siblings(packed, linears)
            for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
                alone = len(linears) == 1
                new = PackedLinear(packed, linear) if alone else PackedSibling(siblings, index, linear)
                setattr(module, name, new)
                if linear.weight is not shared:
                    _free(linear)
                count += 1
    return count


def multiplies_as_bitsandbytes_in_8_bits(model: nn.Module) -> bool:
    """Say whether a product of LLM.int8 is left in the model."""
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def is_packed(model: nn.Module) -> bool:
    return bool(_packed_weights(model))


def is_packed_by_onednn(model: nn.Module) -> bool:
    """Say whether oneDNN multiplies by some of its weights."""
    return any(weight.kernels is None for weight in _packed_weights(model))


def _packed_weights(model: nn.Module) -> list[PackedWeight]:
    return [m.packed for m in model.modules() if isinstance(m, PackedLinear | PackedSibling)]


def _families(module: nn.Module, dtype: torch.dtype) -> list[list[str]]:
    """Name a module's own linear layers that can be packed for inputs in this dtype; those of one input together."""
    names = [name for name, child in module.named_children() if _can_pack(child, dtype)]
    names = [name for name in names if name not in read_weights(type(module))]
    families = [list(family) for family in FAMILIES if set(family) <= set(names) and _alike(module, family)]
    return families + [[name] for name in names if not any(name in family for family in families)]


def _alike(module: nn.Module, names: Sequence[str]) -> bool:
    """Say whether all hold their weights alike, and all have a bias or none has."""
    linears = [getattr(module, name) for name in names]
    return len({(linear.bias is None, _codes_of(linear)) for linear in linears}) == 1


def _can_pack(module: nn.Module, dtype: torch.dtype) -> bool:
    if is_adapted(module):
        return False
    kind = type(module).__name__
    here = not hasattr(module, "_hf_hook") and getattr(module, "weight", None) is not None
    if not here or module.weight.device.type != "cpu":
        return False
    if kind in ("Linear4bit", "Linear8bitLt"):
        return multiplies() and dtype == torch.bfloat16 and _can_pack_quantized(module)
    return _is_plain(module) and bool(module.weight.dtype == dtype)


def _is_plain(module: Any) -> bool:
    """Say whether no other library has put its own pass, hook or kind of weight into a linear layer."""
    own = "forward" in vars(module) or hasattr(module, "_hf_hook")
    return type(module) is nn.Linear and not own and type(module.weight) is nn.Parameter


def _can_pack_quantized(linear: Any) -> bool:
    """Say whether a layer of bitsandbytes fills whole blocks, multiplies in bf16, and is still as it was loaded."""
    state = _state_of(linear)
    in_bf16 = _codes_of(linear) == "int8" or linear.compute_dtype == torch.bfloat16
    bias_fits = linear.bias is None or linear.bias.dtype == torch.bfloat16
    return (
        state is not None
        and in_bf16
        and bias_fits
        and fills_blocks(linear.out_features, linear.in_features, state)
    )


def _codes_of(linear: Any) -> str | None:
    """Name the type of a layer's codes, as nf4 or int8; None where its weight is plain."""
    if type(linear).__name__ == "Linear8bitLt":
        return "int8"
    return getattr(linear.weight, "quant_type", None)


def _stand_in(linear: nn.Linear) -> Tensor:
    """Make what models find in a packed weight's place: its dtype, device and shape, and no number to compute with."""
    if _codes_of(linear):
        return linear.weight.new_empty(0)
    return linear.weight.new_full((1, 1), math.nan).expand(linear.out_features, linear.in_features)


def _free(linear: Any) -> None:
    """Give a weight's memory back. bitsandbytes' layer and weight refer to each other, and would wait for it."""
    codes, linear.weight.data = _codes_of(linear), linear.weight.new_empty(0)
    if codes == "int8":
        linear.weight.CB = linear.weight.SCB = None
    elif codes:
        linear.weight.quant_state = linear.quant_state = None


def _pack(linears: Sequence[nn.Linear]) -> PackedWeight | None:
    """Pack their weights together; None where packing is not to be had."""
    sizes = linears[0].in_features, sum(linear.out_features for linear in linears)
    whole = all(size % 32 == 0 for size in sizes)
    if multiplies() and whole:
        return _pack_blocks(linears)
    return _pack_onednn(linears) if linears[0].weight.dtype == torch.bfloat16 else None


def _pack_blocks(linears: Sequence[Any]) -> PackedWeight:
    """Pack for the kernels. Two siblings of one size, gate and up, take turns."""
    interleaved = len(linears) == 2 and linears[0].out_features == linears[1].out_features
    return pack_matrices(
        [linear.weight.data for linear in linears],
        [_state_of(linear) for linear in linears],
        [linear.bias for linear in linears],
        interleaved=interleaved,
    )


def _state_of(linear: Any) -> Any:
    """Return bitsandbytes' scales of a layer; None where its weight is plain."""
    return linear.weight.SCB if _codes_of(linear) == "int8" else getattr(linear.weight, "quant_state", None)


def onednn_packs() -> bool:
    """Say whether oneDNN has packed weights in bf16 here. On Arm their products differ in bits now and then."""
    return platform.machine() in ("x86_64", "AMD64") and onednn_has_bf16()


def _pack_onednn(linears: Sequence[nn.Linear]) -> PackedWeight | None:
    """Pack for oneDNN; None where torch or this CPU cannot, or where that changes a bit of the result."""
    if not onednn_packs():
        return None
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    weight = one_below_the_other(weights)
    bias = None if biases[0] is None else one_below_the_other(biases)
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
