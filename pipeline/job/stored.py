"""Read the files of a job's folder again: what in them is not as it was written is left out, and named.

A shape is a type, [shape] for a list, (shape, …) for a list of just these, {str: shape} for any keys, or
{"key": shape}, where "key!" must be there; keys that it does not name are kept as they are. null fits everywhere.
"""

from pathlib import Path
from typing import Any

import yaml

from pipeline.job.paths import JobPaths, read_json

NUMBER = int | float
_PEAK = {"host_bytes": NUMBER, "devices": [{"peak_allocated_bytes": NUMBER}]}
_INTERVAL = {"value!": NUMBER, "low!": NUMBER, "high!": NUMBER}
STATS = {
    **dict.fromkeys(("load_sec", "load_sec_max", "run_sec", "run_sec_max", "completion_tokens"), NUMBER),
    **dict.fromkeys(("tokens_per_sec", "fleet_tokens_per_sec"), NUMBER),
    "rows": {str: NUMBER},
    "timeline": [(NUMBER, NUMBER, NUMBER)],
    "memory": {
        **dict.fromkeys(("footprint_bytes", "quantization_state_bytes", "bare_bytes"), NUMBER),
        "weight_bytes": {str: {str: NUMBER}},
        "load_peak": _PEAK,
        "run_peak": _PEAK,
        "predicted": {str: NUMBER},
    },
    "engine": {"peak_kv_cache_bytes": NUMBER, "reserved_kv_cache_bytes": NUMBER},
    "energy": {"joules": NUMBER, "joules_per_1000_tokens": NUMBER, "source": str},
}
MANIFEST = {
    **dict.fromkeys(("when", "model", "revision", "model_digest", "quantization", "prompts_sha256"), str),
    "command": [str],
    "dtypes": dict,
    "versions": {str: str},
    "device": {"memory_bytes": NUMBER},
    "engine": {"name": str, "versions": {str: str}},
    "merged_from": [str],
    "suggested_generation": {str: dict},
}
SCORES = {"tokens": NUMBER, **dict.fromkeys(("nll", "perplexity", "kl", "top1"), _INTERVAL)}
CONFIG = {"prompt_set": str, "quant": dict, "generation": dict}
HYDRA = {"hydra": {"overrides": {"task": [str]}, "runtime": {"choices": dict}}}


def read_stats(paths: JobPaths) -> dict[str, Any]:
    """Read what of stats.json is whole."""
    return read_fitting(paths.stats, STATS)


def read_manifest(paths: JobPaths) -> dict[str, Any]:
    """Read what of manifest.json is whole."""
    return read_fitting(paths.manifest, MANIFEST)


def read_fitting(path: Path, shape: Any, damaged: list[str] | None = None) -> dict[str, Any]:
    """Read what of a JSON file has the shape.

    Args:
        damaged: gets the names of what has not.
    """
    return _whole(path, read_json(path), shape, damaged)


def read_yaml(path: Path, shape: Any, damaged: list[str] | None = None) -> dict[str, Any]:
    """Read what of a YAML file has the shape."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        value = None
    return _whole(path, value, shape, damaged)


def _whole(path: Path, value: Any, shape: Any, damaged: list[str] | None) -> dict[str, Any]:
    wrong: list[str] = []
    found = fit(value, shape, wrong) if isinstance(value, dict) else None
    if damaged is not None:
        damaged += [f"{path}: {where.lstrip('.')}" for where in wrong]
        if not isinstance(value, dict) and (path.exists() or path.is_symlink()):
            damaged.append(str(path))
    return found if isinstance(found, dict) else {}


def fit(value: Any, shape: Any, wrong: list[str], where: str = "") -> Any:
    """Return what of a value has the shape; add the places of what has not to `wrong`."""
    if value is None:
        return None
    match value, shape:
        case dict(), dict():
            known = {str(key).removesuffix("!"): part for key, part in shape.items() if key is not str}
            kept = {
                key: fit(item, known.get(key, shape.get(str, object)), wrong, f"{where}.{key}")
                for key, item in value.items()
                if isinstance(key, str)
            }
            if all(key.removesuffix("!") in kept for key in shape if key is not str and key.endswith("!")):
                return kept
        case list(), tuple():
            if len(value) == len(shape) and all(map(is_kind, value, shape)):
                return value
        case list(), [part]:
            items = [fit(item, part, wrong, f"{where}[{i}]") for i, item in enumerate(value)]
            return [item for item in items if item is not None]
        case _ if isinstance(shape, dict | list):
            pass
        case _ if is_kind(value, shape):
            return value
    wrong.append(where)
    return None


def is_kind(value: Any, kind: Any) -> bool:
    """Say whether a value is of this type; a number is neither a truth value nor beyond 64 bits."""
    if kind in (NUMBER, int):
        plain = isinstance(value, kind) and not isinstance(value, bool)
        return plain and abs(value) < 2**63  # neither infinite nor NaN
    return isinstance(value, kind)
