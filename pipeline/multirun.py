"""A sweep on this machine: every cell is a job in a process of its own, one after the other."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import display
from pipeline.compose import compose_config, job_folder, read_config, sweep_cells
from pipeline.results import STATS, read_json

MEANINGS = {0: "done", 1: "some rows failed", 2: "bad configuration", 3: "failed", 75: "stopped"}


def run_sweep(overrides: list[str]) -> int:
    """Run all cells; one that fails does not stop the others.

    Returns:
        The exit status: 0 if every cell's is, else the first cell's that is not.

    Raises:
        ConfigError: a cell's configuration is wrong; then none is started.
    """
    cells = sweep_cells(overrides)
    for cell in cells:
        compose_config(cell)
    statuses: list[int] = []
    for number, cell in enumerate(cells, 1):
        display.say(f"\n[{number}/{len(cells)}] {' '.join(cell)}", style="bold")
        status = subprocess.run([sys.executable, "-m", "pipeline", *cell], check=False).returncode
        statuses.append(status)
        if status in (130, -2, 75):
            break
    rows = [_line(cell, status) for cell, status in zip(cells, statuses, strict=False)]
    columns = ("job", "state", "rows", "errors", "tokens/s", "load", "weights", "peak")
    display.table("\nAll cells", columns, rows)
    _report([job_folder(cell) for cell in cells[: len(statuses)]], write=read_config(cells[0]).report)
    return next((status for status in statuses if status), 0)


def _report(folders: list[Path], write: bool) -> None:
    """Name the command that reports on these jobs, or run it with report=true."""
    parents = list(dict.fromkeys(str(folder.parent) for folder in folders))
    command = ["python", "-m", "pipeline.report", *parents]
    if write:
        subprocess.run([sys.executable, *command[1:]], check=False)
    else:
        display.say(f"See them side by side: {shlex.join(command)}")


def _line(cell: list[str], status: int) -> tuple[Any, ...]:
    """A cell's line in the table at the end, from its own result files."""
    folder = job_folder(cell)
    stats: dict[str, Any] = read_json(folder / STATS) or {}
    state = MEANINGS.get(status, f"killed by signal {-status}" if status < 0 else f"exit status {status}")
    rows, memory = stats.get("rows", {}), stats.get("memory", {})
    if not rows:
        return (folder.name, state, *["-"] * 6)
    return (
        folder.name,
        state,
        f"{rows['done']}/{rows['total']}",
        rows["errors"],
        f"{stats['tokens_per_sec']:,.1f}",
        f"{stats['load_sec']:.1f} s",
        display.megabytes(memory["footprint_bytes"]),
        display.megabytes(memory["run_peak"]["host_bytes"]),
    )
