"""Run a sweep on this machine: every cell is a job in a process of its own, one after the other."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.common import terminal
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.common.signals import Interrupt
from pipeline.common.streams import is_stream
from pipeline.common.units import megabytes
from pipeline.config.compose import compose_config, job_folder, read_config, sweep_cells, to_config
from pipeline.job.counts import read_counts
from pipeline.job.paths import JobPaths, read_json

KILLED: dict[int, str] = {
    signal.SIGKILL: "killed (SIGKILL): out of memory?",
    signal.SIGSEGV: "crashed (SIGSEGV)",
}


def run_sweep(overrides: list[str]) -> ExitStatus:
    """Run all cells; one that fails does not stop the others.

    Returns:
        That of the first cell which is not done; FAILED for one that a signal killed.

    Raises:
        ConfigError: a cell's configuration is wrong; then none is started.
    """
    cells = sweep_cells(overrides)
    for cell in cells:
        if is_stream(prompts := to_config(compose_config(cell)).prompts):
            raise ConfigError(
                found=f"prompts={prompts}: can be read once only", fix="Write it to a file for a sweep."
            )
    statuses: list[int] = []
    with Interrupt() as interrupt:
        interrupt.hold()
        for number, cell in enumerate(cells, 1):
            terminal.say(f"\n[{number}/{len(cells)}] {' '.join(cell)}", style="bold")
            statuses.append(_run_cell(cell, interrupt))
            if interrupt.signal or statuses[-1] == ExitStatus.RUN_AGAIN:
                break
    rows = [_line(cell, status) for cell, status in zip(cells, statuses, strict=False)]
    columns = ("job", "state", "rows", "errors", "tokens/s", "load", "weights", "peak")
    terminal.table("\nAll cells", columns, rows)
    _report([job_folder(cell) for cell in cells[: len(statuses)]], write=read_config(cells[0]).report)
    worst = next((status for status in statuses if status), ExitStatus.DONE)
    return ExitStatus(worst) if worst in set(ExitStatus) else ExitStatus.FAILED


def _run_cell(cell: list[str], interrupt: Interrupt) -> int:
    """Run a job in its own process; return its exit status, negative for the signal that killed it.

    It has its own process group too: a terminal's ^C reaches this process alone, which hands it on once.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", "pipeline", *cell]
    with subprocess.Popen(command, process_group=0) as process:
        interrupt.hold(process.send_signal)
        return process.wait()


def _report(folders: list[Path], write: bool) -> None:
    """Name the command that reports on these jobs, or run it with report=true."""
    parents = list(dict.fromkeys(str(folder.parent) for folder in folders))
    command = ["python", "-m", "pipeline", "report", *parents]
    if write:
        subprocess.run([sys.executable, *command[1:]], check=False)
    else:
        terminal.say(f"See them side by side: {shlex.join(command)}")


def _line(cell: list[str], status: int) -> tuple[Any, ...]:
    """Make a cell's line in the table at the end, from its own result files."""
    folder = job_folder(cell)
    stats: dict[str, Any] = read_json(JobPaths(folder).stats) or {}
    counts, memory, state = read_counts(folder), stats.get("memory", {}), _meaning(status)
    if not stats:
        return (folder.name, state, counts.shown, *["-"] * 5)
    return (
        folder.name,
        state,
        counts.shown,
        counts.errors,
        f"{stats['tokens_per_sec']:,.1f}",
        f"{stats['load_sec']:.1f} s",
        megabytes(memory["footprint_bytes"]),
        megabytes(memory["run_peak"]["host_bytes"]),
    )


def _meaning(status: int) -> str:
    """Say what an exit status means; a negative one is the signal that killed the process."""
    if status < 0:
        return KILLED.get(-status, f"killed by signal {-status}")
    return ExitStatus.meaning_of(status) or f"exit status {status}"
