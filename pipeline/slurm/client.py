"""Call Slurm's commands: submit an array, and ask what became of its tasks. A task's name is 12_3 throughout."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import JobError

PATIENCE_SEC = 60
DEFAULT_ARRAY_SIZE = 1001


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """Hold a task that squeue lists: it has not ended."""

    state: str  # PENDING, RUNNING, COMPLETING …
    where: str  # its node, or why it waits


@dataclass(frozen=True, slots=True)
class EndedTask:
    """Hold a task's records of sacct, one for each run; the last says how it ended."""

    state: str  # COMPLETED, FAILED, CANCELLED, NODE_FAIL …
    exit_status: int
    signal: int
    earlier: tuple[str, ...]  # states of the runs before: PREEMPTED, REQUEUED, NODE_FAIL …


def max_array_size() -> int:
    """Ask how many tasks one array may have; no array index may reach that number.

    Raises:
        JobError: Slurm is not there, or does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_ARRAY_SIZE


def sbatch(script: Path) -> str:
    """Submit a batch script; return the job's id.

    Raises:
        JobError: Slurm refused it; the message is Slurm's.
    """
    return _call(["sbatch", "--parsable", str(script)]).strip().split(";")[0]


def queued() -> dict[str, QueuedTask]:
    """List this user's tasks that wait or run.

    Raises:
        JobError: Slurm is not there, or does not answer.
    """
    tasks: dict[str, QueuedTask] = {}
    for line in _call(["squeue", "--noheader", "--me", "--array", "--format=%i|%T|%R"]).splitlines():
        name, state, where = line.split("|", 2)
        tasks[name] = QueuedTask(state, where.strip("()"))
    return tasks


def ended(tasks: Iterable[str]) -> dict[str, EndedTask]:
    """Ask the accounting of these tasks; empty where there is none."""
    jobs = sorted({task.partition("_")[0] for task in tasks})
    if not jobs or shutil.which("sacct") is None:
        return {}
    fields = "--format=JobID,State,ExitCode"
    try:
        text = _call(["sacct", "-nPDX", "--starttime=1970-01-01", f"--jobs={','.join(jobs)}", fields])
    except JobError:  # no accounting on this cluster
        return {}
    return read_records(text)


def read_records(text: str) -> dict[str, EndedTask]:
    """Read sacct's lines of job, state and exit code, by task.

    "12_[0-3]" is of tasks that never started, but it may still name those that did: what stands in a task's
    own lines goes before.
    """
    own: dict[str, list[tuple[str, str]]] = {}
    never_started: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        names, state, code = line.split("|")
        for name in expand(names):
            (own if name == names else never_started).setdefault(name, []).append((state, code))
    return {name: _ended(runs) for name, runs in (never_started | own).items()}


def expand(names: str) -> list[str]:
    """Expand "12_[1-3,7%2]" to 12_1, 12_2, 12_3, 12_7: so Slurm writes tasks that never started."""
    ranged = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", names)
    if not ranged:
        return [names]
    found: list[str] = []
    for part in ranged[2].split(","):
        first, _, last = part.partition("-")
        found += [f"{ranged[1]}_{i}" for i in range(int(first), int(last or first) + 1)]
    return found


def _ended(runs: list[tuple[str, str]]) -> EndedTask:
    states = [state.split()[0] for state, _ in runs]  # "CANCELLED by 1000"
    status, _, signal = runs[-1][1].partition(":")
    return EndedTask(states[-1], int(status), int(signal or 0), tuple(states[:-1]))


def _call(command: list[str]) -> str:
    # Inside a job, sbatch would take that job's own settings for options.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_SEC, check=False, env=environment
        )
    except FileNotFoundError:
        raise JobError(
            found=f"{command[0]}: not found",
            fix="Run this where Slurm's commands are, or on this machine alone with python -m pipeline -m …",
        ) from None
    except subprocess.TimeoutExpired:
        raise JobError(
            found=f"{command[0]}: no answer in {PATIENCE_SEC} s",
            fix="Look at Slurm with sdiag, and try again.",
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise JobError(
            found=f"{' '.join(command[:2])}: {said}",
            fix="Look at Slurm with sinfo, or change what it refuses, and try again.",
        )
    return done.stdout
