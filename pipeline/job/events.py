"""Note what Slurm did with a job's folder, a line each time it was submitted, started or ended: slurm.jsonl.

The batch script writes lines of its own (pipeline/slurm/script.py).
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines

from pipeline.job.paths import JobPaths
from pipeline.job.stored import is_kind

NEEDED: dict[str, dict[str, Any]] = {  # of each event, what is read
    "submitted": {"job": str, "log": str, "total": int},
    "started": {"node": str, "rows": int, "time": int | float},
    "ended": {"status": int},
}


@dataclass(frozen=True, slots=True)
class Events:
    """Hold what slurm.jsonl tells of a job, the last submission first in mind."""

    submitted: list[dict[str, Any]] = field(default_factory=list)
    started: list[dict[str, Any]] = field(default_factory=list)  # of the last submission
    ended: dict[str, Any] | None = None  # of the last start

    @property
    def task(self) -> str | None:
        """Name the last submission's task, as 12_3."""
        return str(self.submitted[-1]["job"]) if self.submitted else None


def read_events(folder: Path) -> Events:
    """Read the events of a job; a damaged line is left out."""
    events = Events()
    for event in _lines(JobPaths(folder).events):
        match event.get("event"):
            case "submitted":
                events = Events([*events.submitted, event])
            case "started":
                events = Events(events.submitted, [*events.started, event])
            case "ended":
                events = Events(events.submitted, events.started, event)
    return events


def append_event(folder: Path, event: str, **more: Any) -> None:
    """Add one line to the folder's events."""
    folder.mkdir(parents=True, exist_ok=True)
    with jsonlines.open(JobPaths(folder).events, "a") as writer:
        writer.write({"event": event, "time": round(time.time(), 3), **more})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file that several processes append to; what is damaged is skipped."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                kinds = NEEDED.get(str(event.get("event"))) if isinstance(event, dict) else None
                if kinds is not None and all(is_kind(event.get(name), kind) for name, kind in kinds.items()):
                    yield event
