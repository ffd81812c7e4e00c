"""What is said of a job is true of its rows, whatever was done to it: run, status, submit and merge."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from job_helper import ROOT, arguments, environment, outputs, run_job, write_rows

from pipeline.commands.door import main
from pipeline.config.compose import job_folder
from pipeline.job.folder import JobFolder
from pipeline.job.todo import Todo
from pipeline.prompts.count import count_once
from pipeline.slurm.cells import find_cells

Line = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def job(tiny_dir: Path, tmp_path: Path) -> Line:
    """`job("limit=2")`: the command line of a job over tmp_path/prompts.jsonl."""
    return lambda *more: arguments(tiny_dir, tmp_path / "prompts.jsonl", tmp_path / "outputs", *more)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    return lambda rows: write_rows(tmp_path / "prompts.jsonl", rows)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"Tell joke number {i}."} for i in range(count)]


def tool(name: str, *words: object) -> tuple[int, str]:
    """Run the command of that name; return its exit status and what it said, on one line."""
    with redirect_stderr(StringIO()) as said:
        status = main([name, *map(str, words)])
    return status, " ".join(said.getvalue().split())


def in_submit(line: list[str]) -> bool:
    """Whether submit takes the job for complete."""
    ((cell,), _) = find_cells([*line, "submit.dry_run=true"])
    return cell.complete


@contextmanager
def started(line: list[str], until: Callable[[], bool]) -> Iterator["subprocess.Popen[str]"]:
    """A job in a process of its own, as soon as `until` holds; killed at the end if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *line], stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not until():
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.005)
            yield process
        finally:
            process.kill()


def counted(folder: Path, total: int) -> Callable[[], bool]:
    return lambda: (todo := Todo.read(folder)) is not None and todo.total == total


def test_rows_appended_while_the_job_runs_are_done_by_the_next(
    job: Line, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(numbered(4))
    with started(job(), counted(job_folder(job()), 4)) as process:
        write(numbered(6))
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "has changed since it was read" in said
    assert len(outputs(job())) == 4
    assert not in_submit(job())
    assert main(job()) == 0
    assert "6 of 6" in capsys.readouterr().err
    assert sorted(row["id"] for row in outputs(job())) == [f"r{i}" for i in range(6)]
    assert in_submit(job())


def test_a_row_edited_while_the_job_runs_is_done_by_the_next(job: Line, write: Any) -> None:
    rows = numbered(4)
    write(rows)
    written = job_folder(job()) / "outputs.jsonl"
    with started(job(), written.exists) as process:
        rows[2]["prompt"] = "Something else?"
        write(rows)
        process.communicate()
    assert run_job(job()) == 0
    assert {row["id"]: row["prompt"] for row in outputs(job())} == {row["id"]: row["prompt"] for row in rows}


def test_a_job_that_runs_or_was_killed_after_a_limited_trial_is_not_complete(job: Line, write: Any) -> None:
    write(numbered(6))
    assert run_job(job("limit=2")) == 0
    folder = job_folder(job())
    assert tool("status", folder)[0] == 0
    with started(job(), counted(folder, 6)):
        status, said = tool("status", folder)
        assert (status, "2/6" in said, "1 running" in said) == (75, True, True), said
    status, said = tool("status", folder)
    assert (status, "2/6" in said, "1 stopped" in said) == (1, True, True), said
    assert not in_submit(job())
    assert in_submit(job("limit=2")) is False, "whether they are the first two is not known"
    assert run_job(job()) == 0
    assert tool("status", folder)[0] == 0
    assert in_submit(job())
    assert in_submit(job("limit=2"))


def test_a_cell_that_died_before_it_read_anything_is_not_complete(job: Line, write: Any) -> None:
    write(numbered(2))
    assert run_job(job()) == 0
    other = job("generation.max_new_tokens=5")
    with started(other, (job_folder(other) / "pipeline.log").exists):
        pass
    (job_folder(other) / "todo.json").unlink(missing_ok=True)  # where a busy machine was slow to kill it
    status, said = tool("status", job_folder(job()).parent)
    assert (status, "0/?" in said, "1 stopped" in said, "2 of ? rows" in said) == (1, True, True, True), said


def test_rows_that_were_deleted_are_missed(job: Line, write: Any) -> None:
    write(numbered(3))
    assert run_job(job()) == 0
    folder = job_folder(job())
    lines = (folder / "outputs.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "outputs.jsonl").write_bytes(b"".join(lines[:2]))
    status, said = tool("status", folder)
    assert (status, "2/3" in said) == (1, True), said
    assert not in_submit(job())
    (folder / "outputs.jsonl").unlink()
    status, said = tool("status", folder)
    assert (status, "0/3" in said) == (1, True), said
    assert not in_submit(job())
    assert run_job(job()) == 0
    assert len(outputs(job())) == 3
    assert tool("status", folder)[0] == 0


@pytest.mark.parametrize("renamed", [1, 2, 3])  # todo.json, outputs.jsonl, stats.json
def test_a_job_that_died_while_it_set_its_results_aside_is_not_complete(
    job: Line, write: Any, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    write(numbered(2))
    assert run_job(job()) == 0
    folder, rename, done = job_folder(job()), Path.rename, []

    def die(path: Path, target: Path) -> Path:
        done.append(path)
        if len(done) > renamed:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die)
    with JobFolder(folder) as results, pytest.raises(KeyboardInterrupt):
        results.set_aside()
    monkeypatch.setattr(Path, "rename", rename)
    assert tool("status", folder)[0] == 1
    assert not in_submit(job())
    assert run_job(job()) == 0
    assert len(outputs(job())) == 2
    assert tool("status", folder)[0] == 0


def test_a_shard_that_was_killed_after_a_limited_trial_is_not_merged(job: Line, write: Any) -> None:
    write(numbered(8))
    for shard in ("shard=0/2", "shard=1/2"):
        assert run_job(job(shard, "limit=4")) == 0
    whole = job_folder(job())
    assert tool("merge", whole)[0] == 0
    assert run_job(job("shard=0/2")) == 0
    with started(job("shard=1/2"), counted(whole / "shard-1-of-2", 4)):
        pass
    status, said = tool("merge", whole)
    assert status == 3
    assert "shard-1-of-2: 2 of 4 rows done; rows 5 (r5), 7 (r7) are missing" in said
    assert run_job(job("shard=1/2")) == 0
    status, said = tool("merge", whole)
    assert (status, "8 lines" in said) == (0, True), said
    merged = [json.loads(line)["id"] for line in (whole / "outputs.jsonl").read_text().splitlines()]
    assert merged == [f"r{i}" for i in range(8)]


def test_an_edit_of_one_shards_rows_does_not_block_the_merge(
    job: Line, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = numbered(5)
    write(rows)
    shards = [job("shard=0/2"), job("shard=1/2")]
    for shard in shards:
        assert run_job(shard) == 0
    rows[2]["prompt"] = "Something else?"
    write(rows)
    whole = job_folder(job())
    assert run_job(shards[0]) == 0
    assert tool("merge", whole)[0] == 3, "the second shard has not seen the file as it is"
    assert main(shards[1]) == 0
    assert "Nothing to do" in capsys.readouterr().err
    status, said = tool("merge", whole)
    assert (status, "5 lines" in said) == (0, True), said
    sums = {json.loads((job_folder(s) / "manifest.json").read_text())["prompts_sha256"] for s in shards}
    assert len(sums) == 1


def test_a_removed_row_leaves_the_job_complete(job: Line, write: Any) -> None:
    write(numbered(4))
    assert run_job(job()) == 0
    assert "written since" not in tool("status", job_folder(job()))[1]
    write(numbered(3))
    assert "complete; the prompt file was written since" in tool("status", job_folder(job()))[1]
    assert not in_submit(job())
    assert run_job(job()) == 0
    status, said = tool("status", job_folder(job()))
    assert (status, "3/3" in said, "written since" in said) == (0, True, False), said
    assert in_submit(job())


def test_a_file_that_shrank_below_its_shards_goes_on_to_the_merge(job: Line, write: Any) -> None:
    write(numbered(5))
    whole = job_folder(job())
    for part in range(4):
        assert run_job(job(f"shard={part}/4")) == 0
    write(numbered(2))
    asked = job("shards=4", "submit.dry_run=true")
    count_once.cache_clear()
    assert [cell.complete for cell in find_cells(asked)[0]] == [False] * 4
    for part in range(4):
        assert run_job(job(f"shard={part}/4")) == 0
    assert all(cell.complete for cell in find_cells(asked)[0])
    status, said = tool("merge", whole)
    assert (status, "2 lines" in said) == (0, True), said


def test_a_shard_without_rows_is_complete_and_is_merged(job: Line, write: Any) -> None:
    write(numbered(2))
    for part in range(4):
        assert run_job(job(f"shard={part}/4")) == 0
    whole = job_folder(job())
    assert tool("status", whole)[0] == 0
    status, said = tool("merge", whole)
    assert (status, "2 lines" in said) == (0, True), said
    stats = json.loads((whole / "stats.json").read_text())
    assert stats["rows"]["total"] == 2
    assert stats["run_sec"] > 0
