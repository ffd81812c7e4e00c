"""Run a sweep on this machine: every cell is a job in a process of its own, one after the other."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from pipeline.common import terminal
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus, ended
from pipeline.common.signals import Interrupt
from pipeline.common.streams import is_stream
from pipeline.common.units import gigabytes
from pipeline.config.compose import compose_config, job_folder, read_config, sweep_cells, to_config
from pipeline.job.counts import read_counts
from pipeline.job.paths import JobPaths
from pipeline.job.stored import read_stats


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
    terminal.say("\nAll cells", style="bold")
    lines = [line for cell, status in zip(cells, statuses, strict=False) for line in _lines(cell, status)]
    columns = ("rows", "errors", "tokens/s", "load", "weights", "peak", "job")
    terminal.console.print(terminal.aligned(columns, lines), soft_wrap=True)
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


def _lines(cell: list[str], status: int) -> list[tuple[Any, ...] | Text]:
    """Make a cell's lines in the table at the end, from its own result files: figures, and how it ended."""
    folder = job_folder(cell)
    stats, counts = read_stats(JobPaths(folder)), read_counts(folder)
    memory, speed, load_sec = stats.get("memory") or {}, stats.get("tokens_per_sec"), stats.get("load_sec")
    figures = (
        counts.shown,
        counts.errors,
        "-" if speed is None else f"{speed:,.1f}",
        "-" if load_sec is None else f"{load_sec:.1f} s",
        gigabytes(memory.get("footprint_bytes")),
        gigabytes((memory.get("run_peak") or {}).get("host_bytes")),
        folder.name,
    )
    return [figures, Text(f"    {terminal.visible(ended(status))}", style="" if status == 0 else "yellow")]
