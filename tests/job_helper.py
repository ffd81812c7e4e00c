"""Jobs on a tiny model, for the tests of what survives: in this process, or in one that can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.config.compose import job_folder, read_config
from pipeline.job import runner
from pipeline.job.folder import JobFolder
from pipeline.job.ledger import Ledger
from pipeline.job.todo import PromptState, Todo
from pipeline.models.own_settings import settle_generation

ROOT = Path(__file__).resolve().parent.parent

# Imports once what takes long, then forks a process for each job: a killed job starts again at once.
SERVER = """
import os, sys
import pipeline.job.run
from pipeline.__main__ import main
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdin = open(os.devnull)
        sys.argv = ["pipeline", *line.rstrip("\\n").split("\\t")]
        status = main()
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class JobServer:
    """Runs `python -m pipeline ARGUMENTS` again and again without its start-up time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def start(self, arguments: list[str]) -> int:
        """The process id of a new job."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\t".join(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The exit status of the job; negative for the signal that killed it."""
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}


def arguments(model: Path, prompts: Path, outputs: Path, *more: str) -> list[str]:
    """The command line of a job on a tiny model."""
    own = [f"model.name={model}", f"prompts={prompts}", f"outputs_dir={outputs}", "quant=fp32"]
    return [*own, "generation.max_new_tokens=8", *more]


def run_job(overrides: list[str]) -> int:
    """In this process; raises what the command line would report."""
    return runner.run_job(settle_generation(read_config(overrides)), job_folder(overrides))


def command(overrides: list[str], where: Path = ROOT, **options: Any) -> "subprocess.CompletedProcess[str]":
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *overrides],
        capture_output=True, text=True, env=environment(), cwd=where, check=False, **options,
    )  # fmt: skip


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON, bytes and text as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def note_todo(
    folder: Path,
    samples: list[int],
    done: int,
    *,
    errors: int = 0,
    prompts: Path = Path("p.jsonl"),
    sha256: str | None = None,
    limit: int | None = None,
) -> None:
    """Note in a folder, as a run does, how many samples its rows have, and how many are written."""
    ledger = Ledger()
    for row, count in enumerate(samples):
        ledger.add(f"{row:016x}", row, count)
    places = [(row, sample) for row, count in enumerate(samples) for sample in range(count)]
    for row, sample in places[:done]:
        ledger.mark(row, sample, failed=ledger.errors < errors)
    with JobFolder(folder) as results:
        Todo.note(results, PromptState.look(str(prompts)), sha256, limit, ledger, submissions=0)


def outputs(overrides: list[str]) -> list[dict[str, Any]]:
    """The rows of the job's outputs.jsonl, all of which must be whole."""
    text = (job_folder(overrides) / "outputs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if text else []


def texts(overrides: list[str]) -> dict[tuple[str, int], Any]:
    """(id, sample) to what was written for it; each exactly once."""
    rows = outputs(overrides)
    found = {(row["id"], row["sample"]): row["completion"] or row["error"] for row in rows}
    assert len(found) == len(rows), "a row was written twice"
    return found
