"""One job in several processes: every row once, whichever of them dies, and the folder as after a merge."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from job_helper import ROOT, arguments, environment, outputs, run_job, texts, write_rows
from machines import H100, T4

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError
from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import job_folder, read_config
from pipeline.job.counts import read_counts
from pipeline.job.devices import find_devices
from pipeline.job.merge import is_merged
from pipeline.job.paths import JobPaths

ROWS = 240


def prompt_rows():
    rows = [{"id": f"r{i}", "prompt": "word " * (i % 23) + f"number {i}"} for i in range(ROWS)]
    rows[7]["generation"] = {"n": 3}
    rows[12]["prompt"] = "x " * 2000  # which the model cannot read
    return rows


class Parent:
    """A job on two devices that are halves of the CPU."""

    def __init__(self, overrides):
        self.folder = job_folder(overrides)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *overrides, "devices=2", "model.device_map=cpu"],
            stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip

    def done(self):
        return sum(read_counts(JobPaths(self.folder).shard(i, 2)).done for i in range(2))

    def wait_for(self, rows):
        """Wait until so many are written; return the processes that write them."""
        while self.done() < rows:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)
        return psutil.Process(self.process.pid).children()

    def end(self):
        said = self.process.communicate(timeout=120)[1]
        return self.process.returncode, said


def test_rows_are_there_once_whatever_is_stopped_or_killed(tiny_dir, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", prompt_rows())
    settings = ["generation=sample", "generation.max_new_tokens=24", "engine.max_rows=2"]
    alone = arguments(tiny_dir, prompts, tmp_path / "alone", *settings)
    shared = arguments(tiny_dir, prompts, tmp_path / "shared", *settings)
    assert run_job(alone) == ExitStatus.SOME_FAILED

    parent = Parent(shared)
    children = parent.wait_for(10)
    parent.process.send_signal(signal.SIGTERM)
    status, said = parent.end()
    assert (status, "Stopped by SIGTERM" in said) == (ExitStatus.RUN_AGAIN, True)
    assert len(children) == 2
    assert not any(map(psutil.pid_exists, (child.pid for child in children)))

    parent = Parent(shared)
    children = parent.wait_for(parent.done() + 10)
    parent.process.kill()
    parent.end()
    assert not psutil.wait_procs(children, timeout=10)[1]  # killed with it
    assert not JobPaths(parent.folder).rows.exists()

    parent = Parent(shared)
    os.kill(parent.wait_for(parent.done() + 10)[0].pid, signal.SIGKILL)
    status, said = parent.end()
    assert (status, "its process ended (killed (SIGKILL)" in said) == (ExitStatus.SOME_FAILED, True)
    assert texts(shared) == texts(alone)
    assert [(row["index"], row["sample"]) for row in outputs(shared)] == sorted(
        (row["index"], row["sample"]) for row in outputs(alone)
    )
    assert is_merged(parent.folder)
    assert JobPaths(parent.folder).stats.exists()


def test_when_every_process_fails_the_error_says_what_the_last_one_said(tiny_dir, tmp_path, capfd):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": 1}, {"prompt": 2}])
    job = arguments(tiny_dir, prompts, tmp_path / "out", "devices=2", "model.device_map=cpu", "on_error=fail")
    assert main(job) == ExitStatus.FAILED
    said = capfd.readouterr().err
    assert "no process is left" in said
    assert f"{prompts}:" in said.partition("no process is left")[2]


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (["devices=2"], "no NVIDIA GPU is here"),
        (["devices=all", "model.device_map=cpu"], "one CPU"),
        (["devices=2", "model.device_map=cuda:1"], "a device each"),
        (["devices=2", "model.device_map=cpu", "prompts=-"], "once only"),
        (["devices=2", "shard=0/2"], "both split"),
        (["devices=none"], "must be null, all, or how many"),
    ],
)
def test_devices_that_make_no_sense_are_refused(settings, wrong, tmp_path):
    with pytest.raises(ConfigError, match=wrong):
        find_devices(read_config(["prompts=p.jsonl", *settings]))


@pytest.mark.parametrize(
    ("listed", "asked", "names"),
    [
        (None, "all", ["0", "1", "2"]),
        (None, "2", ["0", "1"]),
        ("5, GPU-1f22a253,7", "2", ["5", "GPU-1f22a253"]),
    ],
)
def test_each_process_sees_one_gpu_of_those_that_the_job_may_use(monkeypatch, listed, asked, names):
    monkeypatch.setattr("pipeline.job.devices.visible_gpus", lambda: (T4, T4, H100))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    devices = find_devices(read_config(["prompts=p.jsonl", f"devices={asked}"]))
    assert [device.environment for device in devices] == [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    with pytest.raises(ConfigError, match="3 GPUs are here"):
        find_devices(read_config(["prompts=p.jsonl", "devices=4"]))


def test_cores_and_memory_are_parted(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = read_config(
        ["prompts=p.jsonl", "devices=2", "model.device_map=cpu", "engine.memory_fraction=0.8"]
    )
    devices = find_devices(config)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [device.environment for device in devices] == [{"OMP_NUM_THREADS": threads}] * 2
    assert [device.overrides for device in devices] == [("engine.memory_fraction=0.4",)] * 2


def test_results_of_one_process_are_not_written_over(tiny_dir, tmp_path, capfd):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    job = arguments(tiny_dir, prompts, tmp_path / "out")
    assert run_job(job) == ExitStatus.DONE
    before = texts(job)
    assert main([*job, "devices=2", "model.device_map=cpu"]) == ExitStatus.FAILED
    assert "run without shards" in capfd.readouterr().err
    assert texts(job) == before
