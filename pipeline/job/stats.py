"""Say what a job took: the numbers of stats.json, and the table at its end."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.gpu import Gpu
from pipeline.common.host import resident_bytes
from pipeline.common.units import megabytes
from pipeline.config.schema import Config
from pipeline.engine.limits import Limits
from pipeline.job.energy import energy_stats
from pipeline.job.load import Ready
from pipeline.job.meters import Taken
from pipeline.memory.compare import Setup, compared, predicted
from pipeline.memory.facts import job_architecture
from pipeline.memory.measured import devices


def job_stats(config: Config, ready: Ready, limits: Limits, taken: Taken) -> dict[str, Any]:
    """Give plain data for stats.json. Bytes and seconds; what could not be measured is null."""
    tokens, run_sec = taken.engine.completion_tokens, taken.run_sec
    memory = {
        **ready.weights,
        "load_peak": asdict(ready.peaks),
        "run_peak": asdict(taken.peaks),
        "resident_bytes": resident_bytes(),
        "devices": [asdict(device) for device in devices()],
    }
    return {
        "load_sec": ready.loaded.load_sec,
        "run_sec": run_sec,
        "completion_tokens": tokens,
        "tokens_per_sec": tokens / run_sec if run_sec else None,
        "memory": memory | _compare(memory, _setup(config, ready, limits), taken, ready),
        "engine": taken.engine.summary(),
        "others_mean_cores": round(taken.others_mean_cores, 2),
        "energy": energy_stats(taken.joules, taken.energy_source, tokens),
    }


def _setup(config: Config, ready: Ready, limits: Limits) -> Setup:
    """Collect what decides the job's memory, beside its prompts."""
    return Setup(
        job_architecture(config.model, config.models_dir, config.quant, ready.gpus),
        ready.quant,
        ready.gpus,
        packed=ready.packed,
        prefill_tokens=config.engine.prefill_tokens,
        sampled=not config.generation.greedy,
        limits=limits,
    )


def _compare(memory: dict[str, Any], setup: Setup, taken: Taken, ready: Ready) -> dict[str, Any]:
    """Put what was predicted beside what was measured: on a CPU the peaks are what came on top of the bare process."""
    loading, bare_bytes = _loading(memory["load_peak"], ready), ready.loaded.bare_bytes
    measured = {
        "footprint": memory["footprint_bytes"],
        "quantization_state": memory["quantization_state_bytes"],
        "kv_cache": taken.engine.peak_kv_cache_bytes,
        **loading,
        "run_peak": _grown(memory["run_peak"], setup.gpus, bare_bytes),
    }
    return {"bare_bytes": bare_bytes, **compared(predicted(setup, taken.engine), measured)}


def _loading(peaks: dict[str, Any], ready: Ready) -> dict[str, int | None]:
    """Tell what had to be free while loading from what was only mapped; None where the system does not."""
    loaded, gpus = ready.loaded, ready.gpus
    grown = _grown(peaks, gpus, loaded.bare_bytes)
    if gpus:
        return {"load_peak": grown, "load_mapped": 0}
    held, bare = peaks["anonymous_bytes"], loaded.bare_anonymous_bytes
    if grown is None or held is None or bare is None:
        return dict.fromkeys(("load_peak", "load_mapped"))
    return {"load_peak": held - bare, "load_mapped": max(0, grown - (held - bare))}


def _grown(peaks: dict[str, Any], gpus: tuple[Gpu, ...], bare_bytes: int) -> int | None:
    if gpus:  # without counters, as on Apple's, there is nothing to compare with
        return sum(int(device["peak_allocated_bytes"]) for device in peaks["devices"]) or None
    return None if peaks["host_bytes"] is None else int(peaks["host_bytes"]) - bare_bytes


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
