"""`python -m pipeline` end to end, each job in a process of its own: what it writes, says and exits with."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.compose import job_folder

ROOT = Path(__file__).resolve().parents[2]
SURVIVES = {1, 9, 21, 37, 46, 47}  # the good lines of jobs/bad_rows.jsonl
BAD = sorted(set(range(1, 48)) - SURVIVES - {19, 20})  # 19 and 20 are blank

# Imports once what takes long, then runs each command line in a fork with its own terminal and folder.
SERVER = """
import json, os, sys
import pipeline.job.run
from pipeline.__main__ import main
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        os.environ["PWD"] = job["cwd"]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(job[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC * bool(number)), number)
        sys.stdin = os.fdopen(0)
        sys.argv = ["pipeline", *job["arguments"]]
        status = main()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """What a command line left behind."""

    status: int
    said: str
    rows: list[dict[str, Any]]
    folder: Path

    def completions(self) -> dict[str, Any]:
        return {row["id"]: row["completion"] for row in self.rows}


class Cli:
    def __init__(self, tmp: Path, model: Path) -> None:
        self._tmp, self._count = tmp, 0
        self.model = model
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Done:
        """Run a job on the tiny model in an empty folder."""
        self._count += 1
        cwd = self._tmp / f"run{self._count}"
        cwd.mkdir()
        (cwd.parent / f"in{self._count}").write_bytes(stdin)
        files = {n: str(cwd.parent / f"{n[3:]}{self._count}") for n in ("stdin", "stdout", "stderr")}
        own = [f"model.name={self.model}", f"outputs_dir={cwd / 'outputs'}", "generation.max_new_tokens=6"]
        line = [*own, *arguments]
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps({"arguments": line, "cwd": str(cwd), **files}) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        said = Path(files["stdout"]).read_text() + Path(files["stderr"]).read_text()
        assert "Traceback" not in said, said
        found = list(cwd.rglob("outputs.jsonl"))
        text = found[0].read_text(encoding="utf-8") if found else ""
        folder = found[0].parent if found else cwd
        return Done(status, said, [json.loads(row) for row in text.splitlines()], folder)

    def close(self) -> None:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Cli]:
    made = Cli(tmp_path_factory.mktemp("cli"), tiny_folder)
    yield made
    made.close()


def prompts(folder: Path, *rows: dict[str, Any], name: str = "mine.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"prompts={folder / name}"


def test_a_job_writes_a_row_for_each_prompt_its_stats_and_its_manifest(cli, tmp_path):
    row = {"id": "a", "prompt": "One?", "topic": "numbers", "answer": [1, {"x": None}]}
    chat = {"messages": [{"role": "user", "content": "학교?"}]}
    done = cli(prompts(tmp_path, row, chat))
    assert done.status == 0
    first, second = sorted(done.rows, key=lambda r: r["index"])
    assert set(first) == {
        "id", "index", "prompt", "sample", "completion", "finish_reason", "usage", "error", "metadata", "key",
    }  # fmt: skip
    assert (first["id"], first["prompt"], first["error"]) == ("a", "One?", None)
    assert first["metadata"] == {"topic": "numbers", "answer": [1, {"x": None}]}
    assert first["finish_reason"] in ("stop", "length")
    assert first["usage"]["prompt_tokens"] > 5
    assert 0 < first["usage"]["completion_tokens"] <= 6
    assert second["messages"] == chat["messages"]
    assert "prompt" not in second
    stats = json.loads((done.folder / "stats.json").read_text())
    assert stats["rows"] == {"total": 2, "done": 2, "errors": 0, "done_before": 0}
    assert stats["completion_tokens"] == sum(r["usage"]["completion_tokens"] for r in done.rows)
    memory = stats["memory"]
    assert memory["footprint_bytes"] > 0
    assert memory["resident_bytes"] > memory["footprint_bytes"]
    assert {"weight_bytes", "quantization_state_bytes", "load_peak", "run_peak", "devices"} <= set(memory)
    assert stats["engine"]["prefill_padding_fraction"] < 0.1
    assert stats["engine"]["columns_attended_over_needed"] >= 1
    assert stats["engine"]["mean_rows_in_flight"] <= 2
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["attention"]["path"] == "rectangles"
    assert manifest["attention"]["max_logit_difference"] < 1e-3
    assert len(manifest["prompts_sha256"]) == 64
    assert {"when", "command", "revision", "versions", "device", "git_commit", "python"} <= set(manifest)
    assert (done.folder / "pipeline.log").stat().st_size > 0
    assert (done.folder / ".hydra" / "config.yaml").is_file()
    assert "2 of 2" in done.said
    assert f"{done.folder.name}/outputs.jsonl" in done.said


def test_every_kind_of_bad_row_is_an_error_row_with_its_place_and_every_good_one_is_done(cli):
    done = cli("prompts=bad_rows.jsonl")
    assert done.status == 1
    good = [row for row in done.rows if row["error"] is None]
    assert len({row["index"] for row in good}) == len(SURVIVES)
    assert all(row["completion"] is not None for row in good)
    bad = sorted((row for row in done.rows if row["error"]), key=lambda r: r["index"])
    for line, row in zip(BAD, bad, strict=True):
        assert f"bad_rows.jsonl:{line}: " in row["error"]
        assert row["completion"] is None
    assert len({(row["index"], row["sample"]) for row in done.rows}) == len(done.rows)
    assert {row["index"] for row in done.rows} == set(range(len(SURVIVES) + len(BAD)))
    assert "Error" not in done.said.replace("errors", "")


def test_on_error_fail_stops_before_the_model_loads(cli):
    done = cli("prompts=bad_rows.jsonl", "on_error=fail")
    assert done.status == 3
    assert "bad_rows.jsonl:2: " in done.said
    assert "Loading" not in done.said
    assert done.rows == []


def test_prompts_come_from_standard_input_and_compressed_files_too(cli, tmp_path):
    rows = b'{"id": "a", "prompt": "One?"}\n{"id": "b", "prompt": "Two?"}\n'
    (tmp_path / "mine.jsonl").write_bytes(rows)
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(rows))
    plain = cli(f"prompts={tmp_path / 'mine.jsonl'}")
    piped = cli("prompts=-", stdin=rows)
    compressed = cli(f"prompts={tmp_path / 'mine.jsonl.gz'}")
    assert [d.status for d in (plain, piped, compressed)] == [0, 0, 0]
    assert set(plain.completions()) == {"a", "b"}
    assert plain.completions() == piped.completions() == compressed.completions()


def test_a_system_prompt_changes_every_row_but_one_that_has_its_own(cli, tmp_path):
    own = {"id": "own", "prompt": "One?", "system": "Be brief."}
    file = prompts(tmp_path, {"id": "a", "prompt": "One?"}, own)
    without, with_system = cli(file), cli(file, "system=Be kind.")
    tokens = [{r["id"]: r["usage"]["prompt_tokens"] for r in d.rows} for d in (without, with_system)]
    assert tokens[1]["a"] > tokens[0]["a"]
    assert tokens[1]["own"] == tokens[0]["own"]


def test_n_samples_logprobs_and_token_ids_come_when_asked(cli, tmp_path):
    file = prompts(tmp_path, {"id": "a", "prompt": "One?"}, {"id": "b", "prompt": "Two?"})
    sampled = ("generation=sample", "generation.n=2", "generation.logprobs=3", "token_ids=true")
    done = cli(file, *sampled)
    assert done.status == 0
    assert sorted((r["id"], r["sample"]) for r in done.rows) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for row in done.rows:
        assert len(row["token_ids"]) == row["usage"]["completion_tokens"]
        assert [p["token_id"] for p in row["logprobs"]][: len(row["token_ids"])] == row["token_ids"]
        for place in row["logprobs"]:
            assert place["logprob"] <= 0
            assert len(place["top"]) == 3
            assert set(place["top"][0]) == {"token", "token_id", "logprob"}
    again = cli(file, *sampled)
    assert {(r["id"], r["sample"]): r["completion"] for r in again.rows} == {
        (r["id"], r["sample"]): r["completion"] for r in done.rows
    }


def test_limit_and_shards_take_their_rows_and_no_others(cli, tmp_path):
    file = prompts(tmp_path, *({"id": f"{i}", "prompt": f"Number {i}?"} for i in range(7)))
    whole = cli(file).completions()
    first = cli(file, "limit=2").completions()
    parts = [cli(file, f"shard={i}/3").completions() for i in range(3)]
    assert set(first) == {"0", "1"}
    assert [sorted(p) for p in parts] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert first.items() <= whole.items()
    assert {k: v for part in parts for k, v in part.items()} == whole


def test_reasoning_keeps_the_thinking_apart(cli, tmp_path):
    done = cli(prompts(tmp_path, {"prompt": "One?"}), "generation=reasoning", "generation.max_new_tokens=4")
    assert done.status == 0
    assert done.rows[0]["thinking"] is None
    assert isinstance(done.rows[0]["completion"], str)


def test_streamed_text_is_shown_and_its_escape_sequences_are_not_obeyed(cli, tmp_path):
    hot = ["generation.temperature=100", "generation.max_new_tokens=450", "generation.ignore_eos=true"]
    file = prompts(tmp_path, {"id": "a", "prompt": "One?"})
    done = cli(file, "stream=true", *hot, "generation.seed=3")
    assert done.status == 0
    text = done.rows[0]["completion"]
    assert "\x1b" in text, "the seed no longer draws an escape; take another"
    assert "\x1b" not in done.said
    before, after = text.split("\x1b")[:2]
    assert f"{before[-1:]}\\x1b{after[:1]}" in done.said
    quiet = cli(file, *hot, "generation.seed=3")
    assert "\\x1b" not in quiet.said


def test_an_error_shows_escape_sequences_of_a_file_name_and_does_not_obey_them(cli):
    done = cli('prompts="\x1b[31mnone.jsonl"')
    assert done.status == 3
    assert "\x1b" not in done.said


def test_a_row_longer_than_the_context_is_an_error_and_the_others_end_at_it(cli, tmp_path):
    long, near = {"id": "long", "prompt": "x" * 600}, {"id": "near", "prompt": "x" * 450}
    done = cli(prompts(tmp_path, long, near), "generation.max_new_tokens=300", "generation.ignore_eos=true")
    assert done.status == 1
    rows = {row["id"]: row for row in done.rows}
    assert "mine.jsonl:1: " in rows["long"]["error"]
    assert "512" in rows["long"]["error"]
    assert sum(rows["near"]["usage"].values()) == 512
    assert rows["near"]["finish_reason"] == "length"


def test_a_model_that_is_not_there_is_an_error_and_no_traceback(cli, tmp_path):
    done = cli(prompts(tmp_path, {"prompt": "One?"}), f"model.name={tmp_path / 'nowhere'}")
    assert done.status == 3
    assert "nowhere" in done.said


@pytest.mark.parametrize("wrong", ["shard=5/4", "shard=a", "limit=-1"])
def test_a_shard_or_limit_that_makes_no_sense_is_a_bad_configuration(cli, wrong):
    done = cli("prompts=jokes.jsonl", wrong)
    assert done.status == 2
    assert wrong.partition("=")[0] in done.said


def test_a_sweep_runs_each_cell_on_its_own_and_shows_them_all(tmp_path, tiny_folder):
    """One cell's model is not there; the other must not suffer."""
    shared = ["generation.max_new_tokens=4", "prompts=jokes.jsonl", "limit=2", f"outputs_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "-m", f"model.name={tmp_path / 'nowhere'},{tiny_folder}", *shared],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 3, said
    assert "Traceback" not in said
    lines = said[said.index("All cells") :].splitlines()
    failed, worked = [i for i, line in enumerate(lines) if "none-greedy" in line]
    assert lines[failed].split()[-1].startswith("nowhere-none-greedy-")
    assert "failed" in lines[failed + 1]
    assert lines[worked].split()[-1].startswith("tiny-none-greedy-")
    assert lines[worked + 1].strip() == "done"
    assert "2/2" in lines[worked]
    folder = job_folder([f"model.name={tiny_folder}", *shared])
    assert len((folder / "outputs.jsonl").read_text().splitlines()) == 2
    own = json.loads((folder / "manifest.json").read_text())["command"]
    assert f"model.name={tiny_folder}" in own, "a cell is a job of its own"


FOOTPRINTS = {"nf4": 109_777_792, "none": 269_030_272, "bf16": 269_030_272, "fp32": 538_060_288}


@pytest.mark.parametrize("quant", FOOTPRINTS)
def test_the_real_model_takes_the_bytes_that_it_must(cli, smollm2_dir, quant):
    short = ["prompts=jokes.jsonl", "limit=1", "generation.max_new_tokens=2"]
    done = cli(f"model.name={smollm2_dir}", f"quant={quant}", *short)
    assert done.status == 0
    stats = json.loads((done.folder / "stats.json").read_text())
    assert stats["memory"]["footprint_bytes"] == FOOTPRINTS[quant]
