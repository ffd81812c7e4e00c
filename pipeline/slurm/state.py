"""Say what a person wants to know of a job: done, queued, running where, failed why; how fast, how long still.

The job's own files come first. squeue says whether it is in hand, sacct how a task ended that could not
say so itself.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import JobError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.terminal import say
from pipeline.job.counts import Counts, read_counts, tokens_per_row
from pipeline.job.events import Events, read_events
from pipeline.job.holder import Holder
from pipeline.job.paths import JobPaths, is_aside
from pipeline.slurm.client import EndedTask, QueuedTask, ended, queued
from pipeline.slurm.script import KILLED_BY

TAIL_BYTES = 16384
OUT_OF_MEMORY = KILLED_BY + 9  # SIGKILL is how the kernel ends what takes too much


@dataclass(frozen=True, slots=True)
class JobState:
    """Hold one line of the table."""

    folder: Path
    counts: Counts
    kind: str  # complete, running, queued, failed, cancelled, stopped, unknown
    text: str  # the kind in full: where, why, how often
    tokens_per_sec: float | None
    left_sec: float | None  # for a running job


def find_folders(top: Path) -> list[Path]:
    """Find every job's folder at or under `top`, sorted as people count: shard-2 before shard-10."""
    found = []
    for path, folders, _ in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith(".") and not is_aside(name)]
        if JobPaths(Path(path)).is_job:
            found.append(Path(path))
    return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", str(p))])


def state_of(folder: Path) -> JobState:
    """Find the state of one job."""
    (state,) = states_of([folder])
    return state


def states_of(folders: Iterable[Path]) -> Iterator[JobState]:
    """Find the state of each job; from the files alone where Slurm is not there or does not answer."""
    events = {folder: read_events(folder) for folder in folders}
    # Asked before the files are read: what ends in between is then complete by its files.
    queue = _in_the_queue() if any(e.task for e in events.values()) else {}
    tasks = queue or {}
    counted = {folder: read_counts(folder) for folder in events}
    # Asked how tasks ended that could not say so themselves, and why others came back.
    unclear = [
        e.task
        for folder, e in events.items()
        if e.task and (len(e.started) > 1 or (e.task not in tasks and not counted[folder].complete))
    ]
    records = ended(unclear)
    for folder, event in events.items():
        counts = counted[folder]
        task, record = tasks.get(event.task or ""), records.get(event.task or "")
        if queue is None and event.task and not counts.complete:
            kind, text = _last_seen(event)
        else:
            kind, text = _kind(folder, counts, event, task, record)
        speed, left = _speed(folder, counts, event) if kind == "running" else (counts.tokens_per_sec, None)
        yield JobState(folder, counts, kind, text + _resumed(event, record), speed, left)


def _in_the_queue() -> dict[str, QueuedTask] | None:
    """Ask what waits or runs; None where Slurm cannot be asked."""
    try:
        return queued()
    except JobError as error:
        say(f"Warning: what waits or runs is not known. {error}", style="yellow")
        return None


def _last_seen(events: Events) -> tuple[str, str]:
    """Find kind and text of a job that Slurm would know more of."""
    if events.ended is not None:
        return _by_status(events.ended["status"], events)
    if events.started:
        return "unknown", f"last seen running on {events.started[-1]['node']}"
    return "unknown", "submitted"


def _kind(
    folder: Path, counts: Counts, events: Events, task: QueuedTask | None, record: EndedTask | None
) -> tuple[str, str]:
    """Find kind and text."""
    holder = _holder(folder)
    if task is not None and task.state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        if counts.complete:
            return "complete", _complete(counts)
        word = {"RUNNING": "running", "COMPLETING": "ending"}.get(task.state, task.state.lower())
        return "running", f"{word} on {task.where}"
    if counts.complete and holder is None:
        return "complete", _complete(counts)
    if task is not None:
        return "queued", f"queued ({task.where})"
    if record is not None and record.state not in ("PENDING", "RUNNING"):  # the accounting lags
        return _how_it_ended(record, events)
    if holder is not None:
        return "running", f"running ({holder})"
    if events.started and events.ended is None:
        return "failed", f"ended without a word on {events.started[-1]['node']}"
    if events.ended is not None:
        return _by_status(events.ended["status"], events)
    return "stopped", "submitted, and gone from the queue" if events.task else "stopped"


def _holder(folder: Path) -> Holder | None:
    """Name the process of this machine that holds the folder."""
    holder = Holder.read(JobPaths(folder).holder)
    return holder if holder is not None and holder.lives_here else None


def _complete(counts: Counts) -> str:
    failed = f", {counts.errors} failed rows" if counts.errors else ""
    since = counts.todo is not None and counts.todo.prompts_written_since
    return f"complete{failed}" + ("; the prompt file was written since" if since else "")


def _how_it_ended(record: EndedTask, events: Events) -> tuple[str, str]:
    if record.state == "CANCELLED":
        return "cancelled", "cancelled" if events.started else "cancelled before it started"
    if record.state in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED"):
        return "failed", _words(record.state) + _after_colon(_last_words(events))
    if events.ended is not None and events.ended["status"]:
        return _by_status(events.ended["status"], events)
    if record.signal:
        return _by_status(KILLED_BY + record.signal, events)
    if record.state == "COMPLETED":
        return "stopped", "ended, with rows missing"
    if record.state == "FAILED":
        return _by_status(record.exit_status, events)
    return "stopped", record.state.lower()


def _by_status(status: int, events: Events) -> tuple[str, str]:
    """Find kind and text by the status that the job ended with."""
    if status == ExitStatus.RUN_AGAIN:
        return "stopped", ExitStatus.RUN_AGAIN.meaning
    if status > KILLED_BY:
        hint = " (out of memory?)" if status == OUT_OF_MEMORY else ""
        return "failed", f"killed by signal {status - KILLED_BY}{hint}"
    said = _last_words(events)
    meaning = ExitStatus.meaning_of(status)
    if meaning is None:
        return "failed", f"failed with status {status}" + _after_colon(said)
    return "failed", f"failed: {said}" if said else meaning


def _last_words(events: Events) -> str:
    """Read the error that ends the task's log; nothing where there is none."""
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
            return " ".join(" ".join(message).split())
    return ""


def _after_colon(said: str) -> str:
    return f": {said}" if said else ""


def _words(state: str) -> str:
    """Write Slurm's OUT_OF_MEMORY as out of memory."""
    return state.lower().replace("_", " ")


def _resumed(events: Events, record: EndedTask | None) -> str:
    """Say how often the last submission came back, and why where the accounting knows."""
    times = len(events.started) - 1
    if times < 1:
        return ""
    reasons = Counter(map(_words, record.earlier)) if record else Counter[str]()
    why = ", ".join(f"{reason} {n}×" for reason, n in reasons.items())
    return f"; resumed {times}×" + (f" ({why})" if why else "")


def _speed(folder: Path, counts: Counts, events: Events) -> tuple[float | None, float | None]:
    """Measure tokens per second and seconds left, by the rows since the last start; loading counts too."""
    holder = _holder(folder)
    if counts.total is None:
        return None, None
    if holder is not None and counts.todo is not None:  # which it wrote when it had started
        rows, elapsed = counts.done - counts.todo.done, holder.age_sec
    elif events.started:
        rows, elapsed = counts.done - events.started[-1]["rows"], time.time() - events.started[-1]["time"]
    else:
        return None, None
    if rows <= 0 or elapsed <= 0:
        return None, None
    per_row = tokens_per_row(folder)
    left = (counts.total - counts.done) * elapsed / rows
    return (per_row * rows / elapsed if per_row is not None else None), left
