"""A job says which way it took through its model, and gives up no row but those that the model cannot compute."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import SMALL, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, model: Any, prompts: list[str]) -> tuple[Path, str]:
    """Run a job on prompts as they are; its folder, and what it said."""
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    line = (
        f"model.name={tmp_path / 'tiny'}", f"prompts={file}", f"outputs_dir={tmp_path / 'outputs'}", "quant=fp32",
        "generation.max_new_tokens=5",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *line],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    (rows,) = tmp_path.glob("outputs/*/*/outputs.jsonl")
    return rows.parent, done.stdout + done.stderr


def test_a_slower_way_and_why_it_was_taken_are_said(tmp_path):
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=16))
    folder, said = run(tmp_path, model, ["Hello"])
    why = "this model's attention is asked for softcap"
    assert f"Attention: padded, and no faster: {why}." in said
    for name in ("stats.json", "manifest.json"):
        attention = json.loads((folder / name).read_text())["attention"]
        assert (attention["path"], attention["why"]) == ("padded", why)


def test_one_row_that_the_model_cannot_compute_costs_no_other(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model("llama"))  # of which no other row makes this token
    token = tiny_tokenizer()("7")["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    folder, said = run(tmp_path, model, ["Hello", "7", "cat"])
    rows = {
        row["prompt"]: row for row in map(json.loads, (folder / "outputs.jsonl").read_text().splitlines())
    }
    assert "not finite" in rows["7"]["error"]
    assert [rows[prompt]["error"] for prompt in ("Hello", "cat")] == [None, None]
    assert "Attention:" not in said
