"""Read the shape of a model from its facts in conf/model/ or from a config.json: both use the same keys.

The families that stand here have formulas; the model of any other config is counted (counted.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from pipeline.common.errors import ConfigError
from pipeline.config.quant import ELEMENT_BYTES, Dtype
from pipeline.config.stored_format import SKIPPED

MEASURE = "Load the model and read stats.json for its memory"


@dataclass(frozen=True, slots=True)
class _Family:
    """Say what a model type implies and config.json does not (transformers' modeling files)."""

    qkv_bias: bool = False  # on q, k and v, whatever `attention_bias` says
    qk_norm: bool = False  # a norm of head_dim weights on queries, another on keys
    norms: int = 2  # norms of hidden_size weights in a layer
    fused: bool = False  # one matrix for q, k, v and one for gate, up
    tied: bool = False  # the default of tie_word_embeddings
    head_dim: int | None = None  # the default; None is hidden_size / heads
    sliding: str | None = (
        None  # what of the config makes a layer slide: "all" layers, by "layer_types"; None: nothing
    )
    window_every: int | None = None  # by default every n-th layer is full attention; None: no layer is
    embed_scale: bool = False  # a scalar buffer beside the embedding
    rope_by_layer_kind: bool = False  # one set of rotary buffers for each kind of layer


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(sliding="all"),
    "phi3": _Family(fused=True, sliding="all"),
    "qwen2": _Family(qkv_bias=True, sliding="layer_types"),
    "qwen3": _Family(qk_norm=True, head_dim=128, sliding="layer_types"),
    "gemma3_text": _Family(
        qk_norm=True,
        norms=4,
        tied=True,
        head_dim=256,
        sliding="layer_types",
        window_every=6,
        embed_scale=True,
        rope_by_layer_kind=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the loaded model."""

    name: str
    part: str  # embedding, attention, mlp, norm, head, other or buffers
    shape: tuple[int, ...]
    quantizable: bool = False  # a linear layer that is not the output head, or experts [experts, out, in]
    dtype: str | None = None  # the same whatever the model is loaded in; None: as the model
    element_bytes: int = 4  # in that dtype
    wide_in: tuple[str, ...] = ()  # dtypes of the model in which this tensor stays float32

    @property
    def count(self) -> int:
        """Count its scalars."""
        return math.prod(self.shape)

    @property
    def experts(self) -> int:
        """Count the matrices that it holds; 0 for what is no weight of experts."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def matrix(self) -> int:
        """Count the scalars of one of its matrices, which are quantized apart."""
        return math.prod(self.shape[-2:])


@dataclass(frozen=True, slots=True, eq=False)  # told apart by identity: thousands of weights are slow to hash
class Counted:
    """Hold what was counted in a model that has no formula."""

    weights: tuple[Weight, ...]
    note: str | None  # what of it is an estimate
    refused: str | None  # why a job would be refused
    parameters: int | None = None  # of packed weights; None: as many as their shapes say


@dataclass(frozen=True, slots=True)
class Architecture:
    """Hold all that decides how many bytes a decoder-only model takes. Counts are of scalars, heads or layers."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str  # the checkpoint's own: float32, float16 or bfloat16
    windows: tuple[int | None, ...]  # each layer's sliding window in tokens; None is full attention
    layer_keys: tuple[int, ...]  # scalars of one token's keys and values, by layer
    layer_states: tuple[int, ...] = ()  # scalars that each row has whatever its length, by layer, and …
    layer_state_bytes: tuple[int, ...] = ()  # … bytes, of states in a dtype of their own
    own_cache: bool = False  # runs through the cache that it makes for itself
    pass_columns: int = 0  # its passes pad rows to a multiple of this, of which each takes (0: not known) …
    pass_bytes: tuple[int, int] = (0, 0)  # … so many bytes at once, in half precision and in float32
    adapter_scalars: int = 0  # of an adapter, which are held beside weights that are quantized
    file_bytes: int | None = None  # of the checkpoint's tensors, where they are not plain weights
    counted: Counted | None = None  # None: by formula, from what follows
    rotary_dim: int = 0  # how many of head_dim are rotated
    rotary_sets: int = 0
    qkv_bias: bool = False
    output_bias: bool = False  # on the attention's output matrix
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: int = 0
    fused: bool = False
    embed_scale: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a config.json, or of conf/model, with transformers' defaults for those that are absent.

        Raises:
            ConfigError: there is no formula for it, or a size is wrong.
        """
        model_type = str(config.get("model_type"))
        if not has_formula(config):
            known = ", ".join(sorted(_FAMILIES))
            raise ConfigError(f"model_type {model_type!r}: there are formulas for {known}", MEASURE)
        family = _FAMILIES[model_type]
        try:
            return cls(**_fields(config, model_type, family))
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"not a model's config ({error})", "Copy or download it again") from error


def has_formula(config: Mapping[str, Any]) -> bool:
    """Say whether a config is of a family above; one of more than text (`text_config`) is not.

    Nor is one of weights of which bitsandbytes has left out some more.
    """
    return config.get("model_type") in _FAMILIES and "text_config" not in config and SKIPPED not in config


def known_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Read a config as `Architecture.read` does; None where there is no formula, or it is wrong."""
    try:
        return Architecture.read(config)
    except ConfigError:
        return None


def in_context(config: Mapping[str, Any], context: int | None) -> Mapping[str, Any]:
    """Give a config the context that a job asks for (model.context)."""
    if context is None:
        return config
    if isinstance(text := config.get("text_config"), Mapping):
        return {**config, "text_config": in_context(text, context)}
    return {**config, "max_position_embeddings": context}


_DERIVED = (
    "layer_keys",
    "layer_states",
    "layer_state_bytes",
    "own_cache",
    "pass_columns",
    "pass_bytes",
    "counted",
    "adapter_scalars",
    "file_bytes",
)


def differences(facts: Architecture, found: Architecture) -> list[str]:
    """Say what a found config.json says otherwise, as "key: fact, found"."""
    return [
        f"{f.name}: {getattr(facts, f.name)} in conf/model, {getattr(found, f.name)} in config.json"
        for f in fields(Architecture)
        if f.name not in _DERIVED and getattr(facts, f.name) != getattr(found, f.name)
    ]


def _fields(config: Mapping[str, Any], model_type: str, family: _Family) -> dict[str, Any]:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim", family.head_dim or hidden // heads)
    windows = _windows(config, family)
    bias = bool(config.get("attention_bias", False))
    key_heads = _size(config, "num_key_value_heads", heads)
    return {
        "model_type": model_type,
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _size(config, "intermediate_size"),
        "num_hidden_layers": len(windows),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _size(config, "max_position_embeddings"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
        "dtype": _dtype(config),
        "windows": windows,
        "rotary_dim": int(head_dim * _partial_rotary_factor(config)),
        "rotary_sets": len(set(windows)) if family.rope_by_layer_kind else 1,
        "qkv_bias": family.qkv_bias or bias,
        "output_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "qk_norm": family.qk_norm,
        "norms": family.norms,
        "fused": family.fused,
        "embed_scale": family.embed_scale,
        "layer_keys": (2 * key_heads * head_dim,) * len(windows),
    }


def _dtype(config: Mapping[str, Any]) -> str:
    """Read the checkpoint's dtype, whatever release of transformers wrote it, or holds it as torch's own."""
    own = str(config.get("dtype") or config.get("torch_dtype") or Dtype.float32.value).removeprefix("torch.")
    if own not in ELEMENT_BYTES:
        raise ConfigError(f"dtype={own}: the memory plan knows {', '.join(ELEMENT_BYTES)}", MEASURE)
    return own


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key) or default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{key}={value!r}: a model's config needs a positive whole number here",
            "Correct it, or copy it again",
        )
    return value


def _partial_rotary_factor(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def _windows(config: Mapping[str, Any], family: _Family) -> tuple[int | None, ...]:
    """Find each layer's sliding window. One that is as wide as the context slides over nothing: None."""
    layers = _size(config, "num_hidden_layers")
    window = config.get("sliding_window")
    by_switch = config.get("model_type") in ("qwen2", "qwen3")
    if family.sliding is None or (by_switch and not config.get("use_sliding_window")):
        window = None
    if window is None or window >= _size(config, "max_position_embeddings"):
        return (None,) * layers
    if family.sliding == "all":
        return (window,) * layers
    if (kinds := config.get("layer_types")) is None:
        every = family.window_every and config.get("sliding_window_pattern", family.window_every)
        first = config.get("max_window_layers", 0) if by_switch else 0
        kinds = [
            "full_attention" if i < first or (every and (i + 1) % every == 0) else "sliding_attention"
            for i in range(layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
