"""What a person wants to know of a cell: done, queued, running where, failed why; how fast, how long still.

The cell's own files come first. squeue says whether it is in hand, sacct how a task ended that could not
say so itself.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.common.errors import JobError
from pipeline.common.terminal import say
from pipeline.job.counts import EVENTS, Events, Standing, read_events, read_standing, tokens_per_row
from pipeline.job.folder import MANIFEST, ROWS, STATS, TODO
from pipeline.slurm.client import EndedTask, QueuedTask, ended, queued

# A folder with one of these is a job's; the log is there from a job's first moment.
MARKS = (EVENTS, ROWS, STATS, MANIFEST, TODO, "pipeline.log")
TAIL_BYTES = 16384
STATUSES = {1: "some rows failed", 2: "bad configuration", 3: "failed", 75: "stopped by a signal"}


@dataclass(frozen=True, slots=True)
class CellState:
    """One line of the table."""

    folder: Path
    standing: Standing
    kind: str  # complete, running, queued, failed, cancelled, stopped, unknown
    text: str  # the kind in full: where, why, how often
    tokens_per_sec: float | None
    left_sec: float | None  # for a running cell


def find_folders(top: Path) -> list[Path]:
    """Every job's folder at or under `top`, sorted as people count: shard-2 before shard-10."""
    found = []
    for path, folders, files in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith((".", "run-"))]
        if any(mark in files for mark in MARKS):
            found.append(Path(path))
    return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", str(p))])


def cell_states(folders: Iterable[Path]) -> Iterator[CellState]:
    """The state of each folder; from the files alone where Slurm is not there or does not answer."""
    events = {folder: read_events(folder) for folder in folders}
    # Asked before the files are read: what ends in between is then complete by its files.
    queue = _in_the_queue() if any(e.job for e in events.values()) else {}
    tasks = queue or {}
    standings = {folder: read_standing(folder) for folder in events}
    # Asked how tasks ended that could not say so themselves, and why others came back.
    unclear = [
        e.job
        for folder, e in events.items()
        if e.job and (len(e.started) > 1 or (e.job not in tasks and not standings[folder].complete))
    ]
    records = ended(unclear)
    for folder, event in events.items():
        standing = standings[folder]
        task, record = tasks.get(event.job or ""), records.get(event.job or "")
        if queue is None and event.job and not standing.complete:
            kind, text = _last_seen(event)
        else:
            kind, text = _state(folder, standing, event, task, record)
        speed, left = (
            _speed(folder, standing, event) if kind == "running" else (standing.tokens_per_sec, None)
        )
        yield CellState(folder, standing, kind, text + _resumed(event, record), speed, left)


def _in_the_queue() -> dict[str, QueuedTask] | None:
    """None where Slurm cannot be asked."""
    try:
        return queued()
    except JobError as error:
        say(f"Warning: what waits or runs is not known. {error}", style="yellow")
        return None


def _last_seen(events: Events) -> tuple[str, str]:
    """For a cell that Slurm would know more of."""
    if events.ended is not None:
        return _by_status(events.ended["status"], events)
    if events.started:
        return "unknown", f"last seen running on {events.started[-1]['node']}"
    return "unknown", "submitted"


def _state(
    folder: Path, standing: Standing, events: Events, task: QueuedTask | None, record: EndedTask | None
) -> tuple[str, str]:
    """Kind and text."""
    if task is not None and task.state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        word = {"RUNNING": "running", "COMPLETING": "ending"}.get(task.state, task.state.lower())
        return (
            ("running", f"{word} on {task.where}")
            if not standing.complete
            else ("complete", _complete(standing))
        )
    if standing.complete and _holder(folder) is None:
        return "complete", _complete(standing)
    if task is not None:
        return "queued", f"queued ({task.where})"
    if record is not None and record.state not in ("PENDING", "RUNNING"):  # the accounting lags
        return _how_it_ended(record, events)
    if holder := _holder(folder):
        return "running", f"running ({holder})"
    if events.started and events.ended is None:
        return "failed", f"ended without a word on {events.started[-1]['node']}"
    if events.ended is not None:
        return _by_status(events.ended["status"], events)
    return "stopped", "submitted, and gone from the queue" if events.job else "stopped"


def _complete(standing: Standing) -> str:
    failed = f", {standing.errors} failed rows" if standing.errors else ""
    since = standing.todo is not None and standing.todo.prompts_written_since
    return f"complete{failed}" + ("; the prompt file was written since" if since else "")


def _how_it_ended(record: EndedTask, events: Events) -> tuple[str, str]:
    if record.state == "CANCELLED":
        return "cancelled", "cancelled" if events.started else "cancelled before it started"
    if record.state in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED"):
        return "failed", record.state.lower().replace("_", " ") + _last_words(events)
    if events.ended is not None and events.ended["status"]:
        return _by_status(events.ended["status"], events)
    if record.signal:
        return _by_status(128 + record.signal, events)
    if record.state == "COMPLETED":
        return "stopped", "ended, with rows missing"
    if record.state == "FAILED":
        return _by_status(record.exit_status, events)
    return "stopped", record.state.lower()


def _by_status(status: int, events: Events) -> tuple[str, str]:
    if status > 128:
        hint = " (out of memory?)" if status == 137 else ""
        return "failed", f"killed by signal {status - 128}{hint}"
    text = STATUSES.get(status, f"failed with status {status}")
    return ("stopped" if status == 75 else "failed"), text + (_last_words(events) if status != 75 else "")


def _last_words(events: Events) -> str:
    """The error that ends the task's log."""
    try:
        with Path(events.submitted[-1]["log"]).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except (OSError, LookupError):
        return ""
    for i in reversed(range(len(lines))):
        if re.match(r"Error: |[\w.]+(Error|Exception)\b|.*: (command )?not found|.*No such file", lines[i]):
            message = [lines[i].removeprefix("Error: ")]
            for line in lines[i + 1 : i + 8]:  # as wrapped for the log
                if line.startswith("slurmstepd"):
                    break
                message.append(line)
            return ": " + " ".join(" ".join(message).split())
    return ""


def _resumed(events: Events, record: EndedTask | None) -> str:
    """How often the last submission came back, and why where the accounting knows."""
    times = len(events.started) - 1
    if times < 1:
        return ""
    reasons = (
        Counter(state.lower().replace("_", " ") for state in record.earlier) if record else Counter[str]()
    )
    why = ", ".join(f"{reason} {n}×" for reason, n in reasons.items())
    return f"; resumed {times}×" + (f" ({why})" if why else "")


def _speed(folder: Path, standing: Standing, events: Events) -> tuple[float | None, float | None]:
    """Tokens per second and seconds left, from the rows written since the last start; loading counts too."""
    if not events.started or standing.total is None:
        return None, None
    start: dict[str, Any] = events.started[-1]
    rows, elapsed = standing.done - start["rows"], time.time() - start["time"]
    if rows <= 0 or elapsed <= 0:
        return None, None
    per_row = tokens_per_row(folder)
    left = (standing.total - standing.done) * elapsed / rows
    return (per_row * rows / elapsed if per_row is not None else None), left


def _holder(folder: Path) -> str | None:
    """Name the process of this machine that holds the folder, if it lives."""
    try:
        text = (folder / ".holder").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.match(r"process (\d+) on (\S+)", text)
    if not found or found[2] != os.uname().nodename:
        return None
    try:
        command = psutil.Process(int(found[1])).cmdline()
    except psutil.Error:
        return None
    return text.strip() if "pipeline" in command else None
