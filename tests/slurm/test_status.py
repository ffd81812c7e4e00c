"""The state of jobs and cells, told from their own files. With a Slurm: tests/test_slurm.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_helper import environment, note_todo

from pipeline.commands.status import exit_status
from pipeline.common.exit_status import ExitStatus
from pipeline.common.units import duration
from pipeline.job import counts
from pipeline.job.counts import read_counts
from pipeline.job.events import append_event, read_events
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths
from pipeline.prompts.count import prompts_sha256
from pipeline.report.jobs import find_jobs
from pipeline.slurm.client import expand, read_records
from pipeline.slurm.state import find_folders, state_of, states_of

GOOD = {"completion": "x", "error": None, "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "key": "k"}
BAD = {"completion": None, "error": "p.jsonl:2: no prompt", "usage": None, "key": "k"}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def write_job(folder: Path, rows: list[dict[str, Any]], total: int | None = None, **noted: Any) -> Path:
    """A folder with rows, and where a total is given the note of a job that wrote `done` of them, or all."""
    done = noted.pop("done", len(rows)) if total is not None else 0
    with JobFolder(folder) as job:
        job.write_json(job.stats, {"tokens_per_sec": 7.5, "run_sec": 2})
        for row in rows[:done]:
            job.append(row)
    if total is not None:
        note_todo(folder, [1] * total, done, **noted)
    with JobFolder(folder) as job:
        for row in rows[done:]:
            job.append(row)
    return folder


def state(folder: Path) -> tuple[str, str]:
    found = state_of(folder)
    return found.kind, found.text


def test_a_finished_job_is_complete_and_says_how_many_rows_failed(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD, BAD], 2, errors=1)
    assert state(job) == ("complete", "complete, 1 failed rows")
    assert read_counts(job).tokens_per_sec == 7.5


def test_rows_written_after_the_note_are_counted(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD, BAD, GOOD], 9, done=1)
    found = read_counts(job)
    assert (found.done, found.errors, found.total, found.complete) == (3, 1, 9, False)
    assert state(job) == ("stopped", "stopped")


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD, GOOD])
    with (job / "outputs.jsonl").open("a") as file:
        file.write('{"completion":')
    assert read_counts(job).done == 2


def test_a_completion_that_quotes_an_error_row_is_no_error(tmp_path: Path) -> None:
    job = write_job(
        tmp_path / "a", [{**GOOD, "completion": json.dumps(BAD), "metadata": {"completion": None}}]
    )
    assert read_counts(job).errors == 0


def test_a_large_file_is_estimated_and_never_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path / "a", [GOOD, BAD] * 5000)
    append_event(job, "submitted", job="1_0", total=10000, log="none")
    monkeypatch.setattr(counts, "COUNTED_BYTES", 1000)
    monkeypatch.setattr(counts, "PIECE_BYTES", 10_000)
    found = read_counts(job)
    assert found.done == pytest.approx(10000, rel=0.02)
    assert found.errors == pytest.approx(5000, rel=0.05)
    assert not found.exact
    assert not found.complete


def test_the_last_submission_says_how_many_rows_there_are(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD], 1)
    append_event(job, "submitted", job="1_0", total=5, log="none")
    assert not read_counts(job).complete


def test_events_are_those_of_the_last_submission(tmp_path: Path) -> None:
    append_event(tmp_path, "submitted", job="1_0", total=5, log="none")
    append_event(tmp_path, "started", job="1_0", node="n1", rows=0)
    append_event(tmp_path, "ended", job="1_0", status=3)
    append_event(tmp_path, "submitted", job="2_0", total=5, log="none")
    with (tmp_path / "slurm.jsonl").open("a") as file:
        file.write('{"event": "star')
    events = read_events(tmp_path)
    assert (events.task, events.started, events.ended) == ("2_0", [], None)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (3, ("failed", "failed: m: no weights there")),
        (137, ("failed", "killed by signal 9 (out of memory?)")),
        (75, ("stopped", ExitStatus.RUN_AGAIN.meaning)),
        (127, ("failed", "failed with status 127: m: no weights there")),
    ],
)
def test_an_ended_cell_says_why(tmp_path: Path, status: int, expected: tuple[str, str]) -> None:
    log = tmp_path / "1_0.log"
    log.write_text("Loading m\nError: m: no \nweights there\n")
    append_event(tmp_path, "submitted", job="1_0", total=5, log=str(log))
    append_event(tmp_path, "started", job="1_0", node="n1", rows=0)
    append_event(tmp_path, "ended", job="1_0", status=status)
    assert state(tmp_path) == expected


def test_what_slurm_alone_could_know_is_not_guessed(tmp_path: Path) -> None:
    append_event(tmp_path, "submitted", job="1_0", total=5, log="none")
    assert state(tmp_path) == ("unknown", "submitted")
    append_event(tmp_path, "started", job="1_0", node="n1", rows=0)
    assert state(tmp_path) == ("unknown", "last seen running on n1")
    append_event(tmp_path, "started", job="1_0", node="n2", rows=2)
    assert state(tmp_path) == ("unknown", "last seen running on n2; resumed 1×")


def test_a_job_that_runs_here_is_shown_as_running(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD], 4)
    with JobFolder(job):
        kind, text = state(job)
    assert kind == "running"
    assert f"process {os.getpid()} on {os.uname().nodename} (since " in text
    assert state(job) == ("stopped", "stopped")


def test_a_job_that_was_killed_is_stopped_though_its_word_is_left(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD], 4)
    hold = "import sys; from pathlib import Path; from pipeline.job.folder import JobFolder\n"
    hold += "folder = JobFolder(Path(sys.argv[1])); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout
        process.stdout.readline()
        assert state(job)[0] == "running"
        process.kill()
    assert JobPaths(job).holder.exists()
    assert state(job) == ("stopped", "stopped")


@pytest.mark.parametrize("mark", ["rows", "stats", "manifest", "todo", "events", "log", "hydra"])
def test_what_marks_a_job_marks_it_for_status_and_for_the_report(tmp_path: Path, mark: str) -> None:
    job = tmp_path / "outputs" / "set" / "job"
    job.mkdir(parents=True)
    getattr(JobPaths(job), mark).touch()
    assert find_folders(tmp_path) == [job]
    assert [found.folder for found in find_jobs([tmp_path])] == [job]


def test_folders_are_found_in_the_order_that_people_count(tmp_path: Path) -> None:
    for name in ("p/j/shard-10-of-12", "p/j/shard-2-of-12", "p/j/run-1", ".slurm/x"):
        write_job(tmp_path / name, [GOOD])
    assert [folder.name for folder in find_folders(tmp_path)] == ["shard-2-of-12", "shard-10-of-12"]


def test_exit_status_says_whether_all_is_done(tmp_path: Path) -> None:
    done = write_job(tmp_path / "a", [GOOD], 1)
    half = write_job(tmp_path / "b", [GOOD], 2)
    assert exit_status(list(states_of([done]))) == 0
    assert exit_status(list(states_of([done, half]))) == 1


def test_slurms_ranges_are_taken_apart() -> None:
    assert expand("12_3") == ["12_3"]
    assert expand("12_[1-3,7%2]") == ["12_1", "12_2", "12_3", "12_7"]


def test_a_tasks_own_record_goes_before_one_of_tasks_that_never_started() -> None:
    """As Slurm 22.05 wrote them when 1_3 was cancelled while it waited, just before 1_2 was killed."""
    records = read_records(
        "1_2|FAILED|0:9\n1_[0-3%3]|CANCELLED by 0|0:0\n1_0|REQUEUED|0:0\n1_0|COMPLETED|0:0\n1_1|COMPLETED|0:0\n"
    )
    assert (records["1_2"].state, records["1_2"].signal, records["1_2"].earlier) == ("FAILED", 9, ())
    assert (records["1_0"].state, records["1_0"].earlier) == ("COMPLETED", ("REQUEUED",))
    assert (records["1_1"].state, records["1_1"].earlier) == ("COMPLETED", ())
    assert (records["1_3"].state, records["1_3"].earlier) == ("CANCELLED", ())


def test_durations_read_well() -> None:
    assert [duration(s) for s in (None, 42, 200, 7500, 270000)] == [
        "-",
        "42 s",
        "3 min",
        "2 h 05",
        "3 d 03 h",
    ]


def test_a_folder_that_is_not_there_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "status", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such folder" in " ".join(done.stderr.split())


def test_status_fits_80_columns_and_breaks_no_name(tmp_path: Path) -> None:
    name = "llama-nf4_single-greedy-1a2b3c4d"
    for part in range(2):
        write_job(tmp_path / "questions" / name / f"shard-{part}-of-12", [GOOD] * 3, 4000)
    with JobFolder(tmp_path / "questions" / name / "shard-0-of-12"):
        command = [sys.executable, "-m", "pipeline", "status", str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**environment(), "COLUMNS": "80"}
        )
    lines = done.stderr.splitlines()
    assert lines[1] == f"questions/{name}"
    assert lines[2].split()[0] == "3/4000"
    assert lines[2].endswith("running   shard-0-of-12") or lines[2].endswith("running  shard-0-of-12")
    assert lines[3].startswith("    running (process ")
    assert lines[-1] == "1 running, 1 stopped; 6 of 8,000 rows."
    assert max(map(len, [lines[0], *lines[1:3], *lines[4:]])) <= 80


def test_the_time_left_of_a_job_on_this_machine_is_shown(tmp_path: Path) -> None:
    job = write_job(tmp_path / "a", [GOOD] * 30, 40, done=10)
    with JobFolder(job):
        left = state_of(job).left_sec
    assert left is not None
    assert left == pytest.approx(10 * (time.time() - psutil.Process().create_time()) / 20, rel=0.2)


def test_a_prompt_file_that_was_only_touched_is_not_written_since(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("x\n")
    job = write_job(tmp_path / "a", [GOOD], 1, prompts=prompts, sha256=prompts_sha256(str(prompts)))
    os.utime(prompts, (1, 1))
    assert state(job) == ("complete", "complete")
    prompts.write_text("y\n")
    assert state(job)[1] == "complete; the prompt file was written since"
