"""Combine the stats.json of shards: counts are summed, peaks are maxima, times are both."""

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.job.energy import merge_energy


def fleet_tokens_per_sec(speeds: Iterable[float | None]) -> float | None:
    """Add the speeds of shards that run at once: what a user waits by."""
    known = [speed for speed in speeds if speed is not None]
    return sum(known) if known else None


def shard_tokens_per_sec(tokens: float | None, run_sec: float | None) -> float | None:
    """Divide all shards' tokens by all shards' seconds: how fast one of them is, and what jobs compare by."""
    return tokens / run_sec if tokens is not None and run_sec else None


def combine(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one stats.json of those of all shards, before they are merged and after.

    A key that ends in _sec is the sum (the time that one machine would need), and beside it KEY_max is the
    longest shard's. Memory is that of the shard that took most, entry by entry. Means and fractions are
    weighted by completion tokens. tokens_per_sec is one shard's, fleet_tokens_per_sec that of all at once.
    Shards ran at times of their own: there is no common timeline. Energy is known if that of every shard is.
    """
    weights = [float(shard.get("completion_tokens") or 0) for shard in shards]
    others = [
        {key: value for key, value in shard.items() if key not in ("timeline", "energy")} for shard in shards
    ]
    combined = _objects(others, weights, peak=False)
    combined["energy"] = merge_energy(shards)
    combined["tokens_per_sec"] = shard_tokens_per_sec(
        combined.get("completion_tokens"), combined.get("run_sec")
    )
    combined["fleet_tokens_per_sec"] = fleet_tokens_per_sec(shard.get("tokens_per_sec") for shard in shards)
    return combined


def _objects(values: Sequence[dict[str, Any]], weights: Sequence[float], *, peak: bool) -> dict[str, Any]:
    combined: dict[str, Any] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        found = [(v[key], w) for v, w in zip(values, weights, strict=True) if v.get(key) is not None]
        parts = [part for part, _ in found]
        combined[key] = _values(
            key, parts, [w for _, w in found], peak=peak or key == "memory" or "peak" in key
        )
        if key.endswith("_sec") and not key.endswith("per_sec") and parts:
            combined[f"{key}_max"] = max(parts)
    return combined


def _values(key: str, parts: list[Any], weights: list[float], *, peak: bool) -> Any:
    """Combine the values of one key; `weights` are the completion tokens of those shards that have it."""
    if not parts:
        return None
    if all(isinstance(part, dict) for part in parts):
        return _objects(parts, weights, peak=peak)
    if all(isinstance(part, list) for part in parts):
        return [_values(key, *_column(parts, weights, i), peak=peak) for i in range(max(map(len, parts)))]
    if any(isinstance(part, bool | str) for part in parts):
        return parts[0] if all(part == parts[0] for part in parts) else parts
    if peak:
        return max(parts)
    if "mean" in key or "fraction" in key or "_over_" in key or key.endswith("per_sec"):
        weight = sum(weights)
        return sum(p * w for p, w in zip(parts, weights, strict=True)) / weight if weight else parts[0]
    return sum(parts)


def _column(parts: list[list[Any]], weights: list[float], i: int) -> tuple[list[Any], list[float]]:
    """Take item i of every list that is long enough, and the weights of those lists."""
    longer = [(part[i], weight) for part, weight in zip(parts, weights, strict=True) if i < len(part)]
    return [item for item, _ in longer], [weight for _, weight in longer]
