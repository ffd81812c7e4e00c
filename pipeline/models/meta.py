"""Build a model on torch's meta device: tensors that have a shape and a dtype but no memory.

transformers builds it, and its quantizer puts bitsandbytes' layers in, as `from_pretrained` would.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_tie_weights
from transformers.quantizers.auto import AutoHfQuantizer

from pipeline.common.errors import ConfigError, LoadError
from pipeline.common.gpu import Gpu
from pipeline.config.model_files import CONFIG
from pipeline.config.quant import QUANTS, Dtype, QuantConfig
from pipeline.config.stored_format import SKIPPED, as_quant, checkpoint_format, dequantizes, label
from pipeline.models.formats import quantization
from pipeline.models.loading_checks import first_line
from pipeline.models.quantized_share import packed_shape


def build_on_meta(
    config: Any, quant: QuantConfig, *, trust_remote_code: bool = False, skipped: list[str] | None = None
) -> Any:
    """Build the model of a transformers config as `quant` would load it.

    Args:
        skipped: modules that stay plain, in place of the head.

    Raises:
        ConfigError: transformers does not know it as a causal language model.
        LoadError: its sizes do not belong together.
    """
    own = getattr(config, "dtype", None) or torch.float32
    dtype = own if quant.dtype is Dtype.auto else getattr(torch, quant.dtype.value)
    try:
        with (
            torch.device("meta"),
            no_tie_weights(),
        ):  # which weights are quantized is decided before they are tied
            network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ConfigError(
            f"{config.model_type}: not a causal language model of this transformers "
            f"({str(error).splitlines()[0][:200]})",
            "Choose another model",
        ) from error
    except Exception as error:
        raise LoadError(
            f"{config.model_type}: transformers cannot make a model of this config: {first_line(error)}",
            f"Copy or download {CONFIG} again, or choose another model",
        ) from error
    if (settings := quantization(quant)) is not None:
        settings.llm_int8_skip_modules = skipped
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(network, device_map=None)
        _cast_biases(network, dtype)
    network.tie_weights()
    return network


def quantized_shapes(config: Any, skipped: list[str] | None) -> dict[str, list[int]]:
    """Find the weights that are quantized, [out, in]: some models hold theirs the other way round."""
    network = build_on_meta(config, QUANTS["nf4"], skipped=skipped)
    return {
        f"{path}.{own}": list(shape)
        for path, module in network.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if (shape := packed_shape(own, module))
    }


def loaded_as(
    config: Any, quant: QuantConfig, gpus: tuple[Gpu, ...], source: str
) -> tuple[Any, QuantConfig, list[str] | None]:
    """Say what a checkpoint that came quantized is loaded as: plain, or by bitsandbytes, which leaves out a list.

    Raises:
        ConfigError: its layers are another library's.
    """
    values = config.to_dict()
    found, settings = checkpoint_format(values), getattr(config, "quantization_config", None)
    if found is None:
        return config, quant, None
    plain, stored = dequantizes(values, quant, gpus), as_quant(values, quant)
    if not plain and not stored.quantized:
        raise ConfigError(
            f"{source}: its weights are quantized already, {label(found)}, and its layers are known once it is loaded",
            "Use `python -m pipeline plan` for its memory",
        )
    del config.quantization_config
    return config, quant if plain else stored, None if plain else dict(settings or {}).get(SKIPPED)


def _cast_biases(network: nn.Module, dtype: torch.dtype) -> None:
    """Give biases the model's dtype: in bitsandbytes' layers they are float32 until they are loaded."""
    for module in network.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
