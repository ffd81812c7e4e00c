"""Quantize a mixture's experts, too, which bitsandbytes passes over: they are weights of three dimensions.

Every expert's matrix is quantized apart, by bitsandbytes' own functions and in its own blocks, as soon as its layer's
experts are put together from the files. A pass dequantizes only the experts that it meets, one at a time;
on a CPU the kernels may stand in (engine/cpu/packed_experts.py).
"""

import math
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from pipeline.engine.experts import send_through

_HELD = "quantized_experts"  # a module's own, by the names of its weights
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class BitsAndBytesExpertsConfig(BitsAndBytesConfig):
    """Ask transformers for bitsandbytes' layers and, with the same settings, for quantized experts."""


@dataclass(slots=True)
class QuantizedExperts:
    """Hold how one weight of all experts is quantized; their packed matrices are the module's parameter.

    A matrix is [out, in], whichever way round the model held it.
    """

    shape: tuple[int, int, int]  # experts, out, in
    transposed: bool  # as the model held it
    settings: BitsAndBytesConfig
    states: list[Any] = field(default_factory=list)  # each expert's scales: a QuantState, in 8 bits a tensor

    def pack(self, weight: Tensor) -> nn.Parameter:
        """Quantize the experts one by one; keep their scales, and return the packed matrices."""
        packed = []
        for matrix in weight.mT if self.transposed else weight:
            codes, state = _quantize(matrix.contiguous(), self.settings)
            packed.append(codes)
            self.states.append(state)
        if not self.settings.load_in_8bit:  # the tables of codes are the same for all
            first = self.states[0]
            for state in self.states:
                state.code = first.code
                if state.nested:
                    state.state2.code = first.state2.code
        return nn.Parameter(torch.stack(packed), requires_grad=False)

    def dequantize(self, packed: Tensor, expert: int) -> Tensor:
        """Give one expert's matrix [out, in]: in 4 bits in the dtype that it had, in 8 bits in float32."""
        from bitsandbytes.functional import dequantize_4bit

        codes, state = packed[expert], self.states[expert]
        if self.settings.load_in_8bit:  # as bitsandbytes' own function, in one pass over the matrix
            return torch.mul(codes, state[:, None] / 127)
        matrix: Tensor = dequantize_4bit(codes, state)
        return matrix


def _quantize(matrix: Tensor, settings: BitsAndBytesConfig) -> tuple[Tensor, Any]:
    """Quantize a matrix [out, in] as bitsandbytes' linear layers do."""
    from bitsandbytes import functional

    if settings.load_in_8bit:
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        return codes, scales
    return functional.quantize_4bit(
        matrix,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )


def held_experts(module: nn.Module) -> dict[str, QuantizedExperts]:
    """Return what of a module is quantized here, by the names of its parameters; on the meta device, what will be."""
    found: dict[str, QuantizedExperts] = getattr(module, _HELD, {})
    return found


def has_quantized_experts(network: Any) -> bool:
    """Say whether a model has any."""
    return any(map(held_experts, network.modules()))


def count_parameters(network: Any) -> int:
    """Count a loaded model's weights, however they are packed."""
    experts: list[int] = [
        math.prod(held.shape) - getattr(module, name).numel()
        for module in network.modules()
        for name, held in held_experts(module).items()
    ]
    return int(network.num_parameters()) + sum(experts)


def prepare_experts(module: Any, settings: BitsAndBytesConfig) -> None:
    """Have a module's experts quantized as they are loaded, if it says how they lie.

    transformers has marked those whose passes are alike, up to their biases, gates and norms.
    """
    if not hasattr(module, "is_transposed"):
        return
    held = {}
    for name in _PROJECTIONS:
        weight = getattr(module, name, None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 3:
            count, *matrix = weight.shape
            outputs, inputs = reversed(matrix) if module.is_transposed else matrix
            held[name] = QuantizedExperts((count, outputs, inputs), module.is_transposed, settings)
    if held:
        setattr(module, _HELD, held)
        module.forward = MethodType(_forward, module)


def _forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Send tokens through the experts that they chose. hidden [T, D], chosen and weights [T, K] → [T, D]."""
    count = held_experts(experts)["down_proj"].shape[0]
    return send_through(hidden, chosen, weights, count, partial(_one, experts))


def _one(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """Send rows through one expert. [N, D] → [N, D]."""
    if experts.has_gate:
        inner = experts._apply_gate(_multiply(experts, "gate_up_proj", expert, rows))
    else:
        inner = experts.act_fn(_multiply(experts, "up_proj", expert, rows))
    made = _multiply(experts, "down_proj", expert, inner)
    return experts.post_expert_norm(made) if getattr(experts, "has_post_expert_norm", False) else made


def _multiply(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    """Multiply by one expert's matrix, 4-bit ones in the dtype of bitsandbytes' products."""
    held = held_experts(experts)[name]
    dtype = rows.dtype if held.settings.load_in_8bit else held.settings.bnb_4bit_compute_dtype
    matrix = held.dequantize(getattr(experts, name), expert).to(dtype)
    bias = getattr(experts, f"{name}_bias")[expert].to(dtype) if experts.has_bias else None
    return linear(rows.to(dtype), matrix, bias).to(rows.dtype)


class _QuantizeExperts(ConversionOps):
    """Quantize experts as they are loaded, and leave linear layers to bitsandbytes."""

    def __init__(self, linear_layers: Any) -> None:
        self._linear_layers = linear_layers

    def convert(self, input_dict: dict[str, Any], *args: Any, **given: Any) -> dict[str, Any]:
        """Turn weights into what the model is to hold."""
        made: dict[str, Any] = {}
        for path, value in input_dict.items():
            module, name = get_module_from_name(given["model"], path)
            if (held := held_experts(module).get(name)) is None:
                made |= self._linear_layers.convert({path: value}, *args, **given)
            else:
                made[path] = held.pack(value[0] if isinstance(value, list) else value)
                module._is_hf_initialized = True
        return made


class _WithExperts(HfQuantizer):
    """Add experts to one of transformers' quantizers, where they are asked for."""

    modules_to_not_convert: list[str]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **given: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **given)  # type: ignore[no-untyped-call]
        if isinstance(settings := self.quantization_config, BitsAndBytesExpertsConfig):
            for path, module in model.named_modules():
                if should_convert_module(path, self.modules_to_not_convert):
                    prepare_experts(module, settings)

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        """Say whether a weight is to be quantized as it is loaded."""
        module, name = get_module_from_name(model, param_name)
        return name in held_experts(module) or super().param_needs_quantization(model, param_name, **given)

    def get_quantize_ops(self) -> ConversionOps:
        """Give what quantizes a weight."""
        return _QuantizeExperts(super().get_quantize_ops())  # type: ignore[no-untyped-call]


class _FourBits(_WithExperts, Bnb4BitHfQuantizer):
    """Quantize to 4 bits."""


class _EightBits(_WithExperts, Bnb8BitHfQuantizer):
    """Quantize to 8 bits."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **given: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map=device_map, **given)
        for module in model.modules():
            if type(module).__name__ == "Linear8bitLt":
                module.forward = MethodType(_multiply_flat, module)


def _multiply_flat(layer: Any, input: Tensor) -> Tensor:
    """Multiply rows: bitsandbytes' 8-bit products take three dimensions, and DeepSeek's latent keys have four."""
    rows = input.reshape(-1, layer.in_features)
    output: Tensor = type(layer).forward(layer, rows)
    return output.view(*input.shape[:-1], layer.out_features)


AUTO_QUANTIZER_MAPPING |= {"bitsandbytes_4bit": _FourBits, "bitsandbytes_8bit": _EightBits}
