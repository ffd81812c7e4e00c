"""Read the format that a checkpoint's weights are quantized in from its config.json, and write bitsandbytes' own."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.common.packages import can_import
from pipeline.config.model_files import find_file
from pipeline.config.quant import STORED_BITS, Dtype, QuantConfig, QuantMethod

_MARK = " (checkpoint)"  # ends the name of a format that came with the weights
_BITSANDBYTES = tuple(method.name for method in QuantMethod if method.bits is not None)
SKIPPED = "llm_int8_skip_modules"  # bitsandbytes' list of modules that stay plain, of 4 bits too
# What transformers needs to read a format, by the names of the package index.
PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto-round",),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
# Formats that transformers turns into plain weights as it reads them, where its config asks for that.
AS_READ = ("fp8", "mxfp8", "mxfp4", "metal", "compressed-tensors")


def checkpoint_format(config: Mapping[str, Any]) -> str | None:
    """Name the format, as int8, nf4, fp8 or gptq; None for weights that are plain numbers."""
    settings: Any = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        return "unknown"
    if settings.get("load_in_8bit"):
        return QuantMethod.int8.name
    if settings.get("load_in_4bit"):
        return _word(settings.get("bnb_4bit_quant_type", QuantMethod.fp4.name))
    return _word(settings.get("quant_method")) or "unknown"


def _word(found: Any) -> str:
    """Make a word of what a file says, fit for a terminal and the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", str(found or ""))[:40]


def format_on_disk(name: str, revision: str | None, models_dir: str) -> str | None:
    """Name the format of a model of which config.json is on this machine; None where it is not, or says nothing."""
    path = find_file(name, revision, models_dir)
    try:
        config = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # loading it says what is wrong
        return None
    return checkpoint_format(config) if isinstance(config, dict) else None


def label(found: str) -> str:
    """Name a format as a plan, a check and a report do."""
    return found + _MARK


def is_label(name: str) -> bool:
    """Say whether a quantization's name is that of a checkpoint's own format."""
    return name.endswith(_MARK)


def label_bits(name: str) -> float:
    """Return the bits of a weight in a checkpoint's own format, as near as its name tells."""
    return STORED_BITS.get(name.removesuffix(_MARK), 8 if "8" in name else 4)


def can_dequantize(found: str) -> bool:
    """Say whether there is a way from a format to plain weights."""
    return found in (*AS_READ, *_BITSANDBYTES)


def dequantizes(config: Mapping[str, Any], quant: QuantConfig, gpus: tuple[Gpu, ...]) -> bool:
    """Say whether a checkpoint's weights become plain ones: as asked, or as these GPUs do not compute in its format.

    Args:
        gpus: those that a job may use; () is the CPU.
    """
    found, settings = checkpoint_format(config), config.get("quantization_config")
    if found is None or not isinstance(settings, Mapping):
        return False
    if quant.dtype is not Dtype.auto and not quant.quantized:
        return True
    if found in ("fp8", "mxfp8", "mxfp4"):
        # transformers has its GPU kernels for them from the hub, by this package.
        computes = found == "mxfp4" or all(_multiplies_fp8(gpu) for gpu in gpus)
        return not gpus or not computes or not can_import("kernels")
    # compressed-tensors unpacks all weights in the first pass; where it rounds activations, its layers are needed.
    return found == "compressed-tensors" and not rounds_activations(settings)


def rounds_activations(settings: Mapping[str, Any]) -> bool:
    """Say whether compressed-tensors rounds what goes into its layers or comes out of them, too."""
    groups = settings.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    kinds = ("input_activations", "output_activations")
    return any(bool(group.get(kind)) for group in values if isinstance(group, Mapping) for kind in kinds)


def _multiplies_fp8(gpu: Gpu) -> bool:
    if gpu.backend not in ("cuda", "rocm", "xpu"):
        return False
    return gpu.backend == "xpu" or gpu.capability is None or gpu.capability >= (8, 9)


def bitsandbytes_settings(quant: QuantConfig) -> dict[str, Any]:
    """Write a quantization as bitsandbytes' config has it in transformers; `as_quant` reads it."""
    if not quant.four_bit:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant.method.value,
        "bnb_4bit_use_double_quant": quant.double_quant,
        # bitsandbytes' own default for the products is float32, whatever the weights are.
        "bnb_4bit_compute_dtype": quant.product_dtype,
    }


def as_quant(config: Mapping[str, Any], quant: QuantConfig) -> QuantConfig:
    """Read what bitsandbytes' own checkpoints are quantized to; `quant` for all others."""
    settings, found = config.get("quantization_config"), checkpoint_format(config)
    method = QuantMethod.__members__.get(str(found))
    if not isinstance(settings, Mapping) or method is None or method.bits is None:
        return quant
    stored = QuantConfig(method, quant.dtype)
    if stored.four_bit:
        stored.double_quant = bool(settings.get("bnb_4bit_use_double_quant"))
    compute = str(settings.get("bnb_4bit_compute_dtype"))
    known = (Dtype.float16.value, Dtype.bfloat16.value)
    stored.compute_dtype = Dtype(compute) if compute in known else Dtype.float32
    return stored
