"""A job's folder: what is written stays, what is torn is found, and one process holds it."""

import json
import os
import resource
import signal
import subprocess
import sys

import psutil
import pytest
from job_helper import environment

from pipeline.common.errors import OutputError
from pipeline.job.folder import DROP, KEEP, JobFolder
from pipeline.job.holder import Holder
from pipeline.job.paths import JobPaths, read_json
from pipeline.job.rows import parse_row, read_rows

KEY = "0123456789abcdef"

HOLD = """
import sys, time
from pathlib import Path
from pipeline.job.folder import JobFolder
folder = JobFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def row(index, **more):
    return {
        "id": f"row-{index}",
        "index": index,
        "sample": 0,
        "completion": "x",
        "error": None,
        "key": KEY,
        **more,
    }


def keep_whole(line, number):
    return DROP if line is None else KEEP


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_row_is_in_the_file_when_append_returns(tmp_path):
    with JobFolder(tmp_path) as folder:
        folder.append(row(0, completion="한국어 \u2028 \x1b[2J"))
        assert [r["completion"] for r in read_rows(JobPaths(tmp_path).rows)] == ["한국어 \u2028 \x1b[2J"]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with JobFolder(tmp_path):
        second = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True, env=environment()
        )
    assert second.returncode != 0
    assert f"process {os.getpid()} on {os.uname().nodename}" in second.stderr


def test_the_lock_dies_with_its_holder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, env=environment()
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid} on"):
            JobFolder(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with JobFolder(tmp_path) as folder:
        folder.append(row(0))


@pytest.mark.parametrize(
    "damaged",
    [
        b"\0\0\0\0\n",
        b'{"id": "a"\n',
        b"[]\n",
        b"\xff\xfe\n",
        b"\n",
        json.dumps(row(1, key="zz")).encode() + b"\n",
        json.dumps(row(1, sample="0")).encode() + b"\n",
        json.dumps(row(1, sample=-1)).encode() + b"\n",
        json.dumps({**row(1), "index": None}).encode() + b"\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_damaged_line_is_named_and_moved_aside(tmp_path, damaged):
    whole = [json.dumps(row(i)).encode() + b"\n" for i in (0, 2)]
    JobPaths(tmp_path).rows.write_bytes(whole[0] + damaged + whole[1])
    named = []

    def judge(line, number):
        if line is None:
            named.append(number)
        return keep_whole(line, number)

    with JobFolder(tmp_path) as folder:
        assert folder.sift(judge) == 1
    assert named == [2]
    assert JobPaths(tmp_path).rows.read_bytes() == b"".join(whole)
    assert JobPaths(tmp_path).replaced.read_bytes() == damaged


def test_a_torn_last_line_is_repaired_at_every_place_it_can_tear(tmp_path):
    whole, last = (json.dumps(row(i)).encode() + b"\n" for i in (0, 1))
    for cut in range(1, len(last)):
        JobPaths(tmp_path).rows.write_bytes(whole + last[:cut])
        with JobFolder(tmp_path) as folder:
            assert folder.sift(keep_whole) == 1
            folder.append(row(1))
        assert JobPaths(tmp_path).rows.read_bytes() == whole + last.replace(b": ", b":").replace(b", ", b",")


def test_a_file_that_is_right_is_not_written_again(tmp_path):
    with JobFolder(tmp_path) as folder:
        folder.append(row(0))
        before = JobPaths(tmp_path).rows.stat()
        assert folder.sift(keep_whole) == 0
    after = JobPaths(tmp_path).rows.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_moved_row_gets_its_new_index(tmp_path):
    with JobFolder(tmp_path) as folder:
        folder.append(row(0))
        folder.append(row(1))
        assert folder.sift(lambda line, number: 7 if number == 2 else KEEP) == 0
    assert [r["index"] for r in read_rows(JobPaths(tmp_path).rows)] == [0, 7]


def test_a_full_disk_leaves_whole_lines_and_a_clear_error(tmpfs):
    written = []

    def fill():
        with JobFolder(tmpfs) as folder:
            while True:
                folder.append(row(len(written), completion="x" * 1000))
                written.append(1)

    with pytest.raises(OutputError, match=r"No space left on device.*run the same command again"):
        fill()
    lines = JobPaths(tmpfs).rows.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(written) > 50
    assert all(parse_row(line) for line in lines)


def test_a_full_disk_never_harms_an_older_json_file(tmpfs):
    with JobFolder(tmpfs) as folder:
        folder.write_json(folder.stats, {"run": 1})
        (tmpfs / "filler").write_bytes(b"x" * (200 << 10))
        with pytest.raises(OutputError, match="No space left"):
            folder.write_json(folder.stats, {"run": 2, "much": "x" * (200 << 10)})
        assert read_json(tmpfs / "stats.json") == {"run": 1}
        (tmpfs / "filler").unlink()
        folder.write_json(folder.stats, {"run": 2})
    assert read_json(tmpfs / "stats.json") == {"run": 2}
    assert not list(tmpfs.glob("*.new"))


def test_a_full_disk_while_sifting_loses_no_line(tmpfs):
    with JobFolder(tmpfs) as folder:
        for i in range(120):
            folder.append(row(i, completion="x" * 1000))
        before = JobPaths(tmpfs).rows.read_bytes()
        (tmpfs / "filler").write_bytes(b"x" * (80 << 10))
        with pytest.raises(OutputError, match="No space left"):
            folder.sift(lambda line, number: DROP if number % 2 else KEEP)
    assert JobPaths(tmpfs).rows.read_bytes() == before


def test_a_limit_on_file_size_is_reported_and_tears_nothing(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with JobFolder(tmp_path) as folder:
        folder.append(row(0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
        try:
            with pytest.raises(OutputError, match="File too large"):
                folder.append(row(1, completion="x" * 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)
        folder.append(row(1))
    assert [r["index"] for r in read_rows(JobPaths(tmp_path).rows)] == [0, 1]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmpfs):
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    with pytest.raises(OutputError, match=r"Read-only file system.*outputs_dir="):
        JobFolder(tmpfs / "job")


def test_a_path_through_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        JobFolder(tmp_path / "file" / "job")


def test_set_aside_deletes_nothing(tmp_path):
    for i in range(3):
        with JobFolder(tmp_path) as folder:
            folder.set_aside()
            folder.append(row(i))
            folder.write_json(folder.stats, {"run": i})
    assert [r["index"] for r in read_rows(JobPaths(tmp_path).rows)] == [2]
    assert [r["index"] for r in read_rows(JobPaths(tmp_path / "run-1").rows)] == [0]
    assert [r["index"] for r in read_rows(JobPaths(tmp_path / "run-2").rows)] == [1]
    assert read_json(tmp_path / "run-2" / "stats.json") == {"run": 1}


def test_results_that_are_a_link_stay_one(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "large").mkdir()
    link = tmp_path / "job" / "outputs.jsonl"
    link.symlink_to("../large/results.jsonl")
    with JobFolder(tmp_path / "job") as folder:
        for i in range(3):
            folder.append(row(i))
        folder.sift(lambda line, number: DROP if number == 2 else KEEP)
    assert link.is_symlink()
    assert [r["index"] for r in read_rows(tmp_path / "large" / "results.jsonl")] == [0, 2]
    with JobFolder(tmp_path / "job") as folder:
        folder.set_aside()
    assert [r["index"] for r in read_rows(tmp_path / "job" / "run-1" / "outputs.jsonl")] == [0, 2]


def test_the_holder_is_known_though_the_clock_is_set(tmp_path, monkeypatch):
    with JobFolder(tmp_path) as folder:
        assert Holder.read(folder.holder).lives_here
        booted, created = psutil.boot_time(), psutil.Process.create_time
        monkeypatch.setattr(psutil, "boot_time", lambda: booted - 86400)  # as /proc/stat says it afterwards
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) - 86400)
        assert Holder.read(folder.holder).lives_here


@pytest.mark.parametrize("damaged", [{"pid": -1}, {"pid": 2**70}, {"started_sec": 1e300}, {"host": 5}])
def test_a_damaged_holder_is_nobody(tmp_path, damaged):
    with JobFolder(tmp_path) as folder:
        whole = json.loads(folder.holder.read_text())
        folder.holder.write_text(json.dumps({**whole, **damaged}))
        assert Holder.read(folder.holder) is None
