"""Say what a tracker gets to know of a job, whichever tracker it is."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from pipeline.job.paths import JobPaths, shard_of
from pipeline.job.stored import CONFIG, read_yaml

# For what is left to tell when a job has ended. A stopped one has little: whoever stops it may not wait.
PATIENCE_SEC = {"done": 60.0, "stopped": 10.0}
LONGEST = 128  # characters of a project's name, as Weights & Biases has it
OF_THIS_MACHINE = ("submit", "hydra")  # says nothing of the job, and may hold what others are not to see


@dataclass(frozen=True, slots=True)
class TrackedJob:
    """Name a job as trackers do, with its config as flat keys."""

    paths: JobPaths
    experiment: str  # what its runs are compared in: the prompt set
    name: str
    config: dict[str, Any]

    @classmethod
    def read(cls, paths: JobPaths) -> Self:
        """Read a job's folder; each shard is a run of its own."""
        folder = paths.folder.resolve()
        name = folder.name
        if shard_of(folder):
            folder = folder.parent
            name = f"{folder.name}-{name}"
        config = read_yaml(paths.config, CONFIG)
        told = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
        return cls(paths, re.sub(r"[^\w.-]", "_", folder.parent.name)[:LONGEST], name, flat(told))


class Run(Protocol):
    """A tracker's run, in the words that all of them have."""

    id: str

    def log(self, values: dict[str, float]) -> None:
        """Add numbers as they are now."""

    def keep(self, paths: Iterable[Path]) -> None:
        """Keep these files and folders, where they are there."""

    def end(self, outcome: str) -> None:
        """End it as done, stopped or died."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested mappings as one, with dotted keys; what is null or empty is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value not in (None, []):
            found[f"{prefix}{key}"] = value
    return found


def numbers(stats: dict[str, Any]) -> dict[str, float]:
    """Take the numbers of stats.json, under dotted keys."""
    return {
        re.sub(r"[^\w./ -]", "_", key): value
        for key, value in flat(stats).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
