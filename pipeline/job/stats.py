"""Say what a job took: the numbers of stats.json, and the table at its end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.host import resident_bytes
from pipeline.common.units import megabytes
from pipeline.config.schema import Config
from pipeline.engine.probe import AnyForward
from pipeline.job.energy import energy_stats
from pipeline.job.meters import Taken
from pipeline.job.predictions import compare
from pipeline.job.ready import Ready


def job_stats(config: Config, ready: Ready, forward: AnyForward | None, taken: Taken) -> dict[str, Any]:
    """Give plain data for stats.json. Bytes and seconds; what could not be measured is null."""
    tokens, run_sec = taken.engine.completion_tokens, taken.run_sec
    memory = {
        **ready.weights,
        "load_peak": asdict(ready.peaks),
        "run_peak": asdict(taken.peaks),
        "resident_bytes": resident_bytes(ready.helper),
        "devices": [asdict(device) for device in ready.device_memory()],
    }
    return {
        "load_sec": ready.loaded.load_sec,
        "run_sec": run_sec,
        "completion_tokens": tokens,
        "tokens_per_sec": tokens / run_sec if run_sec else None,
        "memory": memory | compare(memory, config, ready, forward, taken),
        "engine": taken.engine.summary(),
        "others_mean_cores": round(taken.others_mean_cores, 2),
        "energy": energy_stats(taken.joules, taken.energy_source, tokens),
    }


def show_stats(stats: dict[str, Any], results: Path) -> None:
    """Show the short table at the end of a job."""
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
    terminal.facts("Done", [*facts, ("results", results)])


def _show_memory(memory: dict[str, Any]) -> None:
    """Show predicted beside measured, part by part."""
    names = {
        "footprint": "weights",
        "quantization_state": "quantization state",
        "kv_cache": "KV cache",
        "load_peak": "load peak",
        "load_mapped": "mapped file",
        "run_peak": "run peak",
    }
    rows = []
    for part, name in names.items():
        sizes = [memory[side][f"{part}_bytes"] for side in ("predicted", "measured")]
        error = memory["error_percent"][part]
        if any(sizes):
            rows.append([name, *map(megabytes, sizes), "-" if error is None else f"{error:+.1f} %"])
    terminal.table("Memory", ("", "predicted", "measured", "error"), rows)
