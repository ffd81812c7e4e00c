"""A job under a hard limit of its address space, where allocations really fail."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, tiny_tokenizer
from job_helper import ROOT, environment, texts, write_rows

from pipeline.config.compose import job_folder

MB = 1_000_000

# Everything is imported before the limit is set: it leaves room for the model and some of its rows.
CHILD = """
import resource, sys
import accelerate, psutil, pipeline.job.run
from transformers.models.llama import modeling_llama
from job_helper import run_job
if headroom := int(sys.argv[1]):
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))
sys.exit(run_job(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose keys and values are large: 16 kB a token."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    config = transformers.LlamaConfig(**{**SMALL, **sizes, "max_position_embeddings": 2048})
    folder = tmp_path_factory.mktemp("models") / "wide"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def job(headroom: int, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """In a process of its own; 0 is no limit."""
    paths = f"{ROOT}:{ROOT / 'tests'}"
    settings = {"PYTHONPATH": paths, "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(headroom), *arguments],
        capture_output=True, text=True, check=False, env={**environment(), **settings}, cwd=ROOT,
    )  # fmt: skip


def command(folder: Path, prompts: Path, outputs: Path, *more: str) -> list[str]:
    own = [f"model.name={folder}", f"prompts={prompts}", f"outputs_dir={outputs}", "quant=fp32"]
    return [*own, "generation.max_new_tokens=40", "generation.ignore_eos=true", *more]


def stats(arguments: list[str]) -> dict[str, Any]:
    return dict(json.loads((job_folder(arguments) / "stats.json").read_text()))


def test_a_job_under_a_hard_limit_finishes_with_the_same_texts(wide_folder, tmp_path):
    headroom = 100 * MB
    rows = [{"id": str(i), "prompt": f"{i}. " + "data cat mat " * (20 + i)} for i in range(24)]
    prompts = write_rows(tmp_path / "long.jsonl", rows)
    # More than fits is asked for, so that the limit is met by the allocator and not by the plan.
    many = ["engine.max_rows=64", "engine.max_tokens_in_flight=100000"]
    free = command(wide_folder, prompts, tmp_path / "free", *many)
    limited = command(wide_folder, prompts, tmp_path / "limited", *many)
    calm = job(0, free)
    assert calm.returncode == 0, calm.stderr[-3000:]
    done = job(headroom, limited)
    assert done.returncode == 0, done.stderr[-3000:]
    assert texts(limited) == texts(free)
    assert stats(free)["engine"]["out_of_memory"] == 0
    assert stats(limited)["engine"]["out_of_memory"] > 0
    assert stats(free)["engine"]["peak_kv_cache_bytes"] > headroom


def test_a_job_that_cannot_fit_is_refused_before_a_weight_is_read(smollm2_dir, tmp_path):
    prompts = write_rows(tmp_path / "one.jsonl", [{"id": "a", "prompt": "Hi"}])
    large = command(smollm2_dir, prompts, tmp_path / "large", "generation.max_new_tokens=1")
    refused = job(500 * MB, large)
    assert "LoadError" in refused.stderr
    assert re.search(r"loading it takes 65\d\.\d MB \(beside 269\.0 MB of its file", refused.stderr)
    assert "quant=none would fit" in refused.stderr
    assert "memory_check=warn" in refused.stderr
    assert "Loading" not in refused.stderr
    tried = job(500 * MB, [*large, "memory_check=warn"])
    assert "Loading" in tried.stderr
    assert "Warning: SmolLM2-135M-Instruct" in tried.stderr or f"Warning: {smollm2_dir}" in tried.stderr
