"""What asks a job to stop, or stops it: signals, a full disk, no progress, a killed cell of a sweep."""

import fcntl
import os
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time

import psutil
import pytest
from job_helper import ROOT, JobServer, arguments, command, environment, outputs, texts, write_rows

from pipeline.common.exit_status import ExitStatus
from pipeline.common.signals import Interrupt, Stopped
from pipeline.config.compose import job_folder
from pipeline.job.paths import JobPaths


@pytest.fixture(scope="module", autouse=True)
def hang_ups_count():
    """Under nohup, as some start tests, hang-ups are ignored, and every process would inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def server():
    server = JobServer()
    yield server
    server.close()


@pytest.fixture
def job(tiny_dir, tmp_path):
    """A job of some seconds; `job(folder, *more)`."""
    rows = [{"id": f"r{i}", "prompt": f"Tell joke number {i}."} for i in range(120)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)

    def build(name="outputs", *more):
        settings = ["generation.max_new_tokens=32", "engine.max_rows=4", *more]
        return arguments(tiny_dir, prompts, tmp_path / name, *settings)

    return build


def wait_for(condition, limit_sec=180):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_sec
        time.sleep(0.01)


def has_rows(overrides):
    path = JobPaths(job_folder(overrides)).rows
    return lambda: path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_the_step_writes_what_is_done_and_asks_to_be_resumed(server, job, name):
    pid = server.start(job())
    wait_for(has_rows(job()))
    os.kill(pid, getattr(signal, name))
    assert server.wait() == ExitStatus.RUN_AGAIN
    done = len(texts(job()))
    assert 0 < done < 120
    assert (job_folder(job()) / "stats.json").exists()
    server.start(job())
    assert server.wait() == 0
    assert len(texts(job())) == 120
    server.start(job("quiet"))
    assert server.wait() == 0
    assert texts(job()) == texts(job("quiet"))


def test_a_signal_at_any_moment_of_a_start_asks_to_be_resumed(job):
    """A real start, imports and all: nothing is written yet, so it stops at once."""
    for delay_sec in (0.4, 0.8, 1.3, 1.9):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *job()],
            stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip
        time.sleep(delay_sec)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said, said
        assert process.returncode in (ExitStatus.RUN_AGAIN, -signal.SIGTERM), said
        if delay_sec > 0.8:
            assert process.returncode == ExitStatus.RUN_AGAIN


def test_a_signal_that_a_library_catches_and_stumbles_over_is_a_signal_all_the_same():
    def import_dill():
        """As it does: whatever goes wrong, it imports a module that is not there."""
        try:
            signal.raise_signal(signal.SIGTERM)
        except:  # noqa: E722
            import version

            return version

    with pytest.raises(Stopped), Interrupt():
        import_dill()


def test_an_error_without_a_signal_stays_one():
    with pytest.raises(ModuleNotFoundError), Interrupt():
        raise ModuleNotFoundError


def test_a_signal_stops_at_once_until_there_is_work_to_finish():
    with pytest.raises(Stopped), Interrupt():
        signal.raise_signal(signal.SIGUSR1)
    with Interrupt() as interrupt:
        interrupt.hold()
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM


def test_a_signal_that_was_caught_stops_when_the_work_would_begin():
    with Interrupt(), Interrupt() as interrupt:
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped):
            interrupt.hold()
    with Interrupt() as interrupt:
        interrupt.hold()
        assert interrupt.signal is None


def test_an_import_comes_to_its_end_before_a_signal_stops(tmp_path, monkeypatch):
    """As torch's: Python's errors where its C++ does not await them would end the process."""
    (tmp_path / "with_a_signal.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def import_and_go_on():
        __import__("with_a_signal")
        while True:
            pass

    with pytest.raises(Stopped), Interrupt():
        import_and_go_on()
    assert sys.modules.pop("with_a_signal").whole


def test_a_second_interrupt_stops_at_once(tmp_path):
    code = (
        "import os, signal, time\n"
        "from pipeline.common.signals import Interrupt\n"
        "with Interrupt() as i:\n"
        "    i.hold()\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), timeout=20)
    assert done.stdout == b"noted\n"
    assert done.returncode == -signal.SIGINT


def test_no_progress_ends_the_job_with_its_own_status_and_says_where_it_stood(job):
    code = (
        "import sys, time\n"
        "import pipeline.job.requests as r\n"
        "from pipeline.__main__ import main\n"
        "write = r.completion_row\n"
        "def hang(*a):\n"
        "    r.completion_row = lambda *a: time.sleep(60)\n"
        "    return write(*a)\n"
        "r.completion_row = hang\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *job("outputs", "watchdog_sec=1")],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == ExitStatus.STALLED
    assert "No progress for 1 s after step" in done.stderr
    log = (job_folder(job("outputs", "watchdog_sec=1")) / "pipeline.log").read_text()
    assert "in write" in log  # the thread that hangs, and where
    assert len(texts(job())) == 1


def test_a_process_that_is_suspended_has_not_stalled(server, job):
    slow = job("outputs", "watchdog_sec=1")
    pid = server.start(slow)
    wait_for(has_rows(slow))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(pid, signal.SIGCONT)
    assert server.wait() == 0


def test_a_job_on_a_full_disk_says_so_and_goes_on_when_there_is_room(server, job, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        full = command(job("small"))
        assert full.returncode == 3
        assert "No space left on device" in full.stderr
        assert "Traceback" not in full.stderr
        assert 0 < len(texts(job("small"))) < 120
        again = command(job("small"))  # still no room
        assert again.returncode == 3
        assert "Traceback" not in again.stderr
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        server.start(job("small"))
        assert server.wait() == 0
        server.start(job("quiet"))
        assert server.wait() == 0
        assert texts(job("small")) == texts(job("quiet"))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_killed_cell_is_a_failed_cell_with_its_reason_and_the_others_go_on(tiny_dir, tmp_path, job):
    cells = job("sweep", "generation.seed=1,2,3")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "-m", *cells],
        stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    first, second, third = (job("sweep", f"generation.seed={seed}") for seed in (1, 2, 3))
    wait_for(has_rows(second))
    finished = JobPaths(job_folder(first)).rows.read_bytes()
    os.kill(pid_of_child(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "killed (SIGKILL)" in said
    assert JobPaths(job_folder(first)).rows.read_bytes() == finished
    assert len(outputs(first)) == len(outputs(third)) == 120
    assert len(outputs(second)) < 120


def test_a_sweep_hands_a_signal_on_and_stops(job):
    cells = job("sweep", "generation.seed=1,2")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "-m", *cells],
        stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    first = job("sweep", "generation.seed=1")
    wait_for(has_rows(first))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitStatus.RUN_AGAIN, said
    assert 0 < len(texts(first)) < 120
    assert not JobPaths(job_folder(job("sweep", "generation.seed=2"))).rows.exists()


def pid_of_child(parent):
    return psutil.Process(parent).children()[0].pid


def test_a_hang_up_stops_a_job_unless_it_is_ignored(server, job):
    pid = server.start(job())
    wait_for(has_rows(job()))
    os.kill(pid, signal.SIGHUP)
    assert server.wait() == ExitStatus.RUN_AGAIN
    assert 0 < len(texts(job())) < 120
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *job("kept")], stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for(has_rows(job("kept")))
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(texts(job("kept"))) == 120


def test_a_terminal_that_closes_stops_a_sweep_and_its_cell(job):
    """A real terminal: when its other end is closed, the system sends SIGHUP, and every write to it is an error."""
    cells = job("sweep", "generation.seed=1,2")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "-m", *cells],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    first = job("sweep", "generation.seed=1")
    drain = threading.Thread(target=read_all, args=(ours, stop := threading.Event()))
    drain.start()
    wait_for(has_rows(first))
    cell = psutil.Process(pid_of_child(process.pid))
    stop.set()
    drain.join()
    os.close(ours)
    assert process.wait(60) == ExitStatus.RUN_AGAIN
    wait_for(lambda: not cell.is_running() or cell.status() == psutil.STATUS_ZOMBIE, 20)
    assert 0 < len(texts(first)) < 120
    assert not JobPaths(job_folder(job("sweep", "generation.seed=2"))).rows.exists()


def test_a_terminal_that_closes_is_nothing_to_a_job_that_ignores_it(job):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *job()],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_IGN), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(theirs)
    drain = threading.Thread(target=read_all, args=(ours, stop := threading.Event()))
    drain.start()
    wait_for(has_rows(job()))
    stop.set()
    drain.join()
    os.close(ours)
    assert process.wait(60) == 0
    assert len(texts(job())) == 120


@pytest.mark.parametrize("streams", ["2>&1 | head -1", ">&- 2>&-", "<&- 2>/dev/full", "2>&1 | true"])
def test_streams_that_cannot_be_written_are_nothing_to_a_job(job, streams):
    line = shlex.join([sys.executable, "-m", "pipeline", *job()])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {streams}"], env=environment(), cwd=ROOT)
    assert done.returncode == 0
    assert len(texts(job())) == 120


def read_all(terminal, stop):
    while not stop.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
