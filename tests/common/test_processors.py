"""What others do with the processors is told from what this process does, and named."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from job_helper import arguments, job_folder, run_job, write_rows

from pipeline.common.processors import OthersWork, crowded, usable_cores
from pipeline.views.machine import State, check_load

LOOP = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]


@pytest.fixture
def neighbour() -> Iterator[None]:
    """A busy loop on one core, to which this process is bound too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    with subprocess.Popen(LOOP, stdout=subprocess.PIPE) as loop:
        assert loop.stdout
        loop.stdout.readline()
        try:
            yield
        finally:
            loop.kill()
            os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("neighbour")
def test_a_busy_neighbour_is_seen_and_named():
    others = OthersWork()
    time.sleep(1)
    assert others.busy_cores() == pytest.approx(1, abs=0.3)
    assert usable_cores() == [min(os.sched_getaffinity(0))]
    (check,) = check_load()
    assert check.state is State.yellow
    assert "of 1 core busy" in check.found


def test_own_work_is_no_others():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        others, until = OthersWork(), time.process_time() + 1
        started = time.monotonic()
        while time.process_time() < until:
            pass
        elapsed = time.monotonic() - started
        # What the system did not give to this process it gave to others.
        assert others.busy_cores() == pytest.approx(1 - 1 / elapsed, abs=0.15)
    finally:
        os.sched_setaffinity(0, before)


def test_cores_that_nobody_wants_are_no_matter(monkeypatch):
    monkeypatch.setattr("pipeline.common.processors.usable_cores", lambda: [0, 1, 2, 3])
    assert crowded(1.9, 2) is None
    assert crowded(2.2, 2) is None
    assert crowded(2.4, 2) == "other programs keep 2.4 of 4 cores busy, and a job has 2 threads"
    assert str(crowded(4.0, 1)).endswith("a job has 1 thread")
    assert crowded(0.1, 64) is None
    assert crowded(0.4, 64) is not None


@pytest.mark.usefixtures("neighbour")
def test_a_job_beside_a_busy_neighbour_says_so_and_notes_it(tiny_dir, tmp_path, capsys):
    rows = [{"prompt": f"a {i}"} for i in range(400)]
    job = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out")
    job[-1] = "generation.max_new_tokens=200"
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # two on one core would wait for each other, and how long depends on tests before
    try:
        assert run_job(job) == 0
    finally:
        torch.set_num_threads(threads)
    assert "This machine is busy: other programs keep" in capsys.readouterr().err
    stats = json.loads((job_folder(job) / "stats.json").read_text())
    assert 0.2 < stats["others_mean_cores"] <= 1
