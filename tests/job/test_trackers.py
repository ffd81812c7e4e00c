"""Trackers for real, into local files: a job is one run, however often it was killed, and never fails for one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_helper import JobServer, arguments, command, environment, outputs, run_job, write_rows

from pipeline.common.exit_status import ExitStatus
from pipeline.config.compose import job_folder, sweep_cells
from pipeline.config.schema import Tracker
from pipeline.job import tracker
from pipeline.job.folder import JobFolder
from pipeline.job.paths import JobPaths, read_json
from pipeline.job.tracker import Telling
from pipeline.job.trackers.process import known_runs
from pipeline.job.trackers.tracked import TrackedJob
from pipeline.report.jobs import find_jobs
from pipeline.slurm.state import find_folders

ROWS = [{"id": f"r{i}", "prompt": "word " * (i % 9) + str(i)} for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def local(tmp_path_factory):
    """Local files of MLflow and Weights & Biases, for which no server is needed."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for its tables it would take seconds to make
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(folder / "data"))
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def server(local):
    server = JobServer()
    yield server
    server.close()


def job(model, tmp_path, *more):
    return arguments(model, write_rows(tmp_path / "questions.jsonl", ROWS), tmp_path / "outputs", *more)


def one_run(store):
    """What MLflow's files say of the only run in them."""
    (meta,) = store.glob("*/*/meta.yaml")
    folder = meta.parent
    params = {path.name: path.read_text() for path in (folder / "params").iterdir()}
    metrics = {path.name: path.read_text().split()[-2] for path in (folder / "metrics").iterdir()}
    kept = {str(path.relative_to(folder / "artifacts")) for path in (folder / "artifacts").rglob("*")}
    experiment = (folder.parent / "meta.yaml").read_text()
    return meta.read_text(), experiment, params, metrics, kept


def test_a_killed_and_resumed_job_is_one_run_of_mlflow_with_config_stats_and_report(
    server, local, tiny_dir, tmp_path
):
    line = job(tiny_dir, tmp_path, "tracker=mlflow", "report=true", "submit.environment.KEY=t0ken-text")
    paths = JobPaths(job_folder(line))
    pid = server.start([*line, "engine.max_rows=2"])
    while not (paths.rows.exists() and paths.rows.stat().st_size):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert 0 < paths.rows.read_bytes().count(b"\n") < len(ROWS)
    server.start(line)
    assert server.wait() == 0
    meta, experiment, params, metrics, kept = one_run(local / "mlruns")
    stats = read_json(paths.stats)
    assert "status: 3\n" in meta  # finished
    assert f"run_name: {paths.folder.name}\n" in meta
    assert "name: questions\n" in experiment
    assert params["model.name"] == str(tiny_dir)
    assert params["generation.max_new_tokens"] == "8"
    artifacts = [path for path in (local / "mlruns").rglob("*") if path.is_file()]
    assert not [
        path for path in artifacts if b"t0ken-text" in path.read_bytes()
    ]  # a variable that may be a token
    assert read_json(paths.manifest)["command"][-1].endswith("submit.environment.KEY=…")
    assert float(metrics["rows.done"]) == len(ROWS)
    assert float(metrics["tokens_per_sec"]) == pytest.approx(stats["tokens_per_sec"])
    assert float(metrics["rows_done"]) > 0
    assert {"stats.json", "manifest.json", "report/report.html", "report/plots/memory.png"} <= kept
    assert find_folders(tmp_path / "outputs") == [paths.folder]  # nothing of a tracker's looks like a job
    assert len(find_jobs([tmp_path / "outputs"])) == 1


def test_cells_are_runs_of_wandb_in_the_prompt_sets_project(server, tiny_dir, tmp_path):
    sweep = [word for word in job(tiny_dir, tmp_path, "tracker=wandb") if word != "quant=fp32"]
    for cell in sweep_cells([*sweep, "quant=fp32,bf16"]):
        server.start(cell)
        assert server.wait() == 0
    runs = [wandb_records(path) for path in (tmp_path / "outputs").rglob("*.wandb")]
    assert len({run["run"][0].run_id for run in runs}) == 2
    assert {run["run"][0].project for run in runs} == {"questions"}
    formats = set()
    for run in runs:
        config = {item.key: json.loads(item.value_json) for item in run["run"][0].config.update}
        formats.add(config["quant.dtype"])
        last = {".".join(item.nested_key) or item.key: item.value_json for item in run["history"][-1].item}
        assert float(last["rows.done"]) == len(ROWS)
        assert {entry.path for entry in run["artifact"][0].manifest.contents} >= {
            "stats.json",
            "manifest.json",
        }
        assert run["exit"][0].exit_code == 0
    assert formats == {"float32", "bfloat16"}
    assert len(find_jobs([tmp_path / "outputs"])) == 2


def wandb_records(path):
    """The records of an offline run by their kind; the file has blocks of 32 KiB, as LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # alone, or the last part
            record = Record.FromString(whole)
            name, whole = record.WhichOneof("record_type"), b""
            found.setdefault(name, []).append(getattr(record, name))
    return found


def test_a_trackers_folder_that_cannot_be_made_costs_a_job_one_warning(tiny_dir, tmp_path, capsys):
    line = job(tiny_dir, tmp_path, "limit=4")
    assert run_job([*line, "limit=2"]) == 0
    JobPaths(Path(job_folder(line))).tracker.write_text("a file")
    assert run_job([*line, "tracker=mlflow"]) == 0
    assert len(outputs(line)) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Warning: tracker=mlflow was not told all: [Errno 17] File exists") == 1


def test_a_prompt_set_of_any_length_is_a_project(tiny_dir, tmp_path):
    prompts = write_rows(tmp_path / ("n" * 200 + ".jsonl"), ROWS[:1])
    line = arguments(tiny_dir, prompts, tmp_path / "outputs")
    assert run_job(line) == 0
    assert TrackedJob.read(JobPaths(Path(job_folder(line)))).experiment == "n" * 128  # all that wandb takes


def test_a_tracker_that_cannot_be_reached_costs_a_done_job_one_warning_without_its_password(
    tiny_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    line = job(tiny_dir, tmp_path, "tracker=mlflow")
    assert run_job(line) == 0
    assert len(outputs(line)) == len(ROWS)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Warning: tracker=mlflow was not told all: MlflowException: API request to") == 1
    assert "Connection refused" in said
    assert "secret" not in said + JobPaths(Path(job_folder(line))).tracker_log.read_text()


def test_a_tracker_that_goes_down_in_the_middle_is_told_of_once(tmp_path, monkeypatch):
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    paths = JobPaths(tmp_path / "questions" / "job")
    paths.tracker.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.job.trackers.process", "mlflow", str(paths.folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdin
        process.stdin.write('{"rows_done": 1}\n')
        process.stdin.flush()
        while not list(store.glob("*/*/metrics/rows_done")):
            time.sleep(0.02)
        shutil.rmtree(store)
        store.write_text("no folder")
        said, _ = process.communicate('{"rows_done": 2}\n{"rows_done": 3}\n"stopped"\n', timeout=60)
    assert process.returncode == 1
    assert said.count("\n") == 0
    assert "mlruns" in said


def test_a_note_of_runs_that_is_none_starts_a_new_run_and_is_told_of_once(tmp_path, monkeypatch):
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    paths = JobPaths(tmp_path / "questions" / "job")
    paths.tracker_run.mkdir(parents=True)
    command_line = [sys.executable, "-m", "pipeline.job.trackers.process", "mlflow", str(paths.folder)]
    said = [
        subprocess.run(
            command_line, input='"stopped"\n', capture_output=True, text=True, env=environment(), check=False
        ).stdout
        for _ in range(2)
    ]
    assert "run.json held no run's id: it is run.json.damaged-" in said[0]
    assert said[1] == ""
    (run,) = store.glob("*/*/meta.yaml")
    assert read_json(paths.tracker_run) == {"mlflow": run.parent.name}


@pytest.mark.parametrize("text", ["[]", "7", "torn", '{"mlflow": 5}', '{"mlflow": ["1"]}'])
def test_a_note_without_a_runs_id_is_moved_aside(text, tmp_path):
    noted = tmp_path / "run.json"
    assert known_runs(noted, "mlflow") == ({}, None)
    noted.write_text(text)
    known, lost = known_runs(noted, "mlflow")
    assert (known, str(lost).partition(" held")[0]) == ({}, str(noted))
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == text
    noted.write_text('{"wandb": "a"}')
    assert known_runs(noted, "mlflow") == ({"wandb": "a"}, None)


def test_one_that_never_answers_stops_no_row_and_is_given_up_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "EVERY_SEC", 0)
    monkeypatch.setitem(tracker.PATIENCE_SEC, "done", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, JobFolder(tmp_path / "job") as folder:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        telling = Telling(Tracker.mlflow, folder)
        started = time.monotonic()
        for rows in range(3000):  # more than a pipe holds
            telling.point(rows, rows, rows)
        assert time.monotonic() - started < 5
        telling.end("done")
    assert "tracker=mlflow was not told all: no answer in 0 s" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(tiny_dir, tmp_path):
    done = command(job(tiny_dir, tmp_path, "tracker=trackio"))
    assert done.returncode == ExitStatus.WRONG_CONFIG
    assert "tracker=trackio: is not installed. pip install 'llm-job-pipeline[trackio]'." in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_job_that_starts_anew_is_a_run_of_its_own(tmp_path):
    with JobFolder(tmp_path / "job") as folder:
        folder.tracker.mkdir()
        folder.tracker_run.write_text('{"mlflow": "1"}')
        folder.set_aside()
        assert not folder.tracker_run.exists()
    assert read_json(JobPaths(tmp_path / "job" / "run-1").tracker_run) == {"mlflow": "1"}
