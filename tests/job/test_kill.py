"""Kill a job at any moment, run the same command again: every row once, the texts those of a quiet run."""

import contextlib
import json
import os
import random
import signal
import time

import jsonschema
import pytest
from conftest import tiny_tokenizer
from engine.test_every_architecture import build
from job_helper import JobServer, arguments, outputs, texts, write_rows

from pipeline.config.compose import job_folder
from pipeline.job.paths import JobPaths

KILLS = 24
ROWS_OF_JOB = 200


@pytest.fixture(scope="module")
def server():
    server = JobServer()
    yield server
    server.close()


def prompt_rows():
    """Texts of many lengths; some rows with samples, some that fail."""
    rows = [{"id": f"r{i}", "prompt": "word " * (i % 23) + f"number {i}"} for i in range(ROWS_OF_JOB)]
    for i, row in enumerate(rows):
        row["generation"] = {"max_new_tokens": 4 + 3 * (i % 11)}
    rows[7]["generation"] = rows[60]["generation"] = {"n": 3}
    rows[11]["prompt"] = "x " * 2000
    rows[150]["messages"] = "both forms"
    return rows


@pytest.mark.parametrize("generation", ["greedy", "sample"])
def test_no_kill_loses_repeats_or_changes_a_row(server, tiny_dir, tmp_path, generation):
    prompts = write_rows(tmp_path / "prompts.jsonl", prompt_rows())
    settings = [f"generation={generation}", "generation.max_new_tokens=24", "engine.max_rows=8"]
    quiet = arguments(tiny_dir, prompts, tmp_path / "quiet", *settings)
    disturbed = arguments(tiny_dir, prompts, tmp_path / "disturbed", *settings)
    started = time.monotonic()
    server.start(quiet)
    first_row_sec = wait_for_rows(JobPaths(job_folder(quiet)).rows, started)
    assert server.wait() == 1  # two rows fail

    seed = random.randrange(1 << 32)
    print(f"seed {seed}, first row after {first_row_sec:.2f} s")
    moments = kill_again_and_again(server, disturbed, first_row_sec, random.Random(seed))
    print(moments)
    assert sum(moments.values()) >= KILLS
    assert moments["before the model was loaded"] >= 1
    assert moments["after rows were written"] >= KILLS // 3
    server.start(disturbed)
    assert server.wait() == 1
    assert texts(disturbed) == texts(quiet)
    assert len(texts(quiet)) == ROWS_OF_JOB + 2 * 2
    server.start(disturbed)
    assert server.wait() == 1
    assert texts(disturbed) == texts(quiet)


def test_a_killed_job_with_a_schema_goes_on_and_each_whole_answer_validates(server, tiny_dir, tmp_path):
    item = {"enum": ["cat", "학교", 1.5, {"a": [None]}]}
    schema = {"type": "array", "items": item, "minItems": 2, "maxItems": 4}
    rows = [{"id": f"r{i}", "prompt": f"number {i}"} for i in range(60)]
    for row in rows[::5]:
        row["generation"] = {"choice": ["yes", "no", "none"], "label_logprobs": True, "temperature": 0}
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    shape = f"generation.json_schema={write_rows(tmp_path / 'schema.json', [schema])}"
    settings = [shape, "generation=sample", "generation.max_new_tokens=40", "engine.max_rows=4"]
    quiet = arguments(tiny_dir, prompts, tmp_path / "quiet", *settings)
    killed = arguments(tiny_dir, prompts, tmp_path / "killed", *settings)
    server.start(quiet)
    assert server.wait() == 0
    written = JobPaths(job_folder(killed)).rows
    for quota in (1, 7000):  # bytes, of about 15,000
        pid = server.start(killed)
        started = time.monotonic()
        while size_of(written) < quota and time.monotonic() - started < 60:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert len(written.read_bytes().splitlines()) < len(rows)
    server.start(killed)
    assert server.wait() == 0
    made = outputs(killed)
    assert sorted(row["id"] for row in made) == sorted(row["id"] for row in rows)
    whole = [json.loads(row["completion"]) for row in made if row["complete"] and "label_logprobs" not in row]
    assert len(whole) > len(rows) // 4  # a random model writes blanks until it is cut
    for answer in whole:
        jsonschema.validate(answer, schema)
    assert texts(killed) == texts(quiet)


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
def test_a_killed_job_on_a_recurrent_model_goes_on_and_takes_the_planned_memory(server, tmp_path):
    folder = tmp_path / "bamba"
    build("bamba").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"id": f"r{i}", "prompt": "word " * (i % 5) + "number"} for i in range(24)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = ["generation.max_new_tokens=12", "engine.max_rows=4"]
    quiet = arguments(folder, prompts, tmp_path / "quiet", *settings)
    killed = arguments(folder, prompts, tmp_path / "killed", *settings)
    server.start(quiet)
    assert server.wait() == 0
    pid = server.start(killed)
    wait_for_rows(JobPaths(job_folder(killed)).rows, time.monotonic())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    server.start(killed)
    assert server.wait() == 0
    assert texts(killed) == texts(quiet)
    assert len(texts(quiet)) == len(rows)
    memory = json.loads((job_folder(quiet) / "stats.json").read_text())["memory"]
    for part in ("footprint_bytes", "kv_cache_bytes"):
        assert memory["predicted"][part] == memory["measured"][part]


def wait_for_rows(path, started):
    """Seconds until the job has written something."""
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() - started < 60
        time.sleep(0.005)
    return time.monotonic() - started


def kill_again_and_again(server, overrides, first_row_sec, chance):
    """Start the job and kill it, KILLS times: after a random time, or sooner once it has written some rows.

    On a busy machine a job may be done before its kill: that is none, and its rows are to be made again.
    """
    moments = {"before the model was loaded": 0, "before the first row": 0, "after rows were written": 0}
    paths = JobPaths(job_folder(overrides))
    rows, manifest = paths.rows, paths.manifest
    number = -1
    while (number := number + 1) < KILLS:
        size, changed = size_of(rows), changed_at(manifest)
        quota = size + chance.randrange(1, 1500)  # bytes; so the job is not done before the last kill
        latest_sec = chance.uniform(0, first_row_sec) if number % 3 else 60.0
        started = time.monotonic()
        pid = server.start(overrides)
        while time.monotonic() - started < latest_sec and size_of(rows) < quota:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if (status := server.wait()) != -signal.SIGKILL:
            assert status == 1
            os.truncate(rows, size)
            number -= 1
        elif size_of(rows) > size:
            moments["after rows were written"] += 1
        elif changed_at(manifest) != changed:
            moments["before the first row"] += 1
        else:
            moments["before the model was loaded"] += 1
    return moments


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def changed_at(path):
    return path.stat().st_mtime_ns if path.exists() else None
