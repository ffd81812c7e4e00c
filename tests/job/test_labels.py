"""Choices are compared by how probable the model finds each: nothing is drawn, and all of them are written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helper import arguments, outputs, run_job, write_rows

from pipeline.commands import export
from pipeline.common.errors import ConfigError
from pipeline.config.compose import job_folder
from pipeline.report.jobs import read_job
from pipeline.report.prompts import align
from pipeline.report.quality import against_references

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Is 2 + 2 = 4? Answer yes or no.", "reference": "yes"},
    {"id": "b", "prompt": "Which animal barks?", "reference": "dog",
     "generation": {"choice": ["cat", "dog", "dogfish", "강아지"], "label_logprobs": True}},
    {"id": "c", "prompt": "Is fire cold? Answer yes or no.", "reference": "no"},
    {"custom_id": "d", "body": {"messages": [{"role": "user", "content": "Say <|im_end|> or stop."}],
     "choice": ["<|im_end|>", "stop"], "label_logprobs": True}},
    {"id": "free", "prompt": "Hello", "generation": {"label_logprobs": False, "choice": ["x", "y"]}},
]  # fmt: skip
JOB = ('generation.choice=["yes","no","none","none of them"]', "generation.label_logprobs=true")


@torch.inference_mode()
def sums_alone(smollm2: tuple[Any, Any], row: dict[str, Any]) -> list[float]:
    """The log-probability of each choice and the turn's end after the row's prompt alone, by plain transformers."""
    model, tokenizer = smollm2
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = []
    for label in row["label_logprobs"]:
        own = [*tokenizer(label["choice"]).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert label["tokens"] == len(own)
        ids = torch.tensor([prompt + own])
        scores = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), -1)
        found.append(float(scores.gather(1, ids[0, len(prompt) :, None]).sum()))
    return found


@pytest.fixture(scope="module")
def line(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of the real model in float32 over ROWS."""
    folder = tmp_path_factory.mktemp("labels")
    line = arguments(smollm2_dir, write_rows(folder / "p.jsonl", ROWS), folder / "o", *JOB)
    assert run_job(line) == 0
    return line


def by_id(line: list[str]) -> dict[str, dict[str, Any]]:
    rows = outputs(line)
    assert len(rows) == len(ROWS)
    return {row["id"]: row for row in rows}


def test_each_choice_weighs_what_plain_transformers_gives_its_text_alone(line, smollm2):
    rows = by_id(line)
    assert [label["choice"] for label in rows["b"]["label_logprobs"]] == ["cat", "dog", "dogfish", "강아지"]
    assert "label_logprobs" not in rows["free"]
    for row in (rows[name] for name in "abc"):
        labels = row["label_logprobs"]
        expected = sums_alone(smollm2, row)
        assert [label["logprob"] for label in labels] == pytest.approx(expected, abs=2e-3)
        total = sum(map(math.exp, expected))
        chances = [math.exp(own) / total for own in expected]
        assert [label["probability"] for label in labels] == pytest.approx(chances, abs=1e-3)
        best = max(labels, key=lambda label: label["probability"])
        assert (row["completion"], row["finish_reason"], row["complete"]) == (best["choice"], "stop", True)
        assert row["usage"]["completion_tokens"] == best["tokens"] - 1


def test_what_a_choice_spells_of_control_tokens_is_text(line):
    typed, plain = by_id(line)["d"]["label_logprobs"]
    assert typed["tokens"] > 3
    assert plain["tokens"] == 2


def test_the_report_counts_how_often_the_most_probable_choice_is_the_reference(line):
    job = read_job(job_folder(line))
    marks = against_references(align([job]), 0)
    rows = by_id(line)
    right = sum(rows[row["id"]]["completion"] == row["reference"] for row in ROWS[:3])
    assert marks is not None
    assert (marks["rows"], marks["exact"]["value"]) == (3, pytest.approx(right / 3))


def test_exports_have_the_distribution(line, tmp_path):
    rows = by_id(line)
    for to in ("jsonl", "openai", "parquet"):
        assert export.main([str(job_folder(line)), f"to={to}", f"file={tmp_path / to}"]) == 0
    flat = {row["id"]: row for row in map(json.loads, (tmp_path / "jsonl").read_text().splitlines())}
    assert flat["b"]["label_logprobs"] == rows["b"]["label_logprobs"]
    batch = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "openai").read_text().splitlines())}
    choice = batch["b"]["response"]["body"]["choices"][0]
    assert choice["label_logprobs"] == rows["b"]["label_logprobs"]


def test_a_quantized_model_compares_too(tiny_dir, tmp_path):
    plain = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", ROWS[:3]), tmp_path / "o", *JOB)
    quantized = ["quant=nf4" if part == "quant=fp32" else part for part in plain]
    assert quantized != plain
    assert run_job(quantized) == 0
    rows = outputs(quantized)
    assert len(rows) == 3
    for row in rows:
        assert sum(label["probability"] for label in row["label_logprobs"]) == pytest.approx(1)


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["generation.label_logprobs=true"], "label_logprobs=True: needs choice"),
        ([*JOB, "generation.n=2"], "n=2: must be 1 beside label_logprobs"),
        ([*JOB, "generation.temperature=0.5"], "temperature=0.5: must be 0.0 beside label_logprobs"),
        ([*JOB, "generation.repetition_penalty=1.1"], "repetition_penalty=1.1: must be 1.0 beside"),
        ([*JOB, "generation.logprobs=1"], "logprobs=1: must be None beside"),
        ([*JOB, "generation=model"], "must be false beside generation=model"),
        ([*JOB, "generation.thinking=true"], "must be false beside choice"),
    ],
)
def test_a_job_that_asks_for_more_of_a_comparison_is_refused(tiny_dir, tmp_path, more, said):
    asked = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", ROWS[:1]), tmp_path / "o", *more)
    with pytest.raises(ConfigError, match=said):
        run_job(asked)


def test_a_row_that_cannot_be_compared_is_an_error_row_that_names_its_line(tiny_dir, tmp_path):
    asked: list[dict[str, Any]] = [
        {"label_logprobs": True},
        {"label_logprobs": True, "choice": ["a", "b"], "n": 2},
        {"label_logprobs": True, "choice": ["a", "b"], "temperature": 1},
        {"label_logprobs": "yes", "choice": ["a", "b"]},
        {"label_logprobs": True, "choice": ["a", "b" * 600]},
        {"label_logprobs": True, "choice": ["a", "b"]},
    ]
    rows = [{"id": f"{i}", "prompt": "x", "generation": said} for i, said in enumerate(asked)]
    job = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "o")
    assert run_job(job) == 1
    made = {row["id"]: row for row in outputs(job)}
    for i, said in enumerate(
        [
            "label_logprobs=True: needs choice",
            "n=2: must be 1",
            "temperature=1.0: must be 0.0",
            'label_logprobs is "yes"',
            "a choice 601 and the model's context 512",
        ]
    ):
        assert made[f"{i}"]["error"].startswith(f"{tmp_path / 'p.jsonl'}:{i + 1}: ")
        assert said in made[f"{i}"]["error"]
    assert made["5"]["completion"] in ("a", "b")


def test_a_choice_that_the_tokenizer_leaves_nothing_of_is_an_error_row(tiny_dir, tmp_path):
    (tiny_dir / "chat_template.jinja").unlink()
    tokenizer = json.loads((tiny_dir / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tiny_dir / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": strip}))
    asked = {"prompt": "x", "generation": {"label_logprobs": True, "choice": ["a", " "]}}
    job = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", [asked, {"prompt": "x"}]), tmp_path / "o")
    assert run_job(job) == 1
    (said,) = [row["error"] for row in outputs(job) if row["error"]]
    assert "p.jsonl:1: choice ' ' has no tokens in this tokenizer" in said


def test_a_job_without_a_comparison_keeps_its_folder(tiny_dir, tmp_path):
    plain = arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", ROWS[:1]), tmp_path / "o", JOB[0])
    assert job_folder([*plain, "generation.label_logprobs=false"]) == job_folder(plain)
    assert job_folder([*plain, "generation.label_logprobs=true"]) != job_folder(plain)
