"""Make one record a job, of plain data: what the table, the plots and report.json say.

A new column is an entry of `cells` here (and of BEST, where one value is better than another), and one of
COLUMNS in table.py.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common.hidden import hide_environment
from pipeline.common.intervals import proportion
from pipeline.common.terminal import how_many, visible
from pipeline.job.energy import merge_energy
from pipeline.report.jobs import ReportedJob
from pipeline.report.prompts import Prompt
from pipeline.report.quality import against_references, baselines, compare_jobs

Record = dict[str, Any]


def summarize(
    jobs: Sequence[ReportedJob], prompts: Sequence[Prompt], baseline: Path | None = None
) -> list[Record]:
    """Make the jobs' records, in their order.

    Raises:
        OutputError: as `baselines`.
    """
    records = []
    for number, (job, other) in enumerate(zip(jobs, baselines(jobs, baseline), strict=True)):
        own = [p for p in prompts if p.answers[number] is not None]
        records.append(
            {
                "label": job.label,
                "folder": str(job.folder),
                "model": job.model,
                "quant": job.quant,
                "generation": job.generation,
                "engine": job.engine,
                "prompt_set": job.prompt_set,
                **_state(job, own, number),
                **_speed(job, own, number),
                "memory": memory(job.stats),
                "energy": merge_energy([job.stats]),
                "baseline": None if other is None else jobs[other].label,
                "quality": compare_jobs(prompts, number, other),
                "reference": against_references(prompts, number),
                "in_shape": _in_shape(own, number),
                "scores": _scores(job.scores),
                "completions": _completions(own, number),
                "timeline": job.stats.get("timeline") or [],
                "setup": _setup(job),
            }
        )
    return records


def _state(job: ReportedJob, own: Sequence[Prompt], number: int) -> Record:
    """Say done, stopped or failed, and why. A job whose rows are all written is done, with errors or without."""
    rows = job.stats.get("rows") or {}
    errors = sum(bool(answer.error) for p in own if (answer := p.answers[number]))
    total = max(rows.get("total") or 0, len(own))
    counts = {"total": total, "done": len(own), "errors": errors, "done_before": rows.get("done_before") or 0}
    found = {"rows": counts, "reason": None}
    if not own:
        reason = (
            job.problem or "Its log names no error: it was killed, is still loading, or waits for its turn."
        )
        return {**found, "state": "failed", "reason": reason}
    if not job.stats or len(own) < total:
        rows_done = f"{len(own):,} of {how_many(total, 'row')}"
        reason = job.problem or f"{rows_done} are done. The same command goes on from here."
        return {**found, "state": "stopped", "reason": reason}
    return {**found, "state": "done"}


def _speed(job: ReportedJob, own: Sequence[Prompt], number: int) -> Record:
    tokens = sum(answer.completion_tokens for p in own if (answer := p.answers[number]))
    stats = job.stats
    return {
        "completion_tokens": tokens,
        "tokens_per_sec": stats.get("tokens_per_sec"),
        "fleet_tokens_per_sec": stats.get("fleet_tokens_per_sec"),
        "load_sec": stats.get("load_sec_max", stats.get("load_sec")),  # shards load side by side
        "run_sec": stats.get("run_sec"),
    }


def memory(stats: dict[str, Any]) -> Record:
    """Take measured bytes by part, their peak, and the prediction where the job wrote one.

    peak_bytes is allocated on GPUs where there are any, else the resident set; `rest` is what the peak
    holds beside the parts: activations, logits, and on a CPU Python and its libraries.
    """
    measured = stats.get("memory") or {}
    peak = measured.get("run_peak") or {}
    gpus = peak.get("devices") or []
    allocated = sum(gpu.get("peak_allocated_bytes") or 0 for gpu in gpus)
    weights = measured.get("weight_bytes") or {}
    parts = {part: sum(filter(None, sizes.values())) for part, sizes in weights.items() if sizes}
    parts["quantization state"] = measured.get("quantization_state_bytes") or 0
    parts["KV cache"] = _kv_cache_bytes(stats.get("engine") or {})
    peak_bytes = allocated or peak.get("host_bytes")
    parts["rest"] = max(0, (peak_bytes or 0) - sum(parts.values()))
    predicted = measured.get("predicted") or {}
    predicted_peak = _first(predicted, "run_peak_bytes")
    if predicted_peak is not None and not allocated:  # what comes on top of the bare process
        predicted_peak += measured.get("bare_bytes") or 0
    return {
        "footprint_bytes": measured.get("footprint_bytes"),
        "quantization_state_bytes": measured.get("quantization_state_bytes"),
        "peak_bytes": peak_bytes,
        "peak_of": "GPU memory allocated" if allocated else "resident set",
        "load_peak_bytes": (measured.get("load_peak") or {}).get("host_bytes"),
        "parts": {name: size for name, size in parts.items() if size},
        "predicted_footprint_bytes": _first(predicted, "footprint_bytes", "footprint"),
        "predicted_peak_bytes": predicted_peak,
    }


def _kv_cache_bytes(engine: dict[str, Any]) -> int:
    """Take what keys and values held: vLLM holds all that it has reserved, used or not."""
    return engine.get("reserved_kv_cache_bytes") or engine.get("peak_kv_cache_bytes") or 0


def _first(values: dict[str, Any], *names: str) -> int | None:
    found = (values.get(name) for name in names)
    return next((int(v) for v in found if isinstance(v, int | float)), None)


def _completions(own: Sequence[Prompt], number: int) -> Record:
    """Collect lengths in tokens, and how completions ended."""
    answers = [answer for p in own if (answer := p.answers[number])]
    ends: dict[str, int] = {}
    for answer in answers:
        end = "error" if answer.error else visible(str(answer.finish_reason))
        ends[end] = ends.get(end, 0) + 1
    lengths = [answer.completion_tokens for answer in answers if not answer.error]
    return {"lengths": lengths, "finish_reasons": ends}


def _in_shape(own: Sequence[Prompt], number: int) -> Record | None:
    """Estimate how often an answer with a constraint is whole; None where there is none."""
    found = [answer.complete for p in own if (answer := p.answers[number]) and answer.complete is not None]
    share = proportion(sum(found), len(found))
    return asdict(share) if share else None


def _scores(scores: dict[str, Any]) -> dict[str, Any] | None:
    return scores if scores.get("nll") else None


def _setup(job: ReportedJob) -> Record:
    manifest = job.manifest
    command = manifest.get("command") or ["python", "-m", "pipeline", *job.overrides]
    return {
        "command": [hide_environment(str(part)) for part in command],
        "overrides": job.overrides,
        "config": {
            key: value for key, value in job.config.items() if key != "submit"
        },  # no part of the result
        "manifest": {name: value for name, value in manifest.items() if name != "command"},
        "engine": job.stats.get("engine") or {},
    }


BEST = {  # column to whether more is better
    "tokens_per_sec": True,
    "load_sec": False,
    "joules_per_1000_tokens": False,
    "footprint_bytes": False,
    "peak_bytes": False,
    "exact_match": True,
    "agreement": True,
    "kl": False,
    "top1": True,
    "perplexity": False,
    "reference": True,
    "in_shape": True,
}


def cells(record: Record) -> dict[str, float | None]:
    """Give the numbers of a record's line in the table, by column."""
    quality, scores = record["quality"] or {}, record["scores"] or {}
    marks = record["reference"] or {}
    best_mark = marks.get("contains")
    return {
        "rows": record["rows"]["done"],
        "errors": record["rows"]["errors"],
        "completion_tokens": record["completion_tokens"],
        "tokens_per_sec": record["tokens_per_sec"],
        "fleet_tokens_per_sec": record["fleet_tokens_per_sec"],
        "load_sec": record["load_sec"],
        "joules_per_1000_tokens": record["energy"]["joules_per_1000_tokens"],
        "footprint_bytes": record["memory"]["footprint_bytes"],
        "predicted_footprint_bytes": record["memory"]["predicted_footprint_bytes"],
        "peak_bytes": record["memory"]["peak_bytes"],
        "predicted_peak_bytes": record["memory"]["predicted_peak_bytes"],
        "exact_match": _value(quality.get("exact_match")),
        "agreement": _value(quality.get("agreement")),
        "divergence": quality.get("median_first_divergence"),
        "kl": _value(scores.get("kl")),
        "top1": _value(scores.get("top1")),
        "perplexity": _value(scores.get("perplexity")),
        "reference": _value(best_mark),
        "in_shape": _value(record["in_shape"]),
    }


def best_values(records: Sequence[Record]) -> dict[str, float]:
    """Find each column's best value among the jobs that finished, where they differ.

    A baseline's quality is no merit.
    """
    table = []
    for record in records:
        if record["state"] == "done":
            own = ("kl", "top1", "perplexity") if record["baseline"] == record["label"] else ()
            table.append({name: value for name, value in cells(record).items() if name not in own})
    best: dict[str, float] = {}
    for column, more in BEST.items():
        values = [v for row in table if (v := row.get(column)) is not None]
        if len(set(values)) > 1:
            best[column] = max(values) if more else min(values)
    return best


def _value(interval: dict[str, float | None] | None) -> float | None:
    return interval["value"] if interval else None
