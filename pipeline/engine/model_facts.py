"""Read from a model what the engine needs to know of it: its device, its vocabulary, its windows, longrope's switch."""

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

# A model's cache, in a pass and in its output. transformers 5.24 made one name of the first and the third.
CACHE_NAMES = ("past_key_values", "cache", "cache_params", "state")
RECURRENT = "recurrent or hybrid: some of its layers keep other state than keys and values"
SPARSE = "sparse attention, which chooses the keys that it attends to"
SHARED = "some of its layers keep no keys and values of their own"


def input_device(model: Any) -> torch.device:
    """Find where token ids go: the embedding's device, or the one it is brought to when it is offloaded."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        device = torch.device(embedding._hf_hook.execution_device)
    return device


def is_adapted(module: nn.Module) -> bool:
    """Say whether it is a layer of peft's, which has the model's own in it and may go by the same name."""
    return hasattr(module, "base_layer")


def outside_adapters(model: nn.Module) -> list[nn.Module]:
    """List the modules but for layers with an adapter beside them and their parts, which no other may stand in for.

    peft reads the weight of the layer inside, and the dtype of its own.
    """
    inside = {part for layer in model.modules() if is_adapted(layer) for part in layer.modules()}
    return [module for module in model.modules() if module not in inside]


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Read each layer's sliding window in tokens, itself included; None is full attention.

    A config may carry keys that its architecture does not read: what counts is the masks that the model's own
    code makes.

    Raises:
        NotImplementedError: a layer is neither.
    """
    kinds = getattr(config, "layer_types", None)
    if unknown := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of type {sorted(unknown)}")
    layers = int(config.num_hidden_layers)
    code = model_code(config)
    if code is not None and "create_sliding_window_causal_mask" not in code:
        return (None,) * layers
    window: int | None = getattr(config, "sliding_window", None)
    if kinds is None or (code is not None and "layer_types" not in code):
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def model_code(config: Any) -> str | None:
    """Read the architecture's source in transformers; None for code that comes with a model."""
    try:
        return inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
    except (KeyError, OSError, TypeError):
        return None


def needs_own_cache(config: Any) -> str | None:
    """Say why a model runs through the cache that it makes for itself alone; None if keys and values are all there is.

    Args:
        config: as transformers reads it.
    """
    made = causal_class(config)
    if made is not None and find_cache_name(made) is None:
        return None  # it keeps nothing
    if made is not None and not made._supports_default_dynamic_cache():
        return RECURRENT
    try:
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except (AttributeError, LookupError, TypeError, ValueError):
        return None  # not all can be told so; the first passes will
    kinds = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if any("Linear" in kind for kind in kinds):
        return RECURRENT
    return (SHARED if "DummyLayer" in kinds else SPARSE) if kinds else None


def cache_name(model: Any) -> str:
    """Say what a model calls its cache."""
    return find_cache_name(type(model)) or CACHE_NAMES[0]


def find_cache_name(made: Any) -> str | None:
    """Find what a class of models calls its cache, by what its forward takes; None if it takes none.

    One that takes anything hands it on to the class that it is made from.
    """
    for base in made.__mro__:
        takes = inspect.signature(base.forward).parameters if hasattr(base, "forward") else {}
        for name in CACHE_NAMES:
            if name in takes and "dict" not in str(takes[name].annotation):  # XLM's, of its own kind
                return name
    return None


def causal_class(config: Any) -> Any:
    """Find the class of a causal language model in transformers; None for code that comes with a model."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return known[0] if isinstance(known, list | tuple) else known


def rope_switch(config: Any) -> int | None:
    """Read the length above which longrope turns to its long factors, for all tokens of a row; None without."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    switch: int = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return switch
