"""Write the batch script of a submission: an array, each task of which runs one cell."""

import re
import shlex
import signal
import sys
from pathlib import Path

from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.config.schema import SubmitConfig
from pipeline.job.paths import JobPaths
from pipeline.slurm.nodes import start_ray

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
KILLED_BY = 128  # a shell's exit status of a process that a signal killed: this and the signal's number
BODY = r"""
# Each line of cells.txt is a cell: its folder, then its overrides. This task's is number {offset} + its index.
task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
line=$(sed -n "$(({offset} + SLURM_ARRAY_TASK_ID + 1))p" {cells})
eval "cell=($line)"
folder=${{cell[0]}}

note() {{ # note EVENT JSON: one line more in the cell's {events}
    mkdir -p "$folder"
    printf '{{"event": "%s", "time": %(%s)T, "job": "%s", %s}}\n' "$1" -1 "$task" "$2" >>"$folder/{events}"
}}

# Slurm warns before the time limit (USR1, to this shell alone), and at a preemption or requeue (TERM). The
# job is told, finishes its step, writes what is done, and ends with status {again}: run me again.
run= signalled=
tell() {{ signalled=1; [ -z "$run" ] || kill -USR1 "$run" 2>/dev/null; }}
trap tell USR1 USR2 TERM

again() {{ # back into the queue; not if Slurm is ending this task already, to requeue it or because it is cancelled
    note ended '"status": {again}'
    if [ "$(squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
        scontrol requeue "$task"
    fi
    exit {again}
}}

rows=$(cat "$folder/{rows}" 2>/dev/null | wc -l)
note started "\"node\": \"${{SLURMD_NODENAME:-$HOSTNAME}}\", \"restarts\": ${{SLURM_RESTART_COUNT:-0}}, \"rows\": $rows"

{setup}
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-$SLURM_CPUS_ON_NODE}} # no more threads than the task has cores
{ray}
[ -z "$signalled" ] || again
{python} -m pipeline "${{cell[@]:1}}" &
run=$!
# A signal ends `wait` early: then wait again, for the job's own status.
while wait "$run"; status=$?; [ -n "$signalled" ]; do signalled=; stopped=1; done
{down}
case $status in
{again}) again ;;
{usr1} | {usr2} | {term}{lost}) [ -z "${{stopped:-}}" ] || again ;; # the signal came before Python could take it
esac
note ended "\"status\": $status"
trap - USR1 USR2 TERM
[ "$status" -le {killed_by} ] || kill -s "$((status - {killed_by}))" $$ # killed: then Slurm is to know by which signal
exit "$status"
"""


def batch_script(
    config: SubmitConfig,
    folder: Path,
    working_folder: Path,
    *,
    offset: int,
    count: int,
    width: int | None,
    vllm_python: str | None = None,
) -> str:
    """Write the script of one array.

    Args:
        folder: of the submission, with cells.txt; the logs go there too. Absolute.
        working_folder: where relative paths of the overrides start. Absolute.
        offset: of the array's first cell in cells.txt.
        count: cells of this array.
        width: how many of them may run at once.
        vllm_python: of vLLM's environment, where a cell runs on more nodes than one.

    Raises:
        ConfigError: a value that would not reach sbatch or the shell as it is.
    """
    array = f"0-{count - 1}" + (f"%{width}" if width else "")
    head = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(config, folder, working_folder, array)),
    ]
    body = BODY.format(
        offset=offset,
        cells=shlex.quote(str(folder / "cells.txt")),
        rows=JobPaths(folder).rows.name,
        events=JobPaths(folder).events.name,
        again=int(ExitStatus.RUN_AGAIN),
        killed_by=KILLED_BY,
        **{name: KILLED_BY + getattr(signal, f"SIG{name.upper()}") for name in ("usr1", "usr2", "term")},
        setup="\n".join(_setup(config)),
        ray="" if vllm_python is None else start_ray(config, folder, vllm_python),
        down="" if vllm_python is None else "down",
        lost="" if vllm_python is None else f" | {int(ExitStatus.FAILED)}",  # the signal ended Ray first
        python=shlex.quote(config.python or sys.executable),
    )
    return "\n".join(head) + "\n" + body


def cell_line(folder: Path, overrides: list[str]) -> str:
    """Write a cell as one line of bash words."""
    return " ".join(_bash_word(word) for word in [str(folder), *overrides])


def _options(config: SubmitConfig, folder: Path, working_folder: Path, array: str) -> list[str]:
    gpu = f"gpu:{config.gpu_type}:{config.gpus}" if config.gpu_type else f"gpu:{config.gpus}"
    named = {
        "job-name": "pipeline",
        "array": array,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time_min,
        "cpus-per-task": config.cpus,
        "mem": config.memory,
        "gres": gpu if config.gpus else None,
        **({"nodes": config.nodes, "ntasks-per-node": 1} if config.nodes > 1 else {}),
        "signal": f"B:USR1@{config.signal_sec}",
        "chdir": working_folder,
        "output": f"{str(folder).replace('%', '%%')}/%A_%a.log",
        "open-mode": "append",
    }
    for option in config.options:
        if _CONTROL.search(option):
            raise ConfigError(
                found=f"submit.options: {option!r}: is more than a line", fix="Give each its own."
            )
    given = [f"--{name}={_header_value(name, value)}" for name, value in named.items() if value is not None]
    return [*given, "--requeue", *config.options]


def _header_value(name: str, value: object) -> str:
    """Quote a value for sbatch, which reads its header with quotes, but without any escape.

    Raises:
        ConfigError: it holds what no quotes protect.
    """
    text = str(value)
    if _CONTROL.search(text) or '"' in text or "\\" in text:
        raise ConfigError(
            found=f"--{name}={text!r}: sbatch takes no quotes, backslashes or new lines in this",
            fix="Choose another value, or submit from a folder without them.",
        )
    return text if re.fullmatch(r"[\w@%+=:,./~^-]+", text) else f'"{text}"'


def _setup(config: SubmitConfig) -> list[str]:
    for name in config.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(
                found=f"submit.environment: {name!r}: no name of a variable", fix="Use letters, digits and _."
            )
    lines = [f"export {name}={_bash_word(value)}" for name, value in config.environment.items()]
    if config.offline:
        lines.append("export HF_HUB_OFFLINE=1 # everything was fetched when this was submitted")
    return [*lines, *config.setup]


def _bash_word(word: str) -> str:
    if not re.search(r"[\n\r]", word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"$'{escaped}'"
