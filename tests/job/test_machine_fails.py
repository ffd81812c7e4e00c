"""What the machine does to a job: a control group's kill, folders and file systems that vanish under it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from job_helper import ROOT, arguments, environment, texts, write_rows

from pipeline.commands.door import main
from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import job_folder
from pipeline.job.paths import JobPaths

ROWS = 150
GROUP_BYTES = 1_500_000_000
# A job with less patience for a disk that does not answer.
IMPATIENT = """
import sys
import pipeline.job.watchdog
from pipeline.__main__ import main
pipeline.job.watchdog.LAST_WORDS_SEC = 1
sys.exit(main())
"""
HOG = """
held = []
while True:
    held.append(bytearray(b"x" * 20_000_000))
"""


@pytest.fixture
def job(tiny_dir: Path, tmp_path: Path) -> Callable[[Path], list[str]]:
    """`job(outputs)`: the command line of a job."""
    rows = [{"id": f"r{i}", "prompt": f"Tell joke number {i}."} for i in range(ROWS)]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    return lambda outputs: arguments(tiny_dir, prompts, outputs, "generation.max_new_tokens=32")


@contextmanager
def running(
    line: list[str], *before: str, start: tuple[str, ...] = ("-m", "pipeline")
) -> Iterator["subprocess.Popen[str]"]:
    """A job in a process of its own that has written some rows; `before` is put before its command."""
    rows, end = JobPaths(job_folder(line)).rows, time.monotonic() + 120
    with subprocess.Popen(
        [*before, sys.executable, *start, *line, "engine.max_rows=1"],  # slowly
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            while not (rows.exists() and rows.read_bytes().count(b"\n") >= 5):
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < end
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of a version of Linux's, with a bound on memory."""
    top = Path("/sys/fs/cgroup")
    place, limit = (
        (top / "memory", "memory.limit_in_bytes") if (top / "memory").is_dir() else (top, "memory.max")
    )
    group = place / f"pipeline-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(GROUP_BYTES))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    end = time.monotonic() + 20
    while group.exists() and time.monotonic() < end:  # until the kernel has let the last process go
        with suppress(OSError):
            group.rmdir()
        time.sleep(0.05)


def test_a_control_groups_kill_loses_no_row_and_the_same_command_goes_on(job, tmp_path, control_group, capfd):
    line = job(tmp_path / "out")
    enter = f'echo $$ > {control_group}/cgroup.procs && exec "$@"'
    chosen = (
        f"echo 1000 > /proc/self/oom_score_adj && {enter}"  # of the two, the job is what the kernel kills
    )
    with (
        running(line, "sh", "-c", chosen, "sh") as process,
        subprocess.Popen(["sh", "-c", enter, "sh", sys.executable, "-c", HOG]) as hog,
    ):
        try:
            assert process.wait(120) == -signal.SIGKILL
        finally:
            hog.kill()
    assert main(["status", str(job_folder(line))]) == ExitStatus.SOME_FAILED
    assert "stopped" in capfd.readouterr().err
    assert main(line) == ExitStatus.DONE
    assert "Going on: " in capfd.readouterr().err
    assert len(texts(line)) == ROWS


def test_a_folder_that_is_moved_away_under_a_job_is_named_and_goes_on_when_it_is_back(job, tmp_path):
    outputs, away = tmp_path / "out", tmp_path / "away"
    line = job(outputs)
    with running(line) as process:
        outputs.rename(away)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in said, "Done" in said) == (ExitStatus.FAILED, False, False), (
        said
    )
    assert f"{job_folder(line)}" in said
    away.rename(outputs)
    assert main(line) == ExitStatus.DONE
    assert len(texts(line)) == ROWS


def test_a_file_system_that_vanishes_under_a_job_is_named_and_all_is_done_where_it_is_empty(job, tmp_path):
    outputs = tmp_path / "mounted"
    outputs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(outputs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    line = job(outputs)
    try:
        with running(line) as process:
            subprocess.run(["umount", "-l", str(outputs)], check=True)
            _, said = process.communicate(timeout=120)
    finally:
        subprocess.run(["umount", "-l", str(outputs)], capture_output=True, check=False)
    assert (process.returncode, "Traceback" in said, "Done" in said) == (ExitStatus.FAILED, False, False), (
        said
    )
    assert f"{job_folder(line)}" in said
    assert main(line) == ExitStatus.DONE
    assert len(texts(line)) == ROWS


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[bytes]"]]:
    """`served()`: the process that serves a file system at tmp_path/served, as one of a network would be."""
    kept, mounted, servers = tmp_path / "kept", tmp_path / "served", []
    kept.mkdir()
    mounted.mkdir()
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.R_OK):
        pytest.skip("no file system can be served here: bindfs or /dev/fuse is missing")

    def serve() -> "subprocess.Popen[bytes]":
        servers.append(subprocess.Popen(["bindfs", "-f", kept, mounted]))
        while not mounted.is_mount():
            assert servers[-1].poll() is None, "bindfs ended"
            time.sleep(0.01)
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()
        server.wait()
        subprocess.run(["umount", "-l", mounted], capture_output=True, check=False)


def test_a_file_system_that_hangs_and_dies_under_a_job_is_named_and_the_job_goes_on_when_it_is_back(
    job, tmp_path, served, capfd
):
    line = job(tmp_path / "served" / "out")
    folder, server = job_folder(line), served()
    with running([*line, "watchdog_sec=1"], start=("-c", IMPATIENT)) as process:
        server.send_signal(signal.SIGSTOP)
        _, said = process.communicate(timeout=120)
    assert process.returncode == ExitStatus.STALLED, said
    assert "No progress for 1 s after step" in said
    server.kill()
    server.wait()
    for refused in ([], ["status"], ["report"]):
        assert main([*refused, *([str(folder)] if refused else line)]) == ExitStatus.FAILED
        said = capfd.readouterr().err
        assert f"{folder}" in "".join(said.splitlines())
        assert "Transport endpoint is not connected" in " ".join(said.split())
    subprocess.run(["umount", "-l", tmp_path / "served"], check=True)
    served()
    assert main(["status", str(folder)]) == ExitStatus.SOME_FAILED
    assert "stopped" in capfd.readouterr().err
    assert main(line) == ExitStatus.DONE
    assert "Going on: " in capfd.readouterr().err
    assert len(texts(line)) == ROWS
