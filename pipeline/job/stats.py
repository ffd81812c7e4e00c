"""What a job took: the numbers of stats.json, and the table at its end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.gpu import Gpu
from pipeline.common.host import resident_bytes
from pipeline.common.units import megabytes
from pipeline.engine.stats import EngineStats
from pipeline.memory.compare import Setup, compared, predicted
from pipeline.memory.measured import (
    Peaks,
    devices,
    footprint_bytes,
    quantization_state_bytes,
    weight_bytes,
)


def measure_weights(model: Any) -> dict[str, Any]:
    """What the model's weights take, as loaded and before the engine touches them."""
    return {
        "footprint_bytes": footprint_bytes(model),
        "weight_bytes": weight_bytes(model),
        "quantization_state_bytes": quantization_state_bytes(model),
        "parameters": model.num_parameters(),
    }


def job_stats(
    engine: EngineStats,
    weights: dict[str, Any],
    load_peak: Peaks,
    run_peak: Peaks,
    load_sec: float,
    run_sec: float,
) -> dict[str, Any]:
    """Plain data for stats.json. Bytes and seconds; what could not be measured is null."""
    return {
        "load_sec": load_sec,
        "run_sec": run_sec,
        "completion_tokens": engine.completion_tokens,
        "tokens_per_sec": engine.completion_tokens / run_sec if run_sec else None,
        "memory": {
            **weights,
            "load_peak": asdict(load_peak),
            "run_peak": asdict(run_peak),
            "resident_bytes": resident_bytes(),
            "devices": [asdict(device) for device in devices()],
        },
        "engine": engine.summary(),
    }


def compare_memory(
    memory: dict[str, Any], setup: Setup, engine: EngineStats, bare_bytes: int
) -> dict[str, Any]:
    """What was predicted beside what was measured, for stats.json's `memory`.

    Args:
        memory: as in `job_stats`.
        bare_bytes: the resident set before the first weight; on a CPU the peaks are what came on top.
    """
    measured = {
        "footprint": memory["footprint_bytes"],
        "quantization_state": memory["quantization_state_bytes"],
        "kv_cache": engine.peak_kv_cache_bytes,
        "load_peak": _grown(memory["load_peak"], setup.gpus, bare_bytes),
        "run_peak": _grown(memory["run_peak"], setup.gpus, bare_bytes),
    }
    return {"bare_bytes": bare_bytes, **compared(predicted(setup, engine), measured)}


def _grown(peaks: dict[str, Any], gpus: tuple[Gpu, ...], bare_bytes: int) -> int | None:
    if gpus:  # without counters, as on Apple's, there is nothing to compare with
        return sum(int(device["peak_allocated_bytes"]) for device in peaks["devices"]) or None
    return None if peaks["host_bytes"] is None else int(peaks["host_bytes"]) - bare_bytes


def show_stats(stats: dict[str, Any], folder: Path) -> None:
    """The short table at the end of a job."""
    rows, memory = stats["rows"], stats["memory"]
    facts = [
        ("rows", f"{rows['done']} of {rows['total']}, {rows['errors']} with errors"),
        ("tokens", f"{stats['completion_tokens']:,} in {stats['run_sec']:.1f} s"),
        ("speed", f"{stats['tokens_per_sec'] or 0:,.1f} tokens/s (loading took {stats['load_sec']:.1f} s)"),
        ("peak memory", megabytes(memory["run_peak"]["host_bytes"]) + " resident"),
    ]
    for device in memory["run_peak"]["devices"]:
        peak = megabytes(device["peak_allocated_bytes"])
        facts.append((f"peak GPU {device['index']}", f"{peak} allocated"))
    if (energy := stats["energy"])["joules"]:
        each = energy["joules_per_1000_tokens"]
        per = f", {each:,.1f} J per 1,000 tokens" if each else ""
        facts.append(("energy", f"{energy['joules']:,.1f} J{per} ({energy['source']})"))
    _show_memory(memory)
    terminal.facts("Done", [*facts, ("results", folder / "outputs.jsonl")])


def _show_memory(memory: dict[str, Any]) -> None:
    """Predicted beside measured, part by part."""
    names = {
        "footprint": "weights",
        "quantization_state": "quantization state",
        "kv_cache": "KV cache",
        "load_peak": "load peak",
        "run_peak": "run peak",
    }
    rows = []
    for part, name in names.items():
        sizes = [memory[side][f"{part}_bytes"] for side in ("predicted", "measured")]
        error = memory["error_percent"][part]
        if any(sizes):
            rows.append([name, *map(megabytes, sizes), "-" if error is None else f"{error:+.1f} %"])
    terminal.table("Memory", ("", "predicted", "measured", "error"), rows)
