"""Check that a checkpoint can be loaded, and say what to do where it cannot. All raise LoadError."""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.quantizers.auto import AutoHfQuantizer

from pipeline.common import terminal
from pipeline.common.errors import LoadError
from pipeline.common.packages import is_installed
from pipeline.config.quant import SMALLEST, Dtype, QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.config.stored_format import PACKAGES, can_dequantize, checkpoint_format, label
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.config_checks import beyond, check_context
from pipeline.models.layer_checks import check_layers
from pipeline.models.quantized_share import quantized_share

# Masks and frequencies that older releases saved, and scales for keys and values in 8 bits, which stay in 16.
_HARMLESS = re.compile(r"(inv_freq|masked_bias|\battn\.bias|attention\.bias|position_ids|[kv]_scale)$")
SMALLER = f"Try a smaller quantization (quant={SMALLEST}) or a smaller model"


def check_unused(network: Any, names: list[str], checkpoint: Checkpoint) -> None:
    """Refuse weights of the files that a layer or a stack of layers should have had, and name all others.

    transformers has left out those that it knows a model to do without, and has only warned of the rest.
    """
    aside: set[str] = set()
    for name in names:
        owner, part = _owner(network, name)
        if isinstance(owner, PreTrainedModel):  # a part of its own: another head, a vision tower
            aside.add(part)
        elif not _HARMLESS.search(name) and not _predicts_ahead(network, name):
            raise LoadError(
                f"{checkpoint.source}: its files have weights that the model does not use, as {name}: config.json "
                "and the weights do not belong together, or this transformers does not read their format",
                f"{checkpoint.again}, or choose another copy of the model",
            )
    if aside:
        terminal.say(f"Not used of the checkpoint's weights: {', '.join(sorted(aside))}.", style="yellow")


def check_quantized(network: Any, quant: QuantConfig, checkpoint: Checkpoint) -> float:
    """Refuse a model of which nothing was quantized, say where much was passed over, and return the share."""
    found = quantized_share(network, quant)
    if found.share == 0:
        kinds = ", ".join(found.passed_over)
        raise LoadError(
            f"{checkpoint.source}: quant={quant.method.value} quantizes none of its weights: bitsandbytes takes plain "
            f"linear layers, and this architecture has others ({kinds})",
            "Use quant=none, or a copy of the model that its makers have quantized",
        )
    if found.passed_over:
        terminal.say(f"{found.words}.", style="yellow")
    return found.share


def _owner(network: Any, name: str) -> tuple[Any, str]:
    """Find the innermost module of the model that a weight's name leads to, and the first part that it lacks."""
    owner, path = network, list[str]()
    for part in name.split("."):
        path.append(part)
        child = getattr(owner, "_modules", {}).get(part)
        if child is None:
            break
        owner = child
    return owner, ".".join(path)


def _predicts_ahead(network: Any, name: str) -> bool:
    """Say whether it is of a layer behind the last, for tokens further ahead."""
    config = network.config.get_text_config()
    found = re.search(r"\blayers\.(\d+)\.", name)
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    return found is not None and 0 <= int(found[1]) - config.num_hidden_layers < extra


def check_device(device_map: Any) -> None:
    """Refuse a GPU that is not there."""
    wanted = device_map.values() if isinstance(device_map, dict) else [device_map]
    gpus = torch.cuda.device_count()
    for device in wanted:
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        kind, _, index = name.partition(":")
        if kind == "cuda" and int(index or 0) >= gpus:
            have = f"this machine has {terminal.how_many(gpus, 'GPU')}" if gpus else "no GPU can be used here"
            raise LoadError(f"model.device_map wants {name}, but {have}", "Use device_map=auto, or cpu")


def check_architecture(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse what this transformers does not know as a causal language model."""
    config = checkpoint.read_config()
    kind = config.get("model_type")
    if model.trust_remote_code and "auto_map" in config:
        return
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in CONFIG_MAPPING:
        if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
            terminal.say(f"{kind} takes more than text; here it runs on text alone.")
        return
    if "auto_map" in config:
        raise LoadError(
            f"{checkpoint.source}: needs Python code that comes with the model",
            "Read that code, and if you trust it, set model.trust_remote_code=true",
        )
    if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        raise LoadError(
            f"{checkpoint.source}: {kind} is a model of images, sound or video with text, and this transformers has "
            "no class that runs it on text alone",
            "Choose a model of text",
        )
    if kind in CONFIG_MAPPING:
        raise LoadError(f"{checkpoint.source}: {kind} is not a causal language model", "Choose another model")
    if kind is None:
        raise LoadError(
            f"{checkpoint.config_path}: no model_type, so that nothing says which architecture this is",
            checkpoint.again,
        )
    raise LoadError(
        f"{checkpoint.source}: this transformers does not know the architecture {kind!r}",
        "Upgrade it (pip install -U transformers), or choose another model",
    )


def check_config(config: Any, checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse layers that the engine cannot run, and a context that positions do not reach; as transformers reads it."""
    check_layers(config, checkpoint.source)
    _check_context(config, checkpoint, model)


def _check_context(config: Any, checkpoint: Checkpoint, model: ModelConfig) -> None:
    text = config.get_text_config()
    check_context(text.to_dict(), model.context, checkpoint.source)
    own = getattr(text, "max_position_embeddings", None)
    if model.context is None or own is None or model.context <= own:
        return
    rotary = ("rope_parameters", "alibi", "rotary_dim", "rotary_pct")
    if not any(getattr(text, key, None) for key in rotary):
        raise beyond(own, model.context, checkpoint.source, "its positions are a table that ends there")


def check_format(checkpoint: Checkpoint, model: ModelConfig, quant: QuantConfig) -> str | None:
    """Name the format that the weights are quantized in already; None for plain ones.

    Raises:
        LoadError: it cannot be read here, or is to be quantized again.
    """
    config = checkpoint.read_config()
    found = checkpoint_format(config)
    if found is None:
        return None
    try:
        quantizer = AutoHfQuantizer.from_config(config["quantization_config"], pre_quantized=True)
        quantizer.validate_environment(device_map=model.device_map)
    except Exception as error:
        raise LoadError(*_unreadable(error, checkpoint, found)) from error
    if quant.quantized:
        raise LoadError(
            f"{checkpoint.source}: its weights are quantized already, {label(found)}",
            f"Use quant=none, or for quant={quant.method.value} the model's plain weights",
        )
    if quant.dtype is not Dtype.auto and not can_dequantize(found):
        raise LoadError(
            f"{checkpoint.source}: its weights are quantized, {label(found)}, and there is no way from there to plain "
            f"{quant.dtype.value} ones",
            f"Use quant=none, or for quant.dtype={quant.dtype.value} the model's plain weights",
        )
    return found


def _unreadable(error: Exception, checkpoint: Checkpoint, found: str) -> tuple[str, str]:
    missing = [package for package in PACKAGES.get(found, ()) if not is_installed(package)]
    fix = (
        f"Run: pip install {' '.join(missing)}; or choose"
        if missing
        else "Install the package that this names, or choose"
        if isinstance(error, ImportError)
        else "Choose"
    )
    return (
        f"{checkpoint.source}: its weights are quantized already, {label(found)}, and cannot be read here: "
        f"{first_line(error)}",
        f"{fix} a copy of the model with plain weights",
    )


def explained(
    error: Exception, checkpoint: Checkpoint, quant: QuantConfig, stored: str | None
) -> tuple[str, str]:
    """Say what went wrong in transformers, torch, accelerate or bitsandbytes, and what to do, in our words."""
    text, source = str(error), checkpoint.source
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text.lower():
        return f"{source}: not enough memory to load it", "Try a smaller model" if stored else SMALLER
    if stored:
        return _unreadable(error, checkpoint, stored)
    if "ignore_mismatched_sizes" in text:
        found = (
            "its weights have another shape than its config.json says, so that they do not belong together"
        )
        return f"{source}: {found}", checkpoint.again
    if "dispatched on the CPU or the disk" in text:
        found = (
            "quantized weights cannot spill from GPU to CPU, or from CPU to disk, and they exceed the free"
        )
        return f"{source}: {found} memory or model.max_memory", f"{SMALLER}, or quant=none, which may spill"
    if quant.quantized and isinstance(error, NotImplementedError | ImportError):
        found = f"quantization {quant.method.value} is not available on this device: {first_line(error)}"
        return f"{source}: {found}", "Use quant=none, or model.device_map=cpu"
    if "attn_implementation" in text or "FlashAttention" in text:
        fix = "Unset model.attn_implementation, or set it to sdpa or eager"
        return f"{source}: {first_line(error)}", fix
    return f"{source}: transformers could not load it: {first_line(error)}", "The log has the traceback"


def first_line(error: Exception) -> str:
    """Return the first line of what it says, or its name where it says nothing, as a sentence."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line[-1] in ".!?" else line + "."
