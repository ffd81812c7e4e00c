"""Answers in the shape that a job or a row asks for: every whole one parses and validates."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from conftest import SMALL
from job_helper import arguments, outputs, run_job, write_rows
from schemas import SCHEMAS

from pipeline.commands.door import main
from pipeline.common.errors import ConfigError
from pipeline.config.compose import job_folder

CHECK = jsonschema.Draft202012Validator.FORMAT_CHECKER
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A tiny random Llama with the vocabulary and the template of SmolLM2."""
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    sizes = {**SMALL, "vocab_size": len(tokenizer), "bos_token_id": 1, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def of_schemas(path: Path, schemas: list[Any], **generation: Any) -> Path:
    """A row a schema, which is given both ways."""
    rows = []
    for i, schema in enumerate(schemas):
        text = f"Answer in JSON that follows this schema: {json.dumps(schema, ensure_ascii=False)}"
        if i % 2:
            rows.append({"id": f"{i}", "prompt": text, "generation": {"json_schema": schema, **generation}})
        else:
            shape = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
            body = {"messages": [{"role": "user", "content": text}], "response_format": shape, **generation}
            rows.append({"custom_id": f"{i}", "url": "/v1/chat/completions", "body": body})
    return write_rows(path, rows)


def check(rows: list[dict[str, Any]], schemas: list[Any]) -> int:
    """Every completion that is said to be whole validates, and no other ends by itself; how many are whole."""
    assert not [row["error"] for row in rows if row["error"]]
    for row in rows:
        if row["complete"]:
            jsonschema.validate(json.loads(row["completion"]), schemas[int(row["id"])], format_checker=CHECK)
        else:
            assert row["finish_reason"] == "length"
    return sum(row["complete"] for row in rows)


@pytest.mark.parametrize("attention", ["rectangles", "pages"])
def test_every_whole_answer_of_every_schema_parses_and_validates(random_model, tmp_path, attention):
    prompts = of_schemas(tmp_path / "p.jsonl", SCHEMAS, n=2, temperature=1.0)
    more = f"engine.attention={attention}", "generation.max_new_tokens=60", "engine.max_rows=64"
    job = arguments(random_model, prompts, tmp_path, *more)
    assert run_job(job) == 0
    assert len(rows := outputs(job)) == 2 * len(SCHEMAS)
    assert check(rows, SCHEMAS) > len(SCHEMAS) // 2


def test_the_real_model_answers_in_shape(smollm2_dir, tmp_path):
    schemas = SCHEMAS[::10]
    prompts = of_schemas(tmp_path / "p.jsonl", schemas)
    job = arguments(smollm2_dir, prompts, tmp_path, "generation.max_new_tokens=80", "quant=nf4")
    assert run_job(job) == 0
    assert check(outputs(job), schemas) > len(schemas) // 2


def shown(examples: dict[str, str], asked: str) -> list[dict[str, str]]:
    """A conversation in which the model has already answered like this."""
    turns = [
        pair for question, answer in examples.items() for pair in (("user", question), ("assistant", answer))
    ]
    return [{"role": role, "content": text} for role, text in (*turns, ("user", asked))]


def test_an_answer_that_is_in_shape_by_itself_stays_as_it_is(smollm2_dir, tmp_path):
    people = {"Ada, 1": '{"name": "Ada", "age": 1}', "Bob, 2": '{"name": "Bob", "age": 2}'}
    lists = {"[1]": "[1]", "[1, 2]": "[1, 2]"}
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    rows = [(PERSON, shown(people, f"{name}, {age}")) for name in ("Eve", "Max", "Ana") for age in (1, 2)]
    rows += [(numbers, shown(lists, f"[1, 2, {last}]")) for last in (3, 7, 9)]
    common = "generation.max_new_tokens=40", "token_ids=true", "quant=bf16"
    made = {}
    for name in ("free", "held"):
        lines = [
            {"id": f"{i}", "messages": said, "generation": {"json_schema": schema} if name == "held" else {}}
            for i, (schema, said) in enumerate(rows)
        ]
        job = arguments(smollm2_dir, write_rows(tmp_path / f"{name}.jsonl", lines), tmp_path, *common)
        assert run_job(job) == 0
        made[name] = {row["id"]: row for row in outputs(job)}
    valid = {
        id
        for id, row in made["free"].items()
        if jsonschema.Draft202012Validator(rows[int(id)][0]).is_valid(parsed(row["completion"]))
    }
    assert len(valid) > 5
    assert {id: made["held"][id]["token_ids"] for id in valid} == {
        id: made["free"][id]["token_ids"] for id in valid
    }


def parsed(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


# ---- what a job and its rows say


@pytest.fixture
def job(tiny_dir: Path, tmp_path: Path) -> Any:
    """`job([row, …], "generation.regex=…")`: the command line of a job over these rows."""

    def build(rows: list[Any], *more: str) -> list[str]:
        return arguments(tiny_dir, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "outputs", *more)

    return build


def completions(overrides: list[str]) -> dict[str, tuple[str, bool | None]]:
    return {row["id"]: (row["completion"] or row["error"], row.get("complete")) for row in outputs(overrides)}


def test_a_row_says_otherwise_than_its_job(job):
    rows = [
        {"id": "job", "prompt": "a"},
        {"id": "choice", "prompt": "a", "generation": {"choice": ["left", "right"]}},
        {"id": "regex", "prompt": "a", "generation": {"regex": "x{9}"}},
        {"id": "grammar", "prompt": "a", "generation": {"grammar": 'start: "(" /[ab]/ ")"'}},
    ]
    asked = job(rows, "generation.choice=[yes,no]")
    assert run_job(asked) == 0
    found = completions(asked)
    assert found["job"] in {("yes", True), ("no", True)}
    assert found["choice"] in {("left", True), ("right", True)}
    assert found["regex"] == ("xxxxxxxx", False)
    assert found["grammar"] in {("(a)", True), ("(b)", True)}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("json_schema", "{type: array, uniqueItems: true}", "uniqueItems"),
        ("json_schema", "missing.json", "json_schema=missing.json: no such file"),
        ("regex", '"(a"', "unclosed group"),
        ("grammar", '"start: b"', "unknown name"),
    ],
)
def test_a_jobs_constraint_that_cannot_be_kept_is_refused_before_anything_is_loaded(
    job, key, value, said, capsys
):
    asked = job([{"prompt": "a"}], f"generation.{key}={value}")
    with pytest.raises(ConfigError) as caught:
        run_job(asked)
    assert f"generation.{key}" in caught.value.found
    assert said in caught.value.found
    status, told = main(asked), capsys.readouterr().err
    assert (status, "Traceback" in told, "Loading" in told) == (2, False, False)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["generation.choice=[true,false]"], "a list of different texts"),
        (["generation.choice=[a]", "generation.regex=b"], "regex and choice: one of them"),
        (["generation.choice=[a]", "generation.ignore_eos=true"], "choice and ignore_eos: one of them"),
        (["generation.choice=[a]", "generation.thinking=true"], "must be false beside choice"),
    ],
)
def test_what_does_not_go_together_is_refused(job, more, said):
    with pytest.raises(ConfigError, match=said):
        run_job(job([{"prompt": "a"}], *more))


def test_a_row_with_a_constraint_in_a_thinking_job_is_an_error_row(job):
    rows = [{"id": "a", "prompt": "a", "generation": {"choice": ["b"]}}, {"id": "c", "prompt": "c"}]
    asked = job(rows, "generation.thinking=true")
    assert run_job(asked) == 1
    assert "p.jsonl:1: generation.choice in a job with generation.thinking" in str(completions(asked)["a"][0])


def test_a_schema_file_counts_by_what_is_in_it_and_in_its_order(job, tmp_path):
    path = tmp_path / "schema.json"
    rows = [{"id": "a", "prompt": "a"}, {"id": "b", "prompt": "b", "generation": {"json_schema": str(path)}}]
    asked = job(
        rows, f"generation.json_schema={path}", "generation.max_new_tokens=200", "generation.temperature=2"
    )
    orders = [{"x": {"enum": [1]}, "y": {"enum": [2]}}, {"y": {"enum": [2]}, "x": {"enum": [1]}}]
    folders = set()
    for properties in orders:
        schema = {
            "type": "object",
            "properties": properties,
            "required": ["x", "y"],
            "additionalProperties": False,
        }
        path.write_text(json.dumps(schema))
        folders.add(job_folder(asked))
        assert run_job(asked) == 0
        for text, complete in completions(asked).values():
            assert complete
            assert list(json.loads(text)) == list(properties)
    assert len(folders) == 2


def test_a_row_whose_schema_changes_order_is_another_row(job):
    def asked(*names: str) -> list[str]:
        properties = {name: {"enum": [1]} for name in names}
        schema = {
            "type": "object",
            "properties": properties,
            "required": names,
            "additionalProperties": False,
        }
        generation = {"json_schema": schema, "max_new_tokens": 200, "temperature": 2}
        return job([{"id": "a", "prompt": "a", "generation": generation}])

    for names in (("x", "y"), ("y", "x")):
        assert run_job(asked(*names)) == 0
        ((text, complete),) = completions(asked(*names)).values()
        assert complete
        assert list(json.loads(text)) == list(names)


def test_a_job_without_a_constraint_keeps_its_folder(job):
    assert job_folder(job([{"prompt": "a"}])).name.startswith("tiny-fp32-greedy-")
    plain = job([{"prompt": "a"}])
    assert job_folder([*plain, "generation.regex=null"]) == job_folder(plain)
    assert job_folder([*plain, "generation.regex=a"]) != job_folder(plain)
