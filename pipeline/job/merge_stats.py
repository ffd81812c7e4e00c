"""stats.json of merged shards: counts are summed, peaks are maxima, times are both."""

from collections.abc import Sequence
from typing import Any

from pipeline.job.energy import merge_energy


def merge_stats(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One stats.json's data from those of all shards.

    A key that ends in _sec is the sum (the time that one machine would need), and beside it KEY_max is the
    longest shard's. Memory is that of the shard that took most, entry by entry. Means and fractions are
    weighted by completion tokens; tokens_per_sec is tokens over summed run_sec. Shards ran at times of
    their own: there is no common timeline. Energy is known if that of every shard is.
    """
    weights = [float(shard.get("completion_tokens") or 0) for shard in shards]
    others = [
        {key: value for key, value in shard.items() if key not in ("timeline", "energy")} for shard in shards
    ]
    merged = _objects(others, weights, peak=False)
    merged["energy"] = merge_energy(shards)
    tokens, run_sec = merged.get("completion_tokens"), merged.get("run_sec")
    merged["tokens_per_sec"] = tokens / run_sec if tokens is not None and run_sec else None
    return merged


def _objects(values: Sequence[dict[str, Any]], weights: Sequence[float], *, peak: bool) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found = [(v[key], w) for v, w in zip(values, weights, strict=True) if v.get(key) is not None]
        parts = [part for part, _ in found]
        merged[key] = _values(
            key, parts, [w for _, w in found], peak=peak or key == "memory" or "peak" in key
        )
        if key.endswith("_sec") and not key.endswith("per_sec") and parts:
            merged[f"{key}_max"] = max(parts)
    return merged


def _values(key: str, parts: list[Any], weights: list[float], *, peak: bool) -> Any:
    if not parts:
        return None
    if all(isinstance(part, dict) for part in parts):
        return _objects(parts, weights, peak=peak)
    if all(isinstance(part, list) for part in parts):
        longest = max(map(len, parts))
        return [
            _values(
                key, [p[i] for p in parts if i < len(p)], weights[: sum(i < len(p) for p in parts)], peak=peak
            )
            for i in range(longest)
        ]
    if any(isinstance(part, bool | str) for part in parts):
        return parts[0] if all(part == parts[0] for part in parts) else parts
    if peak:
        return max(parts)
    if "mean" in key or "fraction" in key or "_over_" in key or key.endswith("per_sec"):
        weight = sum(weights)
        return sum(p * w for p, w in zip(parts, weights, strict=True)) / weight if weight else parts[0]
    return sum(parts)
