"""engine=vllm, with the real vLLM: the same rows, errors and texts as our own engine, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from job_helper import ROOT, environment, outputs, write_rows

from pipeline.commands.door import main
from pipeline.common.exit_status import ExitStatus
from pipeline.common.gpu import Gpu
from pipeline.config.compose import job_folder
from pipeline.engine.vllm.process import VllmProcess
from pipeline.job.counts import read_counts
from pipeline.job.paths import JobPaths
from pipeline.job.stored import read_manifest, read_stats
from pipeline.job.vllm_ready import VllmReady
from pipeline.report.jobs import find_jobs
from pipeline.report.prompts import align
from pipeline.report.summary import summarize
from pipeline.report.table import columns

JOBS = ROOT / "jobs"
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
OWN = [
    {"id": "three", "prompt": "Tell a joke.", "generation": {"n": 3, "temperature": 0.9, "top_k": 40}},
    {"id": "stop", "prompt": "Count: one, two, three", "generation": {"stop": ["Two"]}},
    {"id": "end", "prompt": "Hello", "generation": {"stop": ["<|im_end|>"]}},
    {"id": "on", "prompt": "Hi", "generation": {"ignore_eos": True, "max_new_tokens": 30}},
    {"id": "logprobs", "prompt": "Why did the network cross the road?", "generation": {"logprobs": 2}},
    {"id": "penalty", "prompt": "Say ha ha ha", "generation": {"repetition_penalty": 1.3}},
    {"id": "json", "prompt": "A person as JSON", "generation": {"json_schema": PERSON}},
    {"id": "cut", "prompt": "A person as JSON", "generation": {"json_schema": PERSON, "max_new_tokens": 3}},
    {"id": "regex", "prompt": "A number?", "generation": {"regex": "[0-9]{3}"}},
    {"id": "choice", "prompt": "Is water wet?", "generation": {"choice": ["yes", "no"]}},
    {"id": "grammar", "prompt": "Is water wet?", "generation": {"grammar": 'start: "may" "be"'}},
    {"id": "hot", "prompt": "x", "generation": {"temperature": 5}},
    {"id": "orders", "prompt": "x", "generation": {"temperature": 1, "min_p": 0.1, "top_p": 0.5}},
    {"id": "labels", "prompt": "x", "generation": {"choice": ["a", "b"], "label_logprobs": True}},
    {"id": "long", "prompt": "x " * 9000},
]
REFUSED = {
    "hot": "vLLM takes 0 (greedy), or 0.01 to 2",
    "orders": "applies them in the other order",
    "labels": "does not compare choices",
}
DRAWN = {"three", "request-3", "good-overrides", *REFUSED}


def settings(model, prompts, out, *more):
    return [
        f"model.name={model}", f"prompts={prompts}", f"outputs_dir={out}", "quant=fp32", "token_ids=true",
        "generation.max_new_tokens=24", *more,
    ]  # fmt: skip


VLLM = ["engine=vllm", "engine.extra={enforce_eager:true}"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The jokes, OpenAI's batch, the bad rows, and rows with settings of their own."""
    files = ("jokes.jsonl", "openai_batch.jsonl", "bad_rows.jsonl")
    lines = [line for name in files for line in (JOBS / name).read_bytes().splitlines()]
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [*lines, *OWN])


@pytest.fixture(scope="module")
def both(smollm2_dir, prompts, tmp_path_factory):
    """The command lines of a job by our own engine and of one by vLLM, both done."""
    out = tmp_path_factory.mktemp("out")
    own, other = settings(smollm2_dir, prompts, out), settings(smollm2_dir, prompts, out, *VLLM)
    for job in (own, other):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *job],
            capture_output=True, text=True, env=environment(), cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == ExitStatus.SOME_FAILED, done.stderr
    return own, other


def by_id(job):
    found = {(row["id"], row["sample"]): row for row in outputs(job)}
    assert len(found) == len(outputs(job)), "a row was written twice"
    return found


def test_every_row_has_the_text_shape_or_error_that_our_own_engine_gives_it(both):
    own, other = map(by_id, both)
    assert own.keys() == other.keys()
    kept = ("completion", "token_ids", "finish_reason", "usage", "complete", "error", "metadata", "key")
    for key in own:
        if key[0] not in DRAWN:
            assert [other[key].get(name) for name in kept] == [own[key].get(name) for name in kept], key


def test_samples_of_a_row_differ_and_end_as_they_should(both):
    other = by_id(both[1])
    samples = [other["three", sample] for sample in range(3)]
    assert len({row["completion"] for row in samples}) == 3
    assert all(row["error"] is None and row["usage"]["completion_tokens"] <= 24 for row in samples)
    assert all(other["request-3", sample]["completion"] for sample in range(2))


def test_what_vllm_would_take_as_another_setting_is_refused_by_file_and_line(both, prompts):
    other = by_id(both[1])
    lines = prompts.read_bytes().splitlines()
    for row_id, said in REFUSED.items():
        line = next(number for number, line in enumerate(lines, 1) if f'"{row_id}"'.encode() in line)
        assert f"{prompts}:{line}: generation." in other[row_id, 0]["error"]
        assert said in other[row_id, 0]["error"]


def test_logprobs_are_those_of_our_own_engine(both):
    own, other = (by_id(job)["logprobs", 0]["logprobs"] for job in both)
    assert [item["token_id"] for item in other] == [item["token_id"] for item in own]
    for mine, theirs in zip(own, other, strict=True):
        assert theirs["logprob"] == pytest.approx(mine["logprob"], abs=1e-3)
        assert [top["token_id"] for top in theirs["top"]] == [top["token_id"] for top in mine["top"]]


def test_the_folder_says_what_computed_and_what_it_reserved(both):
    paths = JobPaths(job_folder(both[1]))
    assert "-greedy+vllm-" in paths.folder.name
    engine, stats = read_manifest(paths)["engine"], read_stats(paths)
    assert engine["name"] == stats["engine"]["name"] == "vllm"
    assert engine["versions"]["vllm"]
    assert "text may depend on the rows beside it" in engine["differs"]
    assert read_manifest(JobPaths(job_folder(both[0])))["engine"] == {"name": "default"}
    memory, counts = stats["memory"], stats["engine"]
    assert 0 < counts["peak_kv_cache_bytes"] <= counts["reserved_kv_cache_bytes"]
    assert memory["measured"]["kv_cache_bytes"] == pytest.approx(
        memory["predicted"]["kv_cache_bytes"], rel=0.03
    )
    assert memory["run_peak"]["host_bytes"] > memory["bare_bytes"] + memory["predicted"]["footprint_bytes"]
    assert 0 < counts["peak_rows_in_flight"] <= 128
    assert stats["others_mean_cores"] is not None
    assert "vLLM" in paths.engine_log.read_text() or "vllm" in paths.engine_log.read_text()


def test_engines_are_compared_side_by_side(both, tmp_path):
    folder = job_folder(both[0]).parent
    assert main(["score", str(folder), f"baseline={job_folder(both[0])}"]) == ExitStatus.DONE
    jobs = find_jobs([folder])
    records = summarize(jobs, align(jobs), job_folder(both[0]))
    assert {record["engine"]: record["label"] for record in records} == {"default": "default", "vllm": "vllm"}
    shown = {column.name for column in columns(records)}
    assert "engine" not in shown  # the label says it
    by_engine = {record["engine"]: record for record in records}
    assert by_engine["vllm"]["scores"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert by_engine["vllm"]["memory"]["parts"]["KV cache"] > 0


class Job:
    """A job by vLLM in a process of its own."""

    def __init__(self, overrides):
        self.paths = JobPaths(job_folder(overrides))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *overrides],
            stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip

    def wait_for_more(self):
        """Wait until it has written a row; return vLLM's process."""
        before = read_counts(self.paths.folder).done
        while read_counts(self.paths.folder).done == before:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        [worker] = psutil.Process(self.process.pid).children()
        return worker

    def end(self):
        said = self.process.communicate(timeout=300)[1]
        return self.process.returncode, said


def test_each_row_is_there_once_whichever_process_is_killed(smollm2_dir, tmp_path):
    rows = [{"id": f"r{i}", "prompt": f"Count to {i}."} for i in range(40)]
    rows[7]["generation"] = {"n": 3, "temperature": 0.8}
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    more = ["engine.max_rows=2", "generation.max_new_tokens=16"]
    job = settings(smollm2_dir, prompts, tmp_path / "out", *VLLM, *more)

    running = Job(job)
    os.kill(running.wait_for_more().pid, signal.SIGKILL)
    status, said = running.end()
    assert status == ExitStatus.FAILED
    assert "vLLM's process has ended (killed (SIGKILL)" in said
    assert "the same command goes on" in said

    running = Job(job)
    worker = running.wait_for_more()
    running.process.kill()
    running.end()
    assert not psutil.wait_procs([worker], timeout=30)[1]

    running = Job(job)
    worker = running.wait_for_more()
    worker.send_signal(signal.SIGTERM)  # as a scheduler does to every process
    running.process.send_signal(signal.SIGTERM)
    status, said = running.end()
    assert status == ExitStatus.RUN_AGAIN, said
    assert not worker.is_running()

    status, said = Job(job).end()
    assert status == ExitStatus.DONE, said
    assert set(by_id(job)) == {(f"r{i}", 0) for i in range(40)} | {("r7", 1), ("r7", 2)}
    assert all(row["error"] is None for row in outputs(job))
    assert main(job) == ExitStatus.DONE  # and there is nothing to do


def test_the_gpus_of_a_job_are_those_that_vllms_process_tells_of(tmp_path):
    told = {
        "index": 0, "name": "H100", "total_bytes": 80, "allocated_bytes": 3, "reserved_bytes": 4,
        "peak_allocated_bytes": 5, "peak_reserved_bytes": 6, "outside_bytes": 7,
    }  # fmt: skip
    line = json.dumps({"progress": {"gpus": [told]}})
    python = tmp_path / "python"  # says what a process on a GPU says
    python.write_text(f"#!/bin/sh\necho '{line}'\nread line\n")
    python.chmod(0o755)
    process = VllmProcess(str(python), tmp_path / "engine.log")
    process.receive()
    card = {"backend": "cuda", "name": "H100", "total_bytes": 80, "capability": [9, 0], "uuid": "GPU-1"}
    ready = VllmReady(
        None,
        False,
        {},
        None,
        None,
        process,
        {"device": "cuda"},
        {},
        {"devices": json.loads(json.dumps([card]))},
    )
    assert ready.gpus == (Gpu("cuda", "H100", 80, None, (9, 0), "GPU-1"),)
    assert ready.held_bytes() == 3
    assert [memory.peak_allocated_bytes for memory in ready.device_memory()] == [5]
    process.close()
    assert VllmReady(None, False, {}, None, None, process, {}, {}, {"devices": []}).gpus == ()
