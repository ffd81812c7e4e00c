"""Refuse models whose layers the engine cannot run, by their config alone, before any weight is read."""

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

from pipeline.common.errors import LoadError
from pipeline.engine.model_facts import model_code

RECURRENT = "recurrent or hybrid: some of its layers keep other state than keys and values"
SPARSE = "sparse attention, which chooses the keys that it attends to"


def check_layers(config: Any, source: str) -> None:
    """Refuse a model whose layers the engine cannot run, by its config alone.

    Args:
        config: as transformers reads it.
        source: where the model comes from, for the error.
    """
    if (reason := next(_unfit(config), None)) is not None:
        raise LoadError(
            f"{source}: {reason}", "Choose a causal language model whose layers all are attention"
        )


def _unfit(config: Any) -> Iterator[str]:
    """Say why the engine cannot run such a model, where it cannot."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:
        yield "its config.json describes several language models, of which none is the one to run"
        return
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        yield "an encoder with a decoder (is_encoder_decoder in its config.json), not a causal language model alone"
    # Imported first: it brings its own kinds of layers.
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(text, "is_decoder", None) is False and _reads(text, "config.is_decoder"):
        yield "an encoder, which sees the tokens to come (is_decoder is false in its config.json)"
    if getattr(text, "cross_attention_layers", None):
        yield "some of its layers attend to an image (cross_attention_layers), and there is none"
    if _reads(text, "config.prompt_length") and getattr(text, "prompt_length", None):
        yield f"it puts {text.prompt_length} tokens of its own before each prompt (prompt_length), beyond the mask"
    yield from _uncounted(text)
    yield from _other_layers(text)
    # None for code that comes with a model.
    made: Any = known[0] if isinstance(known, list | tuple) else known
    if made is not None and "past_key_values" not in inspect.signature(made.forward).parameters:
        stateful = getattr(made, "_is_stateful", False)
        yield (
            RECURRENT
            if stateful
            else "keeps no keys and values of earlier tokens, and would compute all anew"
        )


def _reads(config: Any, key: str) -> bool:
    """Say whether the architecture's code reads a key; an example in its documentation does not count."""
    lines = (model_code(config) or "").splitlines()
    return any(key in line and ">>>" not in line for line in lines)


def _uncounted(text: Any) -> Iterator[str]:
    """Say what is wrong with the number of layers."""
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None or layers < 1:
        yield f"its config.json says that it has {'no number of' if layers is None else layers} layers"
        return
    for name, value in vars(text).items():
        if name.endswith("layer_types") and isinstance(value, list | tuple) and len(value) < layers:
            yield f"{name} in its config.json names {len(value)} layers, and num_hidden_layers is {layers}"


def _other_layers(text: Any) -> Iterator[str]:
    """Say what kinds of layers it has besides attention to all or a window of the tokens."""
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, LookupError, TypeError, ValueError):
        return  # not all can be told so; the first passes will
    kinds = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if any("Linear" in kind for kind in kinds):
        yield RECURRENT
    elif "DummyLayer" in kinds:
        yield "some of its layers keep no keys and values of their own"
    elif kinds:
        yield SPARSE
