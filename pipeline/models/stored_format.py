"""The format that a checkpoint's weights are quantized in, as its config.json says. No torch."""

from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Dtype, QuantConfig, QuantMethod


def checkpoint_format(config: Mapping[str, Any]) -> str | None:
    """As int8, nf4, fp8 or gptq; None for weights that are plain numbers."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return "unknown"
    if settings.get("load_in_8bit"):
        return QuantMethod.int8.value
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", QuantMethod.fp4.value))
    return str(settings.get("quant_method", "unknown"))


def label(found: str) -> str:
    """How a plan, a check and a report name it."""
    return f"{found} (checkpoint)"


def as_quant(config: Mapping[str, Any], quant: QuantConfig) -> QuantConfig:
    """What bitsandbytes' own checkpoints are quantized to; `quant` for all others."""
    settings, found = config.get("quantization_config"), checkpoint_format(config)
    if not isinstance(settings, Mapping) or found not in ("int8", "nf4", "fp4"):
        return quant
    compute = str(settings.get("bnb_4bit_compute_dtype"))
    return QuantConfig(
        QuantMethod(found),
        quant.dtype,
        double_quant=found != "int8" and bool(settings.get("bnb_4bit_use_double_quant")),
        compute_dtype=Dtype(compute) if compute in ("float16", "bfloat16") else Dtype.float32,
    )
