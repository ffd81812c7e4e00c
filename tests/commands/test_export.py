"""Export: a job's answers read back by the tools that they are for, each exactly once and in order."""

import csv
import json

import datasets
import pyarrow.parquet as parquet
import pytest
from job_helper import arguments, command, outputs, run_job, write_rows
from openai.types.chat import ChatCompletion
from synthetic_jobs import HOSTILE, answer_row, hostile_rows, write_job

from pipeline.commands import door
from pipeline.commands.export import main
from pipeline.common.errors import ConfigError, OutputError
from pipeline.config.compose import job_folder

USER = [{"role": "user", "content": "안녕, <|im_end|>"}]
ROWS = [
    {"id": "a", "prompt": "Hello", "topic": "x", "score": 1, "sample": "mine"},
    {"id": "bad", "prompt": "", "topic": "y"},
    {"custom_id": "o", "url": "/v1", "body": {"messages": USER, "n": 2, "logprobs": True, "top_logprobs": 2}},
    {"id": "c", "prompt": "Bye", "topic": None, "score": 2.5, "tags": ["p", 1]},
]


@pytest.fixture(scope="module")
def line(tiny_folder, tmp_path_factory):
    """A real job of four rows, one of them bad and one with two samples."""
    folder = tmp_path_factory.mktemp("export")
    line = arguments(tiny_folder, write_rows(folder / "p.jsonl", ROWS), folder / "o", "generation=sample",
                     "generation.max_new_tokens=4", "token_ids=true")  # fmt: skip
    assert door.main(line) == 1
    return line


def in_order(line):
    return sorted(outputs(line), key=lambda row: (row["index"], row["sample"]))


def export(line, to, tmp_path):
    target = tmp_path / f"out.{to}"
    assert main([str(job_folder(line)), f"to={to}", f"file={target}"]) == 0
    return target


def test_openais_batch_output_is_read_by_its_own_types(line, tmp_path):
    made = in_order(line)
    lines = [json.loads(text) for text in export(line, "openai", tmp_path).read_text().splitlines()]
    assert [item["custom_id"] for item in lines] == ["a", "bad", "o", "c"]
    bodies = [
        ChatCompletion.model_validate(item["response"]["body"], strict=True)
        for item in (lines[0], *lines[2:])
    ]
    assert lines[1]["response"] is None
    assert "'prompt' is empty" in lines[1]["error"]["message"]
    one, two, last = bodies
    assert [len(body.choices) for body in bodies] == [1, 2, 1]
    assert [choice.message.content for choice in (*one.choices, *two.choices, *last.choices)] == [
        row["completion"] for row in made if not row["error"]
    ]
    assert [choice.index for choice in two.choices] == [0, 1]
    asked = made[2]["usage"]["prompt_tokens"]
    told = sum(row["usage"]["completion_tokens"] for row in made[2:4])
    assert (two.usage.prompt_tokens, two.usage.completion_tokens, two.usage.total_tokens) == (
        asked,
        told,
        asked + told,
    )
    first = two.choices[0].logprobs.content[0]
    assert first.logprob == made[2]["logprobs"][0]["logprob"]
    assert [top.token for top in first.top_logprobs] == [
        top["token"] for top in made[2]["logprobs"][0]["top"]
    ]
    assert len({body.id for body in bodies}) == 3


def test_parquet_has_the_metadata_as_columns(line, tmp_path):
    table = parquet.read_table(export(line, "parquet", tmp_path))
    rows = table.to_pylist()
    made = in_order(line)
    for name in ("id", "index", "sample", "completion", "finish_reason", "error"):
        assert [row[name] for row in rows] == [row[name] for row in made]
    assert [row["token_ids"] for row in rows] == [row.get("token_ids") for row in made]
    assert [row["topic"] for row in rows] == ["x", None, None, None, None]
    assert [row["score"] for row in rows] == [1.0, None, None, None, 2.5]
    assert [row["metadata_sample"] for row in rows] == ["mine", None, None, None, None]
    assert rows[4]["tags"] == '["p", 1]'
    assert rows[2]["messages"] == USER
    assert [row["prompt_tokens"] for row in rows] == [
        (row["usage"] or {}).get("prompt_tokens") for row in made
    ]


def test_csv_and_json_lines_hold_the_same_columns(line, tmp_path):
    made = in_order(line)
    with export(line, "csv", tmp_path).open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    flat = [json.loads(text) for text in export(line, "jsonl", tmp_path).read_text().splitlines()]
    assert [row["id"] for row in cells] == [row["id"] for row in flat] == [row["id"] for row in made]
    assert [row["completion"] for row in flat] == [row["completion"] for row in made]
    assert [row["sample"] for row in cells] == [str(row["sample"]) for row in made]
    assert json.loads(cells[2]["messages"]) == USER
    assert flat[4]["tags"] == ["p", 1]


def test_a_dataset_is_read_by_datasets_and_its_card_says_what_made_it(line, tmp_path):
    folder = export(line, "datasets", tmp_path)
    read = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert [row["id"] for row in read] == [row["id"] for row in in_order(line)]
    card = (folder / "README.md").read_text()
    for said in ("# Answers of ", "tiny", "| quantization |", "| generation.max_new_tokens | 4 |", "| errors | 1 |",
                 "peak of the host's memory"):  # fmt: skip
        assert said in card
    export(line, "datasets", tmp_path)  # again, over itself


def test_formulas_in_csv_are_only_text(tmp_path):
    said = ['=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "1-1", "a=b", ""]
    job = write_job(tmp_path, "fp32", [answer_row(i, text) for i, text in enumerate(said)])
    assert main([str(job), "to=csv"]) == 0
    with (job / "exports" / "outputs.csv").open(newline="") as file:
        read = [row["completion"] for row in csv.DictReader(file)]
    assert read == [f"'{text}" for text in said[:6]] + said[6:]


@pytest.mark.parametrize("to", ["openai", "parquet", "csv", "jsonl", "datasets"])
def test_hostile_answers_are_exported_as_they_are(tmp_path, to):
    rows = [*hostile_rows("fp32"), answer_row(len(HOSTILE), "half \ud83d", row_id="half")]
    job = write_job(tmp_path, "fp32", [])
    from pipeline.job.folder import JobFolder

    with JobFolder(job) as results:
        for row in rows:
            results.append(row)
    assert main([str(job), f"to={to}", f"file={tmp_path / 'out'}"]) == 0
    if to == "parquet":
        found = parquet.read_table(tmp_path / "out").column("completion").to_pylist()
        assert found[:-1] == [row["completion"] for row in rows[:-1]]


def test_shards_are_exported_together_in_the_order_of_the_prompt_file(tiny_folder, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"id": f"q{i}", "prompt": str(i)} for i in range(5)])
    line = arguments(tiny_folder, prompts, tmp_path / "o", "generation.max_new_tokens=1")
    assert run_job([*line, "shard=1/2"]) == 0
    assert run_job([*line, "shard=0/2"]) == 0
    done = command(["export", str(job_folder(line)), "to=jsonl"])
    assert done.returncode == 0, done.stderr
    assert "not complete" not in done.stderr
    lines = (job_folder(line) / "exports" / "outputs.jsonl").read_text().splitlines()
    assert [json.loads(text)["id"] for text in lines] == [f"q{i}" for i in range(5)]


def test_what_is_missing_or_damaged_is_said(tmp_path, capsys):
    job = write_job(tmp_path, "fp32", [answer_row(0, "a"), answer_row(1, "b")])
    with (job / "outputs.jsonl").open("a") as file:
        file.write('{"torn')
    assert main([str(job), "to=jsonl"]) == 0
    told = capsys.readouterr().err
    assert "outputs.jsonl:3: a damaged line is left out" in told
    assert "2 answers in" in told
    assert "not complete" in told


def test_nothing_is_written_over_that_an_export_did_not_make(tmp_path):
    job = write_job(tmp_path, "fp32", [answer_row(0, "a")])
    truth = (job / "outputs.jsonl").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").touch()
    (tmp_path / "mine" / "thesis.txt").touch()
    for to, wrong, said in (
        ("jsonl", job / "outputs.jsonl", "is what is exported"),
        ("datasets", job / "outputs.jsonl", "is what is exported"),
        ("datasets", tmp_path / "mine", "other files in it"),
        ("datasets", job / "stats.json", "is a file"),
        ("csv", tmp_path / "mine", "is a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            main([str(job), f"to={to}", f"file={wrong}"])
    assert (job / "outputs.jsonl").read_bytes() == truth
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_wrong_line_is_told(tmp_path):
    job = write_job(tmp_path, "fp32", [answer_row(0, "a")])
    for line, said in (
        ([str(job)], "There are: openai, parquet"),
        ([str(job), "to=parket"], "Did you mean parquet"),
        ([str(job), "too=csv"], "Did you mean to=csv"),
        (["to=csv"], "Give a job's folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(line)
    with pytest.raises(OutputError, match="holds no answers"):
        main([str(tmp_path / "nowhere"), "to=csv"])
