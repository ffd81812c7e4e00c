"""Have a model cross, within a few tokens, the lengths at which it begins to compute something else.

A window, a chunk, a change of rotary frequencies, a scale that grows with the position: a few tokens would
never meet them, so that a few tokens prove nothing. For a while each of these lengths is LOW, for the model's
own passes and for those of the engine, which reads the same config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LOW = 4  # tokens

# In configs, rotary parameters and the modules that copied them. What a module has turned into a buffer when it
# was made, as GPT-Neo its window, is not crossed: such attention is the model's own and comes with its own mask.
LENGTHS = (
    "sliding_window", "sliding_window_size", "window_size", "local_attention", "attention_chunk_size",
    "original_max_position_embeddings", "floor_scale", "index_topk",
)  # fmt: skip
# Only where frequencies are made anew for a longer row: elsewhere these are lengths of tables.
DYNAMIC_LENGTHS = ("max_position_embeddings", "original_max_seq_len", "max_seq_len_cached")
STRONG = 2.0  # how much a scale by position does, which in earnest is too little to see beside rounding


@contextmanager
def lowered(model: Any, longest: int | None = None) -> Iterator[bool]:
    """Lower the lengths that a model's config and modules name, and say whether there are any.

    Args:
        longest: no row will have more tokens, so that a length from there on is never crossed.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for names in _namespaces(model):
        keys = LENGTHS + (DYNAMIC_LENGTHS if is_dynamic(model.config.get_text_config()) else ())
        found = [key for key in keys if _is_crossed(names.get(key), longest)]
        changed += [(names, key, names[key]) for key in found]
        if "floor_scale" in found and "attn_scale" in names:
            changed.append((names, "attn_scale", names["attn_scale"]))
    try:
        for names, key, _ in changed:
            names[key] = STRONG if key == "attn_scale" else LOW
        yield bool(changed)
    finally:
        for names, key, value in changed:
            names[key] = value
        forget_lengths(model)


def is_dynamic(config: Any) -> bool:
    """Say whether rotary frequencies depend on the longest row so far."""
    return "dynamic" in str(getattr(config, "rope_parameters", None))


def forget_lengths(model: Any) -> None:
    """Have rotary frequencies that grew with the rows so far begin anew, as for the first row of all."""
    if not is_dynamic(model.config.get_text_config()):
        return
    for module in model.modules():
        for name in [
            name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")
        ]:
            original = getattr(module, name)
            setattr(module, name.replace("original_", ""), original)
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _is_crossed(value: Any, longest: int | None) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value > LOW and (longest is None or value < longest)


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """List where a model's code finds its lengths: modules, configs, their rotary parameters; each once."""
    modules = list(model.modules())
    configs: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    configs += [config.get_text_config() for config in configs[:1]]
    found = [vars(holder) for holder in (*modules, *configs)]
    for config in configs:
        ropes = getattr(config, "rope_parameters", None) or {}
        found += [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    return list({id(names): names for names in found}.values())
