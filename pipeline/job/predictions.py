"""Put what was predicted of a job's memory beside what was measured."""

from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.config.schema import Config
from pipeline.engine.limits import Limits
from pipeline.engine.probe import AnyForward
from pipeline.job.meters import Taken
from pipeline.job.ready import Ready
from pipeline.job.vllm_ready import VllmReady
from pipeline.memory.compare import PARTS, Setup, compared, predicted
from pipeline.memory.facts import job_architecture
from pipeline.memory.plan import footprint_bytes


def _setup(config: Config, ready: Ready, limits: Limits) -> Setup:
    """Collect what decides the job's memory, beside its prompts."""
    return Setup(
        job_architecture(config.model, config.models_dir, config.quant, ready.gpus),
        ready.quant,
        ready.gpus,
        packed=ready.packed,
        prefill_tokens=config.engine.prefill_tokens,
        copies_logits=config.generation.copies_logits,
        limits=limits,
    )


def compare(
    memory: dict[str, Any], config: Config, ready: Ready, forward: AnyForward | None, taken: Taken
) -> dict[str, Any]:
    """Put what was predicted beside what was measured: on a CPU the peaks are what came on top of the bare process."""
    loading, bare_bytes = _loading(memory["load_peak"], ready), ready.loaded.bare_bytes
    kv_cache = taken.engine.peak_kv_cache_bytes
    if isinstance(ready, VllmReady):
        expected, kv_cache = _planned(config, ready), ready.reserved["kv_cache_bytes"]
    else:
        assert forward is not None
        expected = predicted(_setup(config, ready, forward.limits), taken.engine)
    measured = {
        "footprint": memory["footprint_bytes"],
        "quantization_state": memory["quantization_state_bytes"],
        "kv_cache": kv_cache,
        **loading,
        "run_peak": _grown(memory["run_peak"], ready.gpus, bare_bytes),
    }
    return {"bare_bytes": bare_bytes, **compared(expected, measured)}


def _planned(config: Config, ready: VllmReady) -> dict[str, int | None]:
    """Say what was planned for vLLM: its weights, and what it was to reserve. Its peaks nobody predicts."""
    arch = job_architecture(config.model, config.models_dir, config.quant, ready.gpus)
    return {
        **dict.fromkeys(PARTS),
        "footprint": None if arch is None else footprint_bytes(arch, ready.quant),
        "kv_cache": ready.arguments.get("kv_cache_memory_bytes"),
    }


def _loading(peaks: dict[str, Any], ready: Ready) -> dict[str, int | None]:
    """Tell what had to be free while loading from what was only mapped; None where the system does not."""
    loaded, gpus = ready.loaded, ready.gpus
    grown = _grown(peaks, gpus, loaded.bare_bytes)
    if gpus:
        return {"load_peak": grown, "load_mapped": 0}
    held, bare = peaks["anonymous_bytes"], loaded.bare_anonymous_bytes
    if isinstance(ready, VllmReady):
        return {"load_peak": grown, "load_mapped": None}
    if grown is None or held is None or bare is None:
        return dict.fromkeys(("load_peak", "load_mapped"))
    return {"load_peak": held - bare, "load_mapped": max(0, grown - (held - bare))}


def _grown(peaks: dict[str, Any], gpus: tuple[Gpu, ...], bare_bytes: int) -> int | None:
    if gpus:  # without counters, as on Apple's, there is nothing to compare with
        return sum(int(device["peak_allocated_bytes"]) for device in peaks["devices"]) or None
    return None if peaks["host_bytes"] is None else int(peaks["host_bytes"]) - bare_bytes
