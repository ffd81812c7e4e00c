"""One run of one contender in its own process: its times, its peak memory and its texts.

This module and run.py import nothing large: a child's ru_maxrss starts at its parent's memory.
"""

import ctypes
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


@dataclass
class Run:
    """What one run gave; seconds, bytes and tokens."""

    load_sec: float
    generate_sec: float
    total_sec: float  # from the command to the last line of output
    peak_rss_bytes: int  # of the largest process among the command and its children
    completion_tokens: int
    texts: dict[str, str]  # by row id
    version: str

    @property
    def tokens_per_sec(self) -> float:
        return self.completion_tokens / self.generate_sec


def wait_until_idle(limit_sec: float, busy_percent: float = 10.0) -> bool:
    """Wait for three quiet samples of two seconds, and say for whom; False when it never became quiet."""
    import psutil

    end, quiet, said = time.monotonic() + limit_sec, 0, False
    while quiet < 3 and time.monotonic() < end:
        processes = list(psutil.process_iter(["name"]))
        for process in processes:
            busy_of(process)  # measures from here on
        percent = psutil.cpu_percent(interval=2)
        quiet = quiet + 1 if percent < busy_percent else 0
        if not quiet and not said:
            said = True
            most = max(processes, key=busy_of)
            print(
                f"waiting up to {limit_sec:.0f} s for a quiet machine: {percent:.0f} % busy, most of it by "
                f"{most.info['name']} (process {most.pid})",
                flush=True,
            )
    return quiet == 3


def busy_of(process: Any) -> float:
    """The percent of a core that a process took since it was last asked."""
    import psutil

    try:
        return float(process.cpu_percent())
    except psutil.Error:
        return 0.0


def spawn(command: list[str], env: dict[str, str], log: Path, timeout_sec: float) -> tuple[float, int]:
    """Run a command in the repository's root to its end, its output in `log`.

    Returns:
        When it started (seconds since the epoch), and its peak resident set in bytes.

    Raises:
        RuntimeError: it failed or ran too long; the message names the log.
    """
    root = Path(__file__).resolve().parent.parent
    with log.open("wb") as sink:
        started = time.time()
        child = subprocess.Popen(
            command, cwd=root, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_die_with_the_parent,
        )  # fmt: skip
        try:
            status, usage = _wait(child.pid, timeout_sec)
        except BaseException as error:  # the harness is ended too
            os.killpg(child.pid, signal.SIGKILL)
            os.wait4(child.pid, 0)
            child.returncode = -signal.SIGKILL
            if isinstance(error, TimeoutError):
                raise RuntimeError(f"stopped after {timeout_sec:.0f} s; see {log}") from None
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RuntimeError(f"ended with status {child.returncode}; see {log}")
    return started, usage.ru_maxrss * 1024


def _wait(pid: int, timeout_sec: float) -> tuple[int, Any]:
    """Wait for a child; return its status and what it used.

    Raises:
        TimeoutError: it ran too long.
    """
    end = time.monotonic() + timeout_sec
    while time.monotonic() < end:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage
        time.sleep(0.1)
    raise TimeoutError


def _die_with_the_parent() -> None:
    """Ask Linux to end this child when the harness is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def measure_peer(command: list[str], env: dict[str, str], out: Path, log: Path, timeout_sec: float) -> Run:
    """A peer's script: rows in `out`, times in the last line of its output."""
    started, peak = spawn(command, env, log, timeout_sec)
    times = json.loads(log.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1])
    rows = read_jsonl(out)
    return Run(
        load_sec=times["load_sec"],
        generate_sec=times["generate_sec"],
        total_sec=out.stat().st_mtime - started,
        peak_rss_bytes=peak,
        completion_tokens=sum(row["completion_tokens"] for row in rows),
        texts={str(row["id"]): row["text"] for row in rows},
        version=times["version"],
    )


def measure_job(command: list[str], env: dict[str, str], out: Path, log: Path, timeout_sec: float) -> Run:
    """Our own job: one job folder below `out`."""
    started, peak = spawn(command, env, log, timeout_sec)
    [path] = out.glob("**/outputs.jsonl")
    rows = read_jsonl(path)
    stats = json.loads((path.parent / "stats.json").read_text(encoding="utf-8"))
    return Run(
        load_sec=stats["load_sec"],
        generate_sec=stats["run_sec"],
        total_sec=path.stat().st_mtime - started,
        peak_rss_bytes=peak,
        completion_tokens=sum(row["usage"]["completion_tokens"] for row in rows if not row["error"]),
        texts={str(row["id"]): row["completion"] for row in rows if not row["error"]},
        version="this checkout",
    )


def agreement(texts: dict[str, str], reference: dict[str, str]) -> float:
    """The share of the reference's rows whose text is the same, character for character."""
    return sum(texts.get(id) == text for id, text in reference.items()) / len(reference)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
