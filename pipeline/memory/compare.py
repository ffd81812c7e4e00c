"""Put the predicted beside the measured, part by part, for stats.json and a job's last table.

The KV cache is predicted for the rectangles that the run really had, and the run peak for its rows and its
widest pass: what `python -m pipeline plan` says beforehand from a prompt file, with the lengths that came true.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.common.gpu import Gpu
from pipeline.config.quant import QuantConfig
from pipeline.engine.limits import Limits
from pipeline.engine.stats import EngineStats
from pipeline.memory.architecture import Architecture
from pipeline.memory.peaks import load_peak, run_peak
from pipeline.memory.plan import footprint_bytes, kv_cache_bytes, quant_state_bytes

PARTS = ("footprint", "quantization_state", "kv_cache", "load_peak", "load_mapped", "run_peak")
BOUNDS = ("load_mapped",)  # the most that it may be, and nothing to be right or wrong about


@dataclass(frozen=True, slots=True)
class Setup:
    """Hold what decides a job's memory, beside its prompts."""

    architecture: Architecture | None  # None: the memory plan does not know it
    quant: QuantConfig  # settled for the GPUs
    gpus: tuple[Gpu, ...]  # those that it lies on; () is a run on the CPU
    packed: bool  # linear layers are held in a better order (engine/cpu/packing.py)
    prefill_tokens: int
    copies_logits: bool
    limits: Limits  # of the way that keys and values are held


def predicted(setup: Setup, engine: EngineStats) -> dict[str, int | None]:
    """Predict the bytes of PARTS; None where there is no prediction, never 0.

    On GPUs both peaks are those of torch's counters, which see tensors and no context.
    """
    arch, quant = setup.architecture, setup.quant
    if arch is None:
        return dict.fromkeys(PARTS)
    kv_cache = sum(
        kv_cache_bytes(arch, quant, [(rows, tokens)], limits=setup.limits, prefilling=not regrouped)
        for rows, tokens, regrouped in engine.peak_rectangles
    )
    peak = run_peak(
        arch,
        quant,
        kv_cache=kv_cache,
        rows=engine.peak_rows,
        prefill_tokens=min(setup.prefill_tokens, engine.largest_prefill_columns),
        columns=engine.longest_prompt_columns,
        copies_logits=setup.copies_logits,
        gpus=setup.gpus,
        packed=setup.packed,
    )
    loading = load_peak(arch, quant, gpus=setup.gpus, packed=setup.packed)
    return {
        "footprint": footprint_bytes(arch, quant),
        "quantization_state": quant_state_bytes(arch, quant),
        "kv_cache": kv_cache,
        # Where the weights stay pages of the file, what else is held is too little to be predicted.
        "load_peak": loading.held or None,
        "load_mapped": loading.mapped,
        "run_peak": peak.total - (peak.context if setup.gpus else 0),
    }


def compared(
    predicted: Mapping[str, int | None], measured: Mapping[str, int | None]
) -> dict[str, dict[str, Any]]:
    """Put both in bytes, and say how far the prediction is off in percent of the measured."""
    return {
        "predicted": {f"{part}_bytes": predicted[part] for part in PARTS},
        "measured": {f"{part}_bytes": measured[part] for part in PARTS},
        "error_percent": {
            part: None if part in BOUNDS else error_percent(predicted[part], measured[part]) for part in PARTS
        },
    }


def error_percent(predicted: int | None, measured: int | None) -> float | None:
    """Return how far off it is, above 0 where it is too much; None where there is nothing to compare."""
    if predicted is None or measured is None:
        return None
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return 100 * (predicted - measured) / measured
