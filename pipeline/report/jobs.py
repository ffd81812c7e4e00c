"""Job folders as they lie on disk: found, read, and named by what tells them apart."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import OutputError
from pipeline.config import quant as quants
from pipeline.job.energy import merge_energy
from pipeline.job.folder import MANIFEST, ROWS, STATS, read_json, read_rows
from pipeline.models.stored_format import is_label, label_bits

SCORES = "scores.json"
MARKS = (ROWS, STATS, MANIFEST, ".hydra", "pipeline.log")  # a folder with one of them is a job's
LOG_TAIL_BYTES = 1 << 16
_PROBLEM = re.compile(r"^[\d-]+ [\d:,]+ (?:ERROR|CRITICAL) [\w.]+: (.*)$", re.MULTILINE)


@dataclass(slots=True)
class Job:
    """One job's folder. What a file does not say is empty: a failed job is a result too."""

    folder: Path
    model: str
    quant: str
    generation: str
    prompt_set: str
    config: dict[str, Any]
    overrides: list[str]
    stats: dict[str, Any]
    manifest: dict[str, Any]
    scores: dict[str, Any]
    problem: str | None  # the last error in its log
    label: str = ""  # unique in a report, short
    shards: list[Path] = field(default_factory=list)  # whose rows are the job's

    @property
    def key(self) -> str:
        return str(self.folder)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of outputs.jsonl, in the order in which they were written."""
        for folder in self.shards or [self.folder]:
            yield from read_rows(folder)


def find_jobs(folders: Iterable[Path]) -> list[Job]:
    """The jobs in these folders and below them, each once, with labels.

    Raises:
        OutputError: a folder is not there, or none of them holds a job.
    """
    found: dict[Path, Job] = {}
    for folder in folders:
        if not folder.is_dir():
            raise OutputError(
                f"{folder}: no such folder. Pass a job's folder, or one that holds jobs: outputs/"
            )
        paths = list(_job_folders(folder))
        found |= {path.resolve(): read_job(path) for path in paths}
        if not paths:
            raise OutputError(
                f"{folder}: holds no job (a folder with {ROWS}, {STATS} or {MANIFEST}). "
                "Run one with python -m pipeline, or pass another folder."
            )
    jobs = sorted(found.values(), key=lambda job: (job.prompt_set, job.model, -precision(job), job.quant))
    _label(jobs)
    return jobs


def _job_folders(folder: Path) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in MARKS) or _shards(folder):
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _job_folders(child)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("shard-*-of-*") if path.is_dir())


def read_job(folder: Path) -> Job:
    """One job, from whatever files its folder has."""
    shards = _shards(folder)
    merged = (folder / ROWS).exists()
    first = shards[0] if shards and not merged else folder
    settings = next((path for path in (folder, *shards) if (path / ".hydra").is_dir()), folder)
    config = _yaml(settings / ".hydra" / "config.yaml")
    hydra = _yaml(settings / ".hydra" / "hydra.yaml")
    choices = _choices(hydra) or _choices_of_name(folder.name)
    overrides = hydra.get("hydra", {}).get("overrides", {}).get("task", [])
    manifest = read_json(first / MANIFEST) or {}
    stored = str(manifest.get("quantization", ""))
    stats = [read_json(path / STATS) or {} for path in (shards if first is not folder else [folder])]
    for each in stats if shards else []:
        each.pop("timeline", None)  # of several machines, which have no common time
    return Job(
        folder=folder,
        model=choices["model"],
        quant=stored if is_label(stored) else choices["quant"],
        generation=choices["generation"],
        prompt_set=str(config.get("prompt_set") or folder.resolve().parent.name),
        config=config,
        overrides=[str(o) for o in overrides],
        stats=stats[0] if len(stats) == 1 else _together(stats),
        manifest=manifest,
        scores=read_json(folder / SCORES) or {},
        problem=_problem(first / "pipeline.log"),
        shards=shards if first is not folder else [],
    )


def precision(job: Job) -> float:
    """Say how near to exact a job's arithmetic is: the higher, the nearer."""
    if is_label(job.quant):
        return label_bits(job.quant)
    return quants.precision(quants.read_quant(job.config.get("quant"), job.quant))


def _choices(hydra: dict[str, Any]) -> dict[str, str] | None:
    chosen = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
    if not {"model", "quant", "generation"} <= chosen.keys():
        return None
    named = [
        o.partition("=")[2] for o in hydra["hydra"].get("overrides", {}).get("task", []) if "model.name=" in o
    ]
    return {**{k: str(v) for k, v in chosen.items()}, **({"model": Path(named[-1]).name} if named else {})}


def _choices_of_name(name: str) -> dict[str, str]:
    """<model>-<quant>-<generation>-<fingerprint>; a model's name may hold hyphens."""
    parts = name.rsplit("-", 3)
    if len(parts) != 4:
        return {"model": name, "quant": "?", "generation": "?"}
    return dict(zip(("model", "quant", "generation"), parts, strict=False))


def _label(jobs: list[Job]) -> None:
    """Call each job by the fields in which the jobs differ; a fingerprint where these are not enough."""
    fields = ("model", "quant", "generation", "prompt_set")
    differ = [f for f in fields if len({getattr(job, f) for job in jobs}) > 1] or ["quant"]
    for job in jobs:
        job.label = " · ".join(getattr(job, f) for f in differ)
    labels = [job.label for job in jobs]
    for job in jobs:
        if labels.count(job.label) > 1:
            job.label += f" · {job.folder.name.rsplit('-', 1)[-1]}"
    if len({job.label for job in jobs}) < len(jobs):
        for number, job in enumerate(jobs, 1):
            job.label += f" · {number}"


def _together(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The stats of a sharded job: counts, speeds and joules add up, times and peaks are the largest shard's."""
    whole = [s for s in shards if s]
    if not whole:
        return {}
    largest = max(whole, key=lambda s: ((s.get("memory") or {}).get("run_peak") or {}).get("host_bytes") or 0)
    rows = [s.get("rows") or {} for s in whole]
    return {
        **largest,
        "load_sec": max(s.get("load_sec") or 0 for s in whole),
        "run_sec": max(s.get("run_sec") or 0 for s in whole),
        "completion_tokens": sum(s.get("completion_tokens") or 0 for s in whole),
        "tokens_per_sec": sum(s.get("tokens_per_sec") or 0 for s in whole),
        "energy": merge_energy(whole),
        "rows": {name: sum(r.get(name) or 0 for r in rows) for name in ("total", "done", "errors")},
        "shards": f"{len(whole)} of {len(shards)}",
    }


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _problem(log: Path) -> str | None:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    found = _PROBLEM.findall(tail)
    return found[-1].strip() if found else None
