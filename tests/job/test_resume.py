"""The same command again does only what is missing, keyed by what each row asks for."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from job_helper import ROOT, arguments, command, environment, outputs, run_job, texts, write_rows

from pipeline.common.errors import JobError, PromptError
from pipeline.config.compose import job_folder
from pipeline.job import requests


@pytest.fixture
def job(tiny_dir, tmp_path):
    """`job("resume=never")`: the command line of a job over tmp_path/prompts.jsonl."""

    def build(*more):
        return arguments(tiny_dir, tmp_path / "prompts.jsonl", tmp_path / "outputs", *more)

    return build


@pytest.fixture
def prompts(tmp_path):
    """Writes the prompt file."""
    return lambda rows: write_rows(tmp_path / "prompts.jsonl", rows)


def numbered(count, first=0):
    return [{"id": f"r{i}", "prompt": f"Tell joke number {i}."} for i in range(first, first + count)]


def test_an_edit_of_the_rows_that_neither_length_nor_time_tells_is_seen(job, prompts):
    prompts(numbered(3))
    assert run_job(job()) == 0
    path = job_folder(job()) / "outputs.jsonl"
    before, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole.replace(b'"key":"', b'"kex":"', 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert run_job(job()) == 0
    assert sorted(row["id"] for row in outputs(job())) == ["r0", "r1", "r2"]


def lines_of(overrides):
    return (job_folder(overrides) / "outputs.jsonl").read_bytes().splitlines(keepends=True)


def test_a_finished_job_has_nothing_to_do_in_three_seconds_and_without_torch(job, prompts):
    prompts(numbered(4))
    assert run_job(job()) == 0
    before = lines_of(job())
    code = (
        "import sys; from pipeline.__main__ import main; status = main(); "
        "sys.exit(status or ('torch' in sys.modules) * 50 or ('transformers' in sys.modules) * 51)"
    )
    import subprocess

    from job_helper import ROOT, environment

    before_sec = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *job()], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    after_sec = os.times()
    assert after_sec.children_user - before_sec.children_user < 3, "processor time: the machine may be busy"
    assert done.returncode == 0, done.stderr
    assert "Nothing to do: all 4 rows" in done.stderr
    assert lines_of(job()) == before


def test_only_missing_rows_are_done_and_the_others_not_touched(job, prompts):
    prompts(numbered(6))
    assert run_job(job()) == 0
    whole = texts(job())
    path = job_folder(job()) / "outputs.jsonl"
    kept = lines_of(job())[:3]
    path.write_bytes(b"".join(kept))
    assert run_job(job()) == 0
    assert lines_of(job())[:3] == kept
    assert texts(job()) == whole


def test_a_grown_file_does_the_new_rows_only(job, prompts):
    prompts(numbered(3))
    run_job(job())
    before = lines_of(job())
    prompts(numbered(5))
    assert run_job(job()) == 0
    assert lines_of(job())[:3] == before
    assert {id for id, _ in texts(job())} == {"r0", "r1", "r2", "r3", "r4"}


def test_an_edited_row_is_done_again_and_said_so(job, prompts, capsys):
    rows = numbered(4)
    prompts(rows)
    run_job(job())
    before = texts(job())
    rows[1]["prompt"] = "Something else entirely?"
    prompts(rows)
    assert run_job(job()) == 0
    after = texts(job())
    assert [key for key in before if before[key] != after[key]] == [("r1", 0)]
    assert "1 whose prompts changed or are gone" in " ".join(capsys.readouterr().err.split())
    replaced = (job_folder(job()) / "replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in replaced] == ["r1"]


def test_changed_parameters_of_a_row_do_it_again(job, prompts):
    rows = numbered(2)
    prompts(rows)
    run_job(job())
    rows[0]["generation"] = {"max_new_tokens": 3}
    prompts(rows)
    run_job(job())
    tokens = {row["id"]: row["usage"]["completion_tokens"] for row in outputs(job())}
    assert tokens["r0"] <= 3


def test_a_reordered_file_redoes_nothing_and_gets_its_new_indices(job, prompts, capsys):
    prompts(numbered(5))
    run_job(job())
    before = texts(job())
    capsys.readouterr()
    prompts(numbered(5)[::-1])
    assert run_job(job()) == 0
    assert "Nothing to do" in capsys.readouterr().err
    assert texts(job()) == before
    assert {row["id"]: row["index"] for row in outputs(job())} == {f"r{i}": 4 - i for i in range(5)}


def test_corrected_metadata_arrive_in_the_rows_that_are_written(job, prompts, capsys):
    sampled = job("generation=sample", "generation.n=2")
    rows = [{**row, "reference": "cat", "tags": [i]} for i, row in enumerate(numbered(4))]
    bad = {"id": "bad", "reference": "of a row without a prompt"}
    prompts([*rows, bad])
    assert run_job(sampled) == 1
    before = outputs(sampled)
    rows[1]["reference"], rows[2]["tags"] = "dog", []
    prompts([rows[3], *rows[:3], bad])
    capsys.readouterr()
    assert run_job(sampled) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "2 rows with other metadata" in said
    assert "Nothing to do" in said
    moved = {"r3": 0, "r0": 1, "r1": 2, "r2": 3, "bad": 4}
    corrected = {"r1": {"reference": "dog", "tags": [1]}, "r2": {"reference": "cat", "tags": []}}
    expected = [
        {**row, "index": moved[row["id"]], "metadata": corrected.get(row["id"], row["metadata"])}
        for row in before
    ]
    assert outputs(sampled) == expected
    assert not (job_folder(sampled) / "replaced.jsonl").read_text()


def test_a_removed_row_leaves_the_results(job, prompts):
    prompts(numbered(3))
    run_job(job())
    prompts(numbered(2))
    assert run_job(job()) == 0
    assert {id for id, _ in texts(job())} == {"r0", "r1"}
    assert "r2" in (job_folder(job()) / "replaced.jsonl").read_text()


def test_a_smaller_limit_keeps_the_rows_beyond_it(job, prompts, capsys):
    prompts(numbered(5))
    run_job(job("limit=2"))
    assert len(outputs(job())) == 2
    run_job(job())
    before = lines_of(job())
    capsys.readouterr()
    assert run_job(job("limit=1")) == 0
    assert "Nothing to do: the only row" in capsys.readouterr().err
    assert lines_of(job()) == before


def test_a_damaged_line_in_the_middle_is_named_and_its_row_done_again(job, prompts, capsys):
    prompts(numbered(4))
    run_job(job())
    before = texts(job())
    lines = lines_of(job())
    lines[2] = lines[2][:20] + b"\x00\xff" + lines[2][30:]
    (job_folder(job()) / "outputs.jsonl").write_bytes(b"".join(lines))
    assert run_job(job()) == 0
    assert "1 damaged (outputs.jsonl:3)" in " ".join(capsys.readouterr().err.split())
    assert texts(job()) == before


def test_resume_never_starts_anew_and_keeps_the_old_rows(job, prompts):
    prompts(numbered(3))
    run_job(job())
    before = lines_of(job())
    assert run_job(job("resume=never")) == 0
    assert len(outputs(job())) == 3
    assert (job_folder(job()) / "run-1" / "outputs.jsonl").read_bytes() == b"".join(before)


def test_error_rows_are_written_once_and_done_again_only_when_asked(job, prompts, capsys):
    prompts([*numbered(2), b"not json", {"id": "long", "prompt": "x " * 2000}])
    assert run_job(job()) == 1
    before = lines_of(job())
    assert run_job(job()) == 1
    assert lines_of(job()) == before
    capsys.readouterr()
    assert run_job(job("retry_errors=true")) == 1
    assert "2 that had failed" in " ".join(capsys.readouterr().err.split())
    assert sorted(lines_of(job())) == sorted(before)


def test_on_error_fail_stops_before_the_model_loads(job, prompts, tmp_path):
    prompts([*numbered(1), b"not json"])
    with pytest.raises(PromptError, match=r"prompts\.jsonl:2: not JSON"):
        run_job(job("on_error=fail"))
    assert not (job_folder(job()) / "manifest.json").exists()


def test_missing_samples_of_a_row_are_made_and_are_the_same(job, prompts):
    prompts(numbered(3))
    sampled = job("generation=sample", "generation.n=3", "generation.max_new_tokens=8")
    assert run_job(sampled) == 0
    before = texts(sampled)
    assert len(before) == 9
    (job_folder(sampled) / "outputs.jsonl").write_bytes(b"".join(lines_of(sampled)[1::2]))
    assert run_job(sampled) == 0
    assert texts(sampled) == before


def test_every_sample_of_a_row_that_cannot_run_has_its_error(job, prompts):
    prompts([{"id": "long", "prompt": "x " * 2000, "generation": {"n": 3, "temperature": 1}}, *numbered(1)])
    assert run_job(job()) == 1
    assert sorted(key for key in texts(job()) if key[0] == "long") == [("long", 0), ("long", 1), ("long", 2)]


def test_a_model_that_changed_does_not_mix_with_the_old_rows(job, prompts, tiny_dir):
    prompts(numbered(3))
    run_job(job())
    prompts(numbered(4))
    settings = tiny_dir / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(JobError, match=r"the model's files have changed since.*resume=never"):
        run_job(job())
    assert len(outputs(job())) == 3
    assert run_job(job("resume=never")) == 0


def test_rows_of_two_dtypes_do_not_mix(job, prompts):
    """As when a job that began on another card is started again on this machine."""
    prompts(numbered(3))
    run_job(job())
    path = job_folder(job()) / "manifest.json"
    written = json.loads(path.read_text())
    assert written["dtypes"] == {"plain": "float32", "products_4bit": None}
    path.write_text(json.dumps(written | {"dtypes": {"plain": "float16", "products_4bit": None}}))
    prompts(numbered(4))
    with pytest.raises(JobError, match=r"computed in .*float16.*computes in .*float32.*resume=never"):
        run_job(job())
    assert len(outputs(job())) == 3


def test_standard_input_is_a_prompt_file_too(job, tmp_path):
    line = [a for a in job() if not a.startswith("prompts=")] + ["prompts=-"]
    for count, said in ((2, "2 of 2"), (2, "Nothing to do"), (3, "3 of 3")):
        text = "".join(json.dumps(row) + "\n" for row in numbered(count))
        done = command(line, input=text)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr


def test_two_jobs_on_one_folder_do_not_mix(job, prompts):
    from pipeline.job.folder import JobFolder

    prompts(numbered(1))
    with JobFolder(job_folder(job())):
        second = command(job())
    assert second.returncode == 3
    assert "is writing this job" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    "prompts", ["<(cat {file})", "/dev/stdin < <(cat {file})", "/dev/fd/7 7< <(cat {file})", "{pipe}"]
)
def test_what_can_be_read_only_once_is_kept_and_gone_on_with(job, tmp_path, prompts):
    lines = [json.dumps(row) for row in numbered(3)]
    file, pipe = tmp_path / "prompts.jsonl", tmp_path / "pipe"
    os.mkfifo(pipe)

    def run(rows, *more):
        file.write_text("".join(f"{line}\n" for line in rows))
        words = [
            word for word in job("generation.max_new_tokens=2", *more) if not word.startswith("prompts=")
        ]
        line = f"{shlex.join([sys.executable, '-m', 'pipeline', *words])} prompts="
        line += prompts.format(file=file, pipe=pipe)
        if prompts == "{pipe}":
            line = f"cat {file} > {pipe} & {line}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env=environment(), cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    run(lines[:2])
    assert "Going on: 2 of 3 rows" in run(lines)
    assert "Nothing to do: all 3 rows" in run(lines)
    assert "Nothing to do: all 3 rows" in run([]), "the copy that was kept"
    (kept,) = (tmp_path / "outputs").glob("*/*/prompts.jsonl")
    assert kept.read_text() == "".join(f"{line}\n" for line in lines)
    assert len((kept.parent / "outputs.jsonl").read_text().splitlines()) == 3


def test_a_prompt_file_that_is_cut_while_it_is_read_is_said(job, prompts, tmp_path, monkeypatch):
    prompts(numbered(5))
    open_again = requests.open_prompts

    def cut(*arguments):
        prompts(numbered(3))
        return open_again(*arguments)

    monkeypatch.setattr(requests, "open_prompts", cut)
    with pytest.raises(PromptError, match="the prompt file changed while the job was reading it"):
        run_job(job())
    monkeypatch.undo()
    assert run_job(job()) == 0
    assert len(outputs(job())) == 3


def test_an_edit_that_no_time_tells_is_seen(job, prompts):
    rows = numbered(3)
    path = prompts(rows)
    assert run_job(job()) == 0
    before = path.stat()
    rows[1]["prompt"] = "Tell joke number 9."
    prompts(rows)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_job(job()) == 0
    assert [row["prompt"] for row in sorted(outputs(job()), key=lambda row: row["index"])] == [
        row["prompt"] for row in rows
    ]


def test_names_that_are_not_utf8_are_prompts_and_folders(job, tmp_path):
    file = tmp_path / "odd\udcff.jsonl"
    write_rows(file, numbered(2))
    words = [word for word in job() if not word.startswith(("prompts=", "outputs_dir="))]
    line = [*words, f'prompts="{file}"', f'outputs_dir="{tmp_path}/out\udcfe"']
    for said in ("2 of 2", "Nothing to do"):
        done = command(line)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
    (rows,) = (tmp_path / "out\udcfe").glob("*/*/outputs.jsonl")
    for name in ("status", "report"):
        done = command([name, str(tmp_path / "out\udcfe")])
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out\udcfe" / "odd\udcff" / "report" / "report.html").exists()
    assert json.loads((rows.parent / "todo.json").read_text())["prompts"] == str(file)
