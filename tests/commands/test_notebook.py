"""Python's way in: the documented example runs, importing is instant, errors say which prompt."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.commands.notebook import load_model, read_prompts
from pipeline.common.errors import ConfigError, PromptError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), "none", "system=Be brief.")


def test_the_documented_example_runs(smollm2_dir, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    example = re.search(
        r"```python\n(from pipeline import Engine.*?)```", (ROOT / "docs/inspect.md").read_text(), re.S
    )[1]
    assert len([line for line in example.splitlines() if line]) == 5
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("row-")} == {"row-0", "row-1"}


def test_the_example_is_the_same_in_the_package():
    lines = [line.strip() for line in pipeline.__doc__.splitlines()]
    documented = (ROOT / "docs/inspect.md").read_text()
    for line in lines[lines.index("from pipeline import Engine, load_model, read_prompts") :][:5]:
        assert line in documented


def test_importing_the_package_loads_nothing():
    code = "import sys, pipeline; dir(pipeline); sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipeline.nothing  # noqa: B018


def test_texts_rows_and_files_make_the_same_requests(model, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hi"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    listed = read_prompts(["Hi", {"messages": [{"role": "user", "content": "Hi"}]}], model, max_new_tokens=3)
    assert listed == read_prompts(file, model, max_new_tokens=3)
    assert listed[0].prompt_token_ids == listed[1].prompt_token_ids
    assert "Be brief." in model.decode(listed[0].prompt_token_ids)


def test_the_engine_runs_them_all(model):
    requests = read_prompts(
        ["a", "b", {"prompt": "c", "generation": {"n": 2}}], model, max_new_tokens=4, temperature=1.0
    )
    done = list(pipeline.Engine(*model.engine_parts).generate(requests))
    assert sorted((c.request_id, c.sample) for c in done) == [
        ("row-0", 0),
        ("row-1", 0),
        ("row-2", 0),
        ("row-2", 1),
    ]


def test_a_bad_prompt_is_named_by_its_place(model):
    with pytest.raises(PromptError, match=r"prompts\[1\]"):
        read_prompts(["a", {"nothing": 1}], model)
    with pytest.raises(
        PromptError, match=r"prompts\[0\]: the prompt has .* tokens and the model's context 512"
    ):
        read_prompts(["a" * 600], model)


def test_a_misspelt_generation_key_names_the_right_ones(model):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        read_prompts(["a"], model, max_tokens=3)
    with pytest.raises(ConfigError, match="top_p"):
        read_prompts(["a"], model, top_p=2.0)
