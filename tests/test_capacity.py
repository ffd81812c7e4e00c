"""Rows and tokens in flight, the limits they respect, and predicted beside measured."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL
from job_helper import arguments, environment, job_folder, run_job, write_rows

from pipeline.architecture import architecture
from pipeline.capacity import Capacity, kv_architecture, tokens_that_fit
from pipeline.engine.stats import EngineStats
from pipeline.memory_compare import PARTS, Setup, error_percent, known_architecture, predicted
from pipeline.memory_limits import control_group_rests
from pipeline.memory_plan import Quant, kv_bytes_per_token, kv_cache_bytes

FP32 = Quant("fp32", dtype="float32")
LLAMA = architecture({"model_type": "llama", "dtype": "float32", "head_dim": 16, **SMALL})
GEMMA = architecture({"model_type": "gemma3_text", "dtype": "float32", "sliding_window": 16, **SMALL})


@pytest.mark.parametrize("budget", [10**6, 3 * 10**7])
def test_the_tokens_that_fit_fill_the_budget_and_not_more(budget):
    per_token = sum(kv_bytes_per_token(LLAMA, FP32).values())
    tokens = tokens_that_fit(LLAMA, FP32, budget, rows=8)
    held = kv_cache_bytes(LLAMA, FP32, [(8, tokens // 8)])
    assert budget - 9 * 32 * per_token < held <= budget


def test_sliding_windows_leave_room_for_more_tokens():
    whole = architecture({"model_type": "gemma3_text", "dtype": "float32", **SMALL, "sliding_window": 10**6})
    assert tokens_that_fit(GEMMA, FP32, 10**7, 8) > 1.2 * tokens_that_fit(whole, FP32, 10**7, 8)


def test_a_prompt_that_can_never_fit_is_refused_with_the_figures():
    capacity = Capacity(8, 1000, LLAMA, FP32, free_bytes=10**6, prefill_tokens=256)
    assert capacity.refusal(10) is None
    text = str(capacity.refusal(4000))
    assert "4000 tokens" in text
    assert "1.0 MB are free" in text


def test_an_unknown_model_has_a_llamas_keys_and_values_and_no_prediction(tiny_dir):
    config = {**json.loads((tiny_dir / "config.json").read_text()), "model_type": "olmo"}
    assert known_architecture(config) is None
    assert kv_architecture(config).num_key_value_heads == 2
    setup = Setup(None, FP32, gpus=(), packed=False, prefill_tokens=256, sampled=False)
    assert predicted(setup, EngineStats()) == dict.fromkeys(PARTS)
    assert error_percent(None, 5) is None
    assert error_percent(110, 100) == pytest.approx(10)


def test_a_job_predicts_its_weights_and_kv_cache_to_the_byte(tiny_dir, tmp_path):
    rows = [{"id": str(i), "prompt": "data cat " * (3 * i + 1)} for i in range(7)]
    job = arguments(tiny_dir, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "outputs")
    assert run_job(job) == 0
    memory = json.loads((job_folder(job) / "stats.json").read_text())["memory"]
    assert memory["measured"]["kv_cache_bytes"] > 0
    for part in ("footprint", "kv_cache"):
        assert memory["predicted"][f"{part}_bytes"] == memory["measured"][f"{part}_bytes"]
        assert memory["error_percent"][part] == 0


def test_a_control_group_and_those_around_it_limit_the_free_memory(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/slurm/job\n")
    group = tmp_path / "slurm" / "job"
    group.mkdir(parents=True)
    for folder, limit in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("700")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert control_group_rests(tmp_path, own) == [350]


def test_version_1_control_groups_count_too(tmp_path):
    own = tmp_path / "own"
    own.write_text("5:cpu:/x\n7:memory:/x\n")
    group = tmp_path / "memory" / "x"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("900")
    (group / "memory.usage_in_bytes").write_text("100")
    assert control_group_rests(tmp_path, own) == [800]


def test_a_limit_of_the_address_space_is_free_memory():
    script = "from pipeline.devices import host_free_bytes; print(host_free_bytes())"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))

    done = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True, check=True,
        env=environment(), cwd=Path(__file__).parent,
    )  # fmt: skip
    assert 10**8 < int(done.stdout) < 10**9
