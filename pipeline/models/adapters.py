"""Put an adapter's weights into a model by peft: merged where the model is not quantized, else beside it."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.common import terminal
from pipeline.common.errors import LoadError
from pipeline.common.packages import can_import
from pipeline.config.schema import ModelConfig
from pipeline.models.adapter_files import AdapterFiles, locate_adapter, made_for_another
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.loading_checks import first_line
from pipeline.models.quantized_experts import has_quantized_experts, held_experts

log = logging.getLogger(__name__)
_NAME = "default"  # peft's own, of an adapter that is the only one
_PREFIX = "base_model.model."  # of every tensor in an adapter's file


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """Say which adapter a model was loaded with, and how."""

    files: AdapterFiles
    merged: bool  # into the weights; False: it is computed beside them


def get_adapter(model: ModelConfig, models_dir: str) -> AdapterFiles | None:
    """Find a model's adapter, on the hub too, and say where it names another model; None for a model without.

    Raises:
        LoadError: it cannot be used, or peft is not installed.
    """
    if (adapter := locate_adapter(model, models_dir)) is None:
        return None
    if not can_import("peft"):
        raise LoadError(
            "model.adapter: the peft package is not installed",
            "Run: pip install 'llm-job-pipeline[adapters]'",
        )
    if made_for_another(adapter, model):
        line = f"The adapter was made for {adapter.base}, and runs with {model.name}."
        log.info(line)
        terminal.say(line, style="yellow")
    return adapter


def tokenizer_files(adapter: AdapterFiles | None, model: Checkpoint) -> Checkpoint:
    """Choose whose tokenizer counts: the adapter's, where one lies beside it."""
    if adapter is None:
        return model
    own = any((adapter.files.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return adapter.files if own else model


def apply_adapter(network: Any, adapter: AdapterFiles, tokenizer: Any) -> AppliedAdapter:
    """Change a loaded model by an adapter's weights.

    Raises:
        LoadError: the adapter is not for this model, or peft refuses it.
    """
    _resize(network, adapter, len(tokenizer))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of tied weights is heeded below
            merged = _apply(network, adapter)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"{adapter.files.source}: peft cannot put this adapter into the model: {first_line(error)}",
            _fix(adapter),
        ) from error
    network.eval()
    return AppliedAdapter(adapter, merged)


def _fix(adapter: AdapterFiles) -> str:
    base = adapter.base
    return f"Set model.name to the model that it was made for{f', {base}' if base else ''}"


def _resize(network: Any, adapter: AdapterFiles, tokens: int) -> None:
    """Give the embedding and the head the rows that the adapter brings, as peft's own loading does.

    Raises:
        LoadError: its tokenizer has tokens that have no weights.
    """
    held, head = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    rows = adapter.vocab_size or len(held)
    if rows == len(held) and tokens <= rows:
        return
    names = {id(m): name for name, m in network.named_modules()}
    both = [names[id(m)] for m in (network.get_input_embeddings(), network.get_output_embeddings())]
    brought = [
        any(f"{_PREFIX}{name}{end}.weight" in adapter.shapes for end in ("", ".base_layer")) for name in both
    ]
    if tokens > rows or not (all(brought) or (held is head and any(brought))):
        raise LoadError(
            f"{adapter.files.source}: its tokenizer has {tokens} tokens, the model {len(held)}, and the adapter "
            "does not bring the weights of the others",
            "Save the adapter anew with peft's save_pretrained(…, save_embedding_layers=True)",
        )
    network.resize_token_embeddings(rows, mean_resizing=False)


def _apply(network: Any, adapter: AdapterFiles) -> bool:
    """Let peft do it, in its own order; say whether the weights are merged."""
    from peft import PeftConfig, PeftModelForCausalLM, load_peft_weights, set_peft_model_state_dict

    if any(parameter.device.type == "meta" for parameter in network.parameters()):
        raise LoadError(
            f"{adapter.files.source}: an adapter cannot be put into weights that lie on the disk or wait on the CPU",
            "Use a quantization or a smaller model, so that all of it fits, or merge the adapter first with peft",
        )
    if adapter.settings.get("use_dora") and getattr(network, "is_loaded_in_8bit", False):
        raise LoadError(
            f"{adapter.files.source}: a DoRA, and peft cannot compute one beside weights in 8 bits",
            "Use quant=none, where it is merged, or quant=nf4",
        )
    folder = str(adapter.files.folder)
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    wrapped: Any = PeftModelForCausalLM(network, config)
    _check_experts(wrapped, adapter)
    weights = load_peft_weights(
        folder, device="cpu", key_mapping=getattr(network, "_checkpoint_conversion_mapping", {})
    )
    found = set_peft_model_state_dict(wrapped, weights)
    _check_complete(wrapped, found, weights, adapter)
    _untie(network)
    if getattr(network, "is_quantized", False):
        _take_saved(network)
        return False
    wrapped.merge_and_unload(safe_merge=True)
    return True


def _check_experts(wrapped: Any, adapter: AdapterFiles) -> None:
    """Refuse an adapter of experts that are quantized: peft computes with such a weight whole, and as it is held.

    Asked of what peft has wrapped: it turns an older adapter of each expert's layers into one of the weights of all.
    """
    for path, module in wrapped.named_modules():
        name, kind = path.removeprefix(_PREFIX), type(module).__name__
        if kind == "ParamWrapper" and module.parameter_name in held_experts(module.get_base_layer()):
            name = f"{name}.{module.parameter_name}"
        elif kind != "ModulesToSaveWrapper" or not has_quantized_experts(module):
            continue
        raise LoadError(
            f"{adapter.files.source}: it changes {name}, and peft cannot do that beside experts that are quantized",
            "Use quant=none, where it is merged",
        )


def _check_complete(wrapped: Any, found: Any, weights: dict[str, Any], adapter: AdapterFiles) -> None:
    """Refuse an adapter of which peft would leave out a tensor, or take one for a random number."""
    saved = [
        name for name, module in wrapped.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"
    ]
    missing = [name for name in found.missing_keys if "lora_" in name]
    missing += [name for name in saved if not any(name in key for key in weights)]
    if found.unexpected_keys or missing:
        name, why = (
            (missing[0], "lacks") if missing else (found.unexpected_keys[0], "has for no part of the model")
        )
        raise LoadError(
            f"{adapter.files.source}: the adapter {why} {name}: it was made for another model, or its settings and "
            "weights do not belong together",
            _fix(adapter),
        )


def _untie(network: Any) -> None:
    """Give the head a weight of its own where the adapter changes the embedding or the head alone.

    Merged into a weight that both share, it would change both; peft computes it beside one of them.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    if not any(
        hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in (embedding, head)
    ):
        return
    if embedding.weight is head.weight:
        inner = head.get_base_layer() if hasattr(head, "base_layer") else head
        inner.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    network.config.get_text_config().tie_word_embeddings = False


def _take_saved(network: Any) -> None:
    """Put modules that the adapter holds whole in the place of the model's own."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "ModulesToSaveWrapper":
                setattr(module, name, child.modules_to_save[_NAME])
