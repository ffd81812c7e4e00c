"""Name everything in a job's folder, in this one place, and say which folders are jobs'."""

import json
import re
from pathlib import Path
from typing import Any

_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
_SET_ASIDE = re.compile(r"run-(\d+)")


class JobPaths:
    """Name what a job's folder holds; nothing of it needs to be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / "outputs.jsonl"  # a line for each completion
        self.stats = folder / "stats.json"  # what the last run took
        self.manifest = folder / "manifest.json"  # what it ran on
        self.todo = folder / "todo.json"  # what there is to do, and how much of it is done
        self.replaced = folder / "replaced.jsonl"  # lines that no longer hold
        self.prompts = folder / "prompts.jsonl"  # where they came from standard input
        self.scores = folder / "scores.json"
        self.exports = folder / "exports"  # the same answers in other shapes
        self.events = folder / "slurm.jsonl"  # what Slurm did with it
        self.log = folder / "pipeline.log"
        self.tracker = folder / ".tracker"  # a tracker's run, hidden from whoever looks for jobs
        self.tracker_run = self.tracker / "run.json"  # its id there
        self.tracker_log = self.tracker / "process.log"
        self.said = folder / "process.log"  # what a process said that nobody watched
        self.engine_log = folder / "engine.log"  # what vLLM said
        self.hydra = folder / ".hydra"
        self.config = self.hydra / "config.yaml"
        self.hydra_config = self.hydra / "hydra.yaml"
        self.lock = folder / ".lock"
        self.holder = folder / ".holder"

    @property
    def is_job(self) -> bool:
        """Say whether a job has been here: it left a result, a log, or word of its submission."""
        marks = self.rows, self.stats, self.manifest, self.todo, self.events, self.log, self.hydra
        return any(mark.exists() for mark in marks)

    @property
    def shards(self) -> list[Path]:
        """List the folders of its shards, as people count: shard-2 before shard-10."""
        found = [path for path in self.folder.glob("shard-*") if shard_of(path) and path.is_dir()]
        return sorted(found, key=lambda path: shard_of(path) or (0, 0))

    @property
    def split(self) -> int | None:
        """Say into how many shards the job was split; None where it was not."""
        splits = {place[1] for path in self.shards if (place := shard_of(path))}
        return max(splits, default=None)  # where there are several, a merge says so

    def shard(self, part: int, parts: int) -> Path:
        """Name the folder of one shard."""
        return self.folder / f"shard-{part}-of-{parts}"

    @property
    def next_aside(self) -> Path:
        """Name the folder that an earlier run's results are moved to: run-1, run-2 …"""
        taken = [int(match[1]) for path in self.folder.glob("run-*") if (match := is_aside(path.name))]
        return self.folder / f"run-{max(taken, default=0) + 1}"


def shard_of(folder: Path) -> tuple[int, int] | None:
    """Read a shard's folder name: shard-1-of-4 is (1, 4); None is no shard."""
    match = _SHARD.fullmatch(folder.name)
    return (int(match[1]), int(match[2])) if match else None


def is_aside(name: str) -> re.Match[str] | None:
    """Match the name of a folder whose results were set aside."""
    return _SET_ASIDE.fullmatch(name)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
