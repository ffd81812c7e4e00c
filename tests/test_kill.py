"""Kill a job at any moment, run the same command again: every row once, the texts those of a quiet run."""

import os
import random
import signal
import time

import pytest
from job_helper import JobServer, arguments, texts, write_rows

from pipeline.compose import job_folder
from pipeline.results import MANIFEST, ROWS

KILLS = 24
ROWS_OF_JOB = 240


@pytest.fixture(scope="module")
def server():
    server = JobServer()
    yield server
    server.close()


def prompt_rows():
    """Texts of many lengths; some rows with samples, some that fail."""
    rows = [{"id": f"r{i}", "prompt": "word " * (i % 23) + f"number {i}"} for i in range(ROWS_OF_JOB)]
    rows[7]["generation"] = rows[60]["generation"] = {"n": 3}
    rows[11]["prompt"] = "x " * 2000
    rows[200]["messages"] = "both forms"
    return rows


@pytest.mark.parametrize("generation", ["greedy", "sample"])
def test_no_kill_loses_repeats_or_changes_a_row(server, tiny_dir, tmp_path, generation):
    prompts = write_rows(tmp_path / "prompts.jsonl", prompt_rows())
    settings = [f"generation={generation}", "generation.max_new_tokens=24", "engine.max_rows=8"]
    quiet = arguments(tiny_dir, prompts, tmp_path / "quiet", *settings)
    disturbed = arguments(tiny_dir, prompts, tmp_path / "disturbed", *settings)
    started = time.monotonic()
    server.start(quiet)
    first_row_sec = wait_for_rows(job_folder(quiet) / ROWS, started)
    assert server.wait() == 1  # two rows fail
    whole_sec = time.monotonic() - started

    seed = random.randrange(1 << 32)
    print(f"seed {seed}, first row after {first_row_sec:.2f} s, all after {whole_sec:.2f} s")
    moments = kill_again_and_again(server, disturbed, first_row_sec, whole_sec, random.Random(seed))
    print(moments)
    assert sum(moments.values()) >= KILLS
    assert moments["before the first row"] >= 3
    assert moments["after rows were written"] >= 3
    server.start(disturbed)
    assert server.wait() == 1
    assert texts(disturbed) == texts(quiet)
    assert len(texts(quiet)) == ROWS_OF_JOB + 2 * 2
    server.start(disturbed)
    assert server.wait() == 1
    assert texts(disturbed) == texts(quiet)


def wait_for_rows(path, started):
    """Seconds until the job has written something."""
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() - started < 60
        time.sleep(0.005)
    return time.monotonic() - started


def kill_again_and_again(server, overrides, first_row_sec, whole_sec, chance):
    """Start the job and kill it, KILLS times, at moments so early that it cannot be done before the last."""
    moments = {"before loading": 0, "before the first row": 0, "after rows were written": 0}
    rows, manifest = job_folder(overrides) / ROWS, job_folder(overrides) / MANIFEST
    latest_sec = first_row_sec + 0.5 * (whole_sec - first_row_sec) / KILLS
    for number in range(KILLS):
        size = rows.stat().st_size if rows.exists() else 0
        changed = manifest.stat().st_mtime_ns if manifest.exists() else None
        started = time.monotonic()
        pid = server.start(overrides)
        if number % 3 == 0:  # surely while rows are written
            while not rows.exists() or rows.stat().st_size == size:
                assert time.monotonic() - started < 60
                time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, latest_sec))
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        if rows.exists() and rows.stat().st_size > size:
            moments["after rows were written"] += 1
        elif manifest.exists() and manifest.stat().st_mtime_ns != changed:
            moments["before the first row"] += 1
        else:
            moments["before loading"] += 1
    return moments
