"""Where a job's folder stands, by its own files: rows, errors, speed, and what happened to it on Slurm.

Slurm's view is never needed for this, and never believed over it.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonlines

from pipeline.job.folder import ROWS, STATS, TODO, read_json
from pipeline.job.todo import Todo

EVENTS = "slurm.jsonl"  # one line for each time a cell was submitted, started or ended
COUNTED_BYTES = 64 * 1024**2  # larger files are not counted but estimated, from a piece of each end
PIECE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Standing:
    """Counts are of completions: a row with n samples counts n times."""

    done: int
    errors: int
    total: int | None  # None: nobody has counted yet
    exact: bool  # else `done` and `errors` are estimates
    run_sec: float | None  # of the last run that ended by itself
    tokens_per_sec: float | None
    todo: Todo | None  # the job's own note; None where there is none that still holds

    @property
    def complete(self) -> bool:
        return self.exact and self.todo is not None and self.done >= self.todo.total


@dataclass(frozen=True, slots=True)
class Events:
    """What slurm.jsonl tells of a cell, the last submission first in mind."""

    submitted: list[dict[str, Any]] = field(default_factory=list)
    started: list[dict[str, Any]] = field(default_factory=list)  # of the last submission
    ended: dict[str, Any] | None = None  # of the last start

    @property
    def job(self) -> str | None:
        """The last submission's job, as 12_3."""
        return str(self.submitted[-1]["job"]) if self.submitted else None


def read_standing(folder: Path) -> Standing:
    """Take what todo.json says, and count the lines written since: each is a completion that was missing."""
    rows, stats, todo = folder / ROWS, read_json(folder / STATS) or {}, Todo.read(folder)
    size = rows.stat().st_size if rows.exists() else 0
    # A file that is shorter than it was is not what was surveyed: no more than its lines can be told.
    whole = todo is not None and todo.rows_bytes <= size
    start, done, errors = (todo.rows_bytes, todo.done, todo.errors) if todo and whole else (0, 0, 0)
    exact = size - start <= COUNTED_BYTES
    if size > start:
        more = _count(rows, start) if exact else _estimate(rows, start)
        done, errors = done + more[0], errors + more[1]
    submitted, total = read_events(folder).submitted, todo.total if todo else None
    if submitted and _is_news(submitted[-1], todo, folder):
        total, whole = int(submitted[-1]["total"]), False
    speed = stats.get("run_sec"), stats.get("tokens_per_sec")
    return Standing(done, errors, total, exact, *speed, todo if whole else None)


def read_events(folder: Path) -> Events:
    """The events of a cell; a damaged line is left out."""
    events = Events()
    for event in _json_lines(folder / EVENTS):
        if event.get("event") == "submitted":
            events = Events([*events.submitted, event])
        elif event.get("event") == "started":
            events = Events(events.submitted, [*events.started, event])
        elif event.get("event") == "ended":
            events = Events(events.submitted, events.started, event)
    return events


def append_event(folder: Path, event: str, **more: Any) -> None:
    """Add one line to the folder's events."""
    folder.mkdir(parents=True, exist_ok=True)
    with jsonlines.open(folder / EVENTS, "a") as writer:
        writer.write({"event": event, "time": round(time.time(), 3), **more})


def tokens_per_row(folder: Path) -> float | None:
    """The mean completion tokens of the rows written last."""
    try:
        with (folder / ROWS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - PIECE_BYTES))
            counts = [int(n) for n in re.findall(rb'"completion_tokens":(\d+)', file.read())]
    except OSError:
        return None
    return sum(counts) / len(counts) if counts else None


def _is_news(submission: dict[str, Any], todo: Todo | None, folder: Path) -> bool:
    """Say whether a submission asks for rows that the folder's note does not know of, and came after it."""
    if todo is None:
        return True
    known = submission.get("prompts_sha256", "") == todo.prompts_sha256 and todo.covers(
        submission.get("limit")
    )
    return not known and float(submission["time"]) > _modified(folder / TODO)


def _count(rows: Path, start: int) -> tuple[int, int]:
    done = errors = 0
    with rows.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if line.endswith(b"\n"):
                done += 1
                # Only a line without a completion can be an error's, and only those are worth parsing.
                errors += b'"completion":null' in line and _is_error(line)
    return done, errors


def _is_error(line: bytes) -> bool:
    try:
        return bool(json.loads(line)["error"])
    except (ValueError, KeyError, TypeError):
        return False


def _estimate(rows: Path, start: int) -> tuple[int, int]:
    """From the lines in a piece of each end."""
    with rows.open("rb") as file:
        size = file.seek(0, 2) - start
        file.seek(start)
        piece = file.read(PIECE_BYTES)
        file.seek(start + size - PIECE_BYTES)
        piece = piece[: piece.rfind(b"\n") + 1] + file.read(PIECE_BYTES).partition(b"\n")[2]
    lines = piece.splitlines(keepends=True)
    scale = size / len(piece)
    return round(len(lines) * scale), round(sum(map(_is_error, lines)) * scale)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file that several processes append to; what is damaged is skipped."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        yield from jsonlines.Reader(file).iter(type=dict, skip_invalid=True)
