"""Refuse models whose layers the engine cannot run, by their config alone, before any weight is read."""

from collections.abc import Iterator
from typing import Any

from packaging.version import Version
from transformers import __version__

from pipeline.common.errors import LoadError
from pipeline.engine.model_facts import causal_class, find_cache_name, model_code

TRIED = "5.10.1", "5.24.0"  # the first and the last transformers that were tried


def check_layers(config: Any, source: str) -> None:
    """Refuse a model whose layers the engine cannot run, by its config alone.

    Args:
        config: as transformers reads it.
        source: where the model comes from, for the error.
    """
    if (reason := next(_unfit(config), None)) is not None:
        raise LoadError(f"{source}: {reason}", "Choose a causal language model")
    made = causal_class(config)
    if made is not None and find_cache_name(made) is None:
        raise _without_cache(source)


def _without_cache(source: str) -> LoadError:
    """Say that a model takes no cache, or that this transformers may have given it a name that nobody knew."""
    first, last = TRIED
    if Version(__version__) <= Version(last):
        return LoadError(
            f"{source}: keeps no keys and values of earlier tokens, and would compute all anew",
            "Choose a causal language model",
        )
    return LoadError(
        f"{source}: takes no keys and values of earlier tokens by a name that is known here: transformers "
        f"{__version__} is newer than {last}, the last that was tried",
        f"Run pip install 'transformers>={first},<={last}', which are known to work, or choose another model",
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
    causal_class(config)  # imported first: it brings its own kinds of layers
    if getattr(text, "is_decoder", None) is False and _reads(text, "config.is_decoder"):
        yield "an encoder, which sees the tokens to come (is_decoder is false in its config.json)"
    if getattr(text, "cross_attention_layers", None):
        yield "some of its layers attend to an image (cross_attention_layers), and there is none"
    if _reads(text, "config.prompt_length") and getattr(text, "prompt_length", None):
        yield f"it puts {text.prompt_length} tokens of its own before each prompt (prompt_length), beyond the mask"
    if text.model_type == "recurrent_gemma":
        yield "recurrent, and keeps its state in its layers, not in a cache whose rows could come and go"
    yield from _uncounted(text)


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
