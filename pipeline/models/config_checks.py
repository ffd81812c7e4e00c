"""Check what a checkpoint's JSON files say before anything acts on it. All raise LoadError."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.common.errors import LoadError
from pipeline.config.model_files import ADAPTER
from pipeline.config.stored_format import SKIPPED

MAX_BYTES = 64 << 20  # the largest index of weights has about ten million
MAX_DEPTH = 32
# More than any model has, and few enough that its modules are made in seconds.
MOST = {
    "num_hidden_layers": 1_000, "n_layer": 1_000, "n_layers": 1_000, "num_layers": 1_000,
    "num_experts": 10_000, "num_local_experts": 10_000, "n_routed_experts": 10_000,
    "vocab_size": 1 << 40, "hidden_size": 1 << 24, "intermediate_size": 1 << 31,
}  # fmt: skip


def read_object(path: Path, again: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        again: how to get the file anew.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LoadError(f"{path}: {path.stat().st_size:,} bytes are too many for this file", again)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not JSON ({str(error).splitlines()[0]})", again) from error
    if not isinstance(value, dict):
        raise LoadError(f"{path}: not a JSON object", again)
    if _depth(value) > MAX_DEPTH:
        raise LoadError(f"{path}: nested more than {MAX_DEPTH} deep, as no model's file is", again)
    return value


ALLOWED = {  # keys of bitsandbytes' config whose wrong values transformers takes, or does not name
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_compute_dtype": ("float32", "float16", "bfloat16"),
}


def check_config(config: Mapping[str, Any], path: Path, again: str) -> None:
    """Refuse a config.json whose kind, sizes or end tokens are no such things."""
    for part in (config, config.get("text_config")):
        if part is None:
            continue
        if not isinstance(part, Mapping):
            raise LoadError(f"{path}: text_config={_short(part)}: must be an object", again)
        kind = part.get("model_type")
        if kind is not None and not isinstance(kind, str):
            raise LoadError(f"{path}: model_type={_short(kind)}: must be text", again)
        for key, most in MOST.items():
            _check_size(part, key, most, path, again)
        check_ends(part, path, again)
        _check_bitsandbytes(part, path, again)


def _check_bitsandbytes(part: Mapping[str, Any], path: Path, again: str) -> None:
    """Refuse modules that are to stay plain which are no names, and values that bitsandbytes does not know."""
    if not isinstance(settings := part.get("quantization_config"), Mapping):
        return
    for key, allowed in ALLOWED.items():
        if (value := settings.get(key)) is not None and value not in allowed:
            known = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise LoadError(f"{path}: {key}={_short(value)}: must be {known}", again)
    skipped = settings.get(SKIPPED)
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(n, str) for n in skipped)):
        raise LoadError(f"{path}: {SKIPPED}={_short(skipped)}: must be a list of names", again)


def check_ends(settings: Mapping[str, Any], path: Path, again: str) -> None:
    """Refuse end tokens that are no ids."""
    ends = settings.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
            raise LoadError(
                f"{path}: eos_token_id={_short(ends)}: must be a token id or a list of them", again
            )


def check_context(text: Mapping[str, Any], context: int | None, source: str) -> None:
    """Refuse a context beyond the config's own where that would change its rotary positions."""
    own = text.get("max_position_embeddings")
    if isinstance(own, int) and context is not None and context > own and "dynamic" in _rope_kinds(text):
        why = "its rotary positions would change with the longest row of a batch (rope_type=dynamic)"
        raise beyond(own, context, source, why)


def beyond(own: int, context: int, source: str, why: str) -> LoadError:
    """Say why a context cannot be longer than the config's own."""
    return LoadError(
        f"{source}: model.context={context} is beyond its own {own}, and {why}",
        f"Set model.context to {own} at most, or choose a model with a longer context",
    )


def _rope_kinds(text: Mapping[str, Any]) -> set[str]:
    """Name the kinds of rotary positions, by the keys of any version of transformers: for all layers, or by kind."""
    found: set[str] = set()
    for rope in (text.get("rope_parameters"), text.get("rope_scaling")):
        if isinstance(rope, Mapping):
            each = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
            found |= {str(part.get("rope_type") or part.get("type")) for part in each}
    return found


def check_adapter(folder: Path, source: str) -> None:
    """Refuse an adapter (LoRA and its like), alone or beside the weights of a whole model."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = read_object(path, "Copy or download the folder again").get("base_model_name_or_path")
    if (folder / "config.json").is_file():
        raise LoadError(
            f"{source}: holds a model and an adapter of {base} ({ADAPTER}), and which of them is meant cannot be told",
            "Move the adapter's files into a folder of their own, and give model.adapter that to run the model with it",
        )
    raise LoadError(
        f"{source}: an adapter of {base} ({ADAPTER}) and not a whole model",
        f"Run it as model.adapter={source}, with model.name={base or 'ORG/NAME'} or without",
    )


def check_lora(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter that is not one of low-rank matrices beside the weights, for every token alike."""
    kind, task = settings.get("peft_type"), settings.get("task_type")
    wrong = (
        f"peft_type={_short(kind)}: only LORA can be run"
        if kind != "LORA"
        else f"task_type={_short(task)}: it is not for a causal language model"
        if task not in (None, "CAUSAL_LM")
        else next((f"{key}: is not supported" for key in _UNLIKE_LORA if settings.get(key)), None)
    )
    if wrong:
        fix = "Merge it into its base model with peft, where that can, and give model.name the folder"
        raise LoadError(f"{path}: {wrong}", fix)


# Layers that are run twice, and matrices that count from a phrase of the prompt on.
_UNLIKE_LORA = ("layer_replication", "alora_invocation_tokens")


def weight_files(index: Path, again: str) -> list[str]:
    """List the files that an index of weights names."""
    try:
        names = read_object(index, again).get("weight_map")
    except LoadError as error:
        why = error.found.removeprefix(f"{index}: ")
        raise LoadError(f"{index}: not an index of weights ({why})", again) from error
    files = set(names.values()) if isinstance(names, dict) and _all_text(names.values()) else set[str]()
    if not files:
        raise LoadError(f"{index}: not an index of weights (no weight_map of names to files)", again)
    if strange := sorted(name for name in files if Path(name).name != name):
        raise LoadError(f"{index}: names {_short(strange[0])}, which is no file of this folder", again)
    return sorted(files)


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_size(config: Mapping[str, Any], key: str, most: int, path: Path, again: str) -> None:
    value = config.get(key)
    if value is None or isinstance(value, list):  # some have one for each layer
        return
    least = 0 if "experts" in key else 1  # the small Granite 4 are mixtures of no experts
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        whole = "a whole number" if least == 0 else "a positive whole number"
        found = f"{key}={_short(value)}: a model's config needs {whole} here"
        raise LoadError(f"{path}: {found}", again)
    if value > most:
        raise LoadError(f"{path}: {key}={_short(value)}: more than any model has ({most:,} at most)", again)


def _depth(value: Any) -> int:
    """Count how deep lists and objects lie in each other, without a call for each."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            child
            for holder in level
            if isinstance(holder, dict | list)
            for child in (holder.values() if isinstance(holder, dict) else holder)
        ]
        depth += 1
    return depth


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}…"
