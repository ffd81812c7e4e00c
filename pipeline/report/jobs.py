"""Find job folders on disk, read them, and name each by what tells it apart."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import OutputError
from pipeline.common.hidden import hide_environment
from pipeline.common.terminal import visible
from pipeline.config import quant as quants
from pipeline.config.stored_format import is_label, label_bits
from pipeline.job.damage import damage
from pipeline.job.paths import JobPaths
from pipeline.job.rows import read_rows
from pipeline.job.shards import combine
from pipeline.job.stored import (
    CONFIG,
    HYDRA,
    SCORES,
    read_fitting,
    read_manifest,
    read_stats,
    read_yaml,
)

LOG_TAIL_BYTES = 1 << 16
_PROBLEM = re.compile(r"^[\d-]+ [\d:,]+ (?:ERROR|CRITICAL) [\w.]+: (.*)$", re.MULTILINE)


@dataclass(slots=True)
class ReportedJob:
    """Hold what a job's folder says. What a file does not say is empty: a failed job is a result too."""

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
    engine: str = "default"
    label: str = ""  # unique in a report, short
    shards: list[Path] = field(default_factory=list)  # whose rows are the job's
    damaged: list[str] = field(default_factory=list)  # what of its files cannot be read

    @property
    def key(self) -> str:
        """Tell it from any other job."""
        return str(self.folder)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the lines of outputs.jsonl, in the order in which they were written."""
        for folder in self.shards or [self.folder]:
            yield from read_rows(JobPaths(folder).rows, self._note)

    def _note(self, damaged: str) -> None:
        if damaged not in self.damaged:
            self.damaged.append(damaged)


def find_jobs(folders: Iterable[Path]) -> list[ReportedJob]:
    """Find the jobs in these folders and below them, each once, with labels.

    Raises:
        OutputError: a folder is not there, or none of them holds a job.
    """
    found: dict[Path, ReportedJob] = {}
    for folder in folders:
        if not folder.is_dir():
            raise OutputError(
                found=f"{folder}: no such folder",
                fix="Pass a job's folder, or one that holds jobs: outputs/",
            )
        paths = list(_job_folders(folder))
        found |= {path.resolve(): read_job(path) for path in paths}
        if not paths:
            raise OutputError(
                found=f"{folder}: holds no job (a folder with outputs.jsonl, stats.json or manifest.json)",
                fix="Run one with python -m pipeline, or pass another folder.",
            )
    jobs = sorted(found.values(), key=lambda job: (job.prompt_set, job.model, -precision(job), job.quant))
    _label(jobs)
    return jobs


def _job_folders(folder: Path) -> Iterator[Path]:
    paths = JobPaths(folder)
    if paths.is_job or paths.shards:
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _job_folders(child)


def read_job(folder: Path) -> ReportedJob:
    """Read one job, from whatever files its folder has; shards that are not merged are one job."""
    whole = JobPaths(folder)
    shards = [JobPaths(shard) for shard in whole.shards]
    read = shards if shards and not whole.rows.exists() else [whole]
    settings = next((paths for paths in (whole, *shards) if paths.hydra.is_dir()), whole)
    config, hydra = read_yaml(settings.config, CONFIG), read_yaml(settings.hydra_config, HYDRA)
    choices = _choices(hydra) or _choices_of_name(folder.name)
    overrides = _overrides(hydra)
    manifest = read_manifest(read[0])
    stored = str(manifest.get("quantization", ""))
    return ReportedJob(
        folder=folder,
        model=_with_adapter(choices["model"], config),
        quant=stored if is_label(stored) else choices["quant"],
        generation=choices["generation"],
        engine=_engine(config) or choices.get("engine", "default"),
        prompt_set=visible(config.get("prompt_set") or folder.resolve().parent.name),
        config=config,
        overrides=overrides,
        stats=_stats(read),
        manifest=manifest,
        scores=read_fitting(whole.scores, SCORES),
        problem=_problem(read[0].log),
        shards=[paths.folder for paths in read if paths is not whole],
        damaged=[place for paths in (whole, *shards) for place in damage(paths.folder)],
    )


def _stats(read: list[JobPaths]) -> dict[str, Any]:
    """Read a job's stats.json, or those of its shards as one."""
    found = [stats for paths in read if (stats := read_stats(paths))]
    if len(read) == 1:
        return found[0] if found else {}
    return combine(found) if found else {}


def precision(job: ReportedJob) -> float:
    """Say how near to exact a job's arithmetic is: the higher, the nearer."""
    if is_label(job.quant):
        return label_bits(job.quant)
    return quants.precision(quants.read_quant(job.config.get("quant"), job.quant))


def _choices(hydra: dict[str, Any]) -> dict[str, str] | None:
    chosen = ((hydra.get("hydra") or {}).get("runtime") or {}).get("choices") or {}
    if not {"model", "quant", "generation"} <= chosen.keys():
        return None
    named = [override.partition("=")[2] for override in _overrides(hydra) if "model.name=" in override]
    return {**{k: str(v) for k, v in chosen.items()}, **({"model": Path(named[-1]).name} if named else {})}


def _engine(config: dict[str, Any]) -> str | None:
    """Name the engine that a job's config chose; None where it says nothing."""
    settings = config.get("engine")
    name = settings.get("name") if isinstance(settings, dict) else None
    return None if name is None else visible(str(name))


def _with_adapter(model: str, config: dict[str, Any]) -> str:
    """Name a model with its adapter, as the job's folder does."""
    settings = config.get("model")
    adapter = settings.get("adapter") if isinstance(settings, dict) else None
    ending = f"+{Path(str(adapter)).name}"
    return model + ending if adapter and not model.endswith(ending) else model


def _overrides(hydra: dict[str, Any]) -> list[str]:
    task = ((hydra.get("hydra") or {}).get("overrides") or {}).get("task") or []
    return [hide_environment(word) for word in task]


def _choices_of_name(name: str) -> dict[str, str]:
    """Take <model>-<quant>-<generation>[+<engine>]-<fingerprint> apart; a model's name may hold hyphens."""
    parts = name.rsplit("-", 3)
    if len(parts) != 4:
        return {"model": name, "quant": "?", "generation": "?"}
    model, quant, how, _ = parts
    generation, _, engine = how.partition("+")
    return {"model": model, "quant": quant, "generation": generation, "engine": engine or "default"}


def _label(jobs: list[ReportedJob]) -> None:
    """Call each job by the fields in which the jobs differ; its seed or fingerprint where these are not enough."""
    fields = ("model", "quant", "generation", "engine", "prompt_set")
    differ = [f for f in fields if len({getattr(job, f) for job in jobs}) > 1] or ["quant"]
    for job in jobs:
        job.label = visible(" · ".join(getattr(job, f) for f in differ))
    labels = [job.label for job in jobs]
    for shared in {label for label in labels if labels.count(label) > 1}:
        alike = [job for job in jobs if job.label == shared]
        seeds = [(job.config.get("generation") or {}).get("seed") for job in alike]
        by_seed = len(set(map(str, seeds))) == len(alike)
        for job, seed in zip(alike, seeds, strict=True):
            job.label += visible(f" · seed {seed}" if by_seed else f" · {job.folder.name.rsplit('-', 1)[-1]}")
    if len({job.label for job in jobs}) < len(jobs):
        for number, job in enumerate(jobs, 1):
            job.label += f" · {number}"


def _problem(log: Path) -> str | None:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    found = _PROBLEM.findall(tail)
    return found[-1].strip() if found else None
