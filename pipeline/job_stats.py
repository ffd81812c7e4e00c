"""What a job took: the numbers of stats.json, and the table at its end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import display
from pipeline.engine.stats import EngineStats
from pipeline.memory_stats import (
    Peaks,
    devices,
    footprint_bytes,
    quantization_state_bytes,
    resident_bytes,
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


def show_stats(stats: dict[str, Any], folder: Path) -> None:
    """The short table at the end of a job."""
    rows, memory = stats["rows"], stats["memory"]
    facts = [
        ("rows", f"{rows['done']} of {rows['total']}, {rows['errors']} with errors"),
        ("tokens", f"{stats['completion_tokens']:,} in {stats['run_sec']:.1f} s"),
        ("speed", f"{stats['tokens_per_sec'] or 0:,.1f} tokens/s (loading took {stats['load_sec']:.1f} s)"),
        ("weights", display.megabytes(memory["footprint_bytes"])),
        ("peak memory", display.megabytes(memory["run_peak"]["host_bytes"]) + " resident"),
    ]
    for device in memory["run_peak"]["devices"]:
        peak = display.megabytes(device["peak_allocated_bytes"])
        facts.append((f"peak GPU {device['index']}", f"{peak} allocated"))
    display.facts("Done", [*facts, ("results", folder / "outputs.jsonl")])
