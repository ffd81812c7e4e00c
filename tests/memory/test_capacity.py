"""Rows and tokens in flight, the limits they respect, and predicted beside measured."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import SMALL
from job_helper import arguments, environment, job_folder, run_job, write_rows
from machines import GB, H100, RTX_3060
from torch._subclasses import FakeTensorMode

from pipeline.common.gpu import Gpu
from pipeline.common.host import control_group_rests
from pipeline.config.quant import QUANTS
from pipeline.config.schema import root
from pipeline.engine.limits import CPU
from pipeline.engine.stats import EngineStats
from pipeline.memory.architecture import Architecture, known_architecture
from pipeline.memory.capacity import (
    Capacity,
    Place,
    kv_architecture,
    layer_devices,
    places,
    tokens_on_all,
    tokens_that_fit,
)
from pipeline.memory.compare import PARTS, Setup, error_percent, predicted
from pipeline.memory.plan import kv_bytes_per_token, kv_cache_bytes

FP32 = QUANTS["fp32"]
LLAMA = Architecture.read({"model_type": "llama", "dtype": "float32", "head_dim": 16, **SMALL})
GEMMA = Architecture.read({"model_type": "gemma3_text", "dtype": "float32", "sliding_window": 16, **SMALL})
LLAMA_8B = Architecture.read(yaml.safe_load((root() / "conf/model/llama.yaml").read_text())["architecture"])


@pytest.mark.parametrize("budget", [10**6, 3 * 10**7])
def test_the_tokens_that_fit_fill_the_budget_and_not_more(budget):
    per_token = sum(kv_bytes_per_token(LLAMA, FP32).values())
    tokens = tokens_that_fit(LLAMA, FP32, budget, rows=8)
    held = kv_cache_bytes(LLAMA, FP32, [(8, tokens // 8)])
    assert budget - 9 * 32 * per_token < held <= budget


def test_sliding_windows_leave_room_for_more_tokens():
    whole = Architecture.read(
        {"model_type": "gemma3_text", "dtype": "float32", **SMALL, "sliding_window": 10**6}
    )
    assert tokens_that_fit(GEMMA, FP32, 10**7, 8) > 1.2 * tokens_that_fit(whole, FP32, 10**7, 8)


def test_a_prompt_that_can_never_fit_is_refused_with_the_figures():
    everywhere = Place("the CPU", 10**6, tuple(range(len(LLAMA.windows))), ())
    capacity = Capacity(8, 1000, LLAMA, FP32, (everywhere,), prefill_tokens=256)
    assert capacity.refusal(10) is None
    text = str(capacity.refusal(4000))
    assert "4000 tokens" in text
    assert "1.0 MB are free on the CPU" in text


def on(gpu: Gpu, layers: range) -> Place:
    return Place(gpu.name, gpu.free_bytes, tuple(layers), (gpu,))


def test_the_fullest_gpu_bounds_the_tokens() -> None:
    """Of two unequal cards, each holds the keys and values of its own layers."""
    quant, rows = QUANTS["none"], 8
    large, small = on(H100, range(28)), on(RTX_3060, range(28, 32))
    budgets = [9 * GB, GB]
    both = tokens_on_all(LLAMA_8B, quant, (large, small), budgets, rows)
    assert both == tokens_that_fit(small.part(LLAMA_8B), quant, GB, rows)
    # 8 times the tokens that one card would hold in 1 GB beside the keys and values of all 32 layers
    assert both == pytest.approx(8 * tokens_that_fit(LLAMA_8B, quant, GB, rows), rel=0.05)
    # with 1.2 GB for its 28 layers, the other card is the fuller one
    assert tokens_on_all(LLAMA_8B, quant, (large, small), [GB, GB], rows) < both / 5
    held = [kv_cache_bytes(place.part(LLAMA_8B), quant, [(rows, both // rows)]) for place in (large, small)]
    assert sum(held) == kv_cache_bytes(LLAMA_8B, quant, [(rows, both // rows)])
    assert all(bytes_ <= budget for bytes_, budget in zip(held, budgets, strict=True))


def test_sliding_layers_on_a_card_of_their_own_bound_nothing_beyond_their_window() -> None:
    config = {"model_type": "gemma3_text", "dtype": "float32", "sliding_window": 16, **SMALL}
    gemma = Architecture.read({**config, "num_hidden_layers": 12})
    full = tuple(i for i, window in enumerate(gemma.windows) if window is None)
    sliding = tuple(i for i, window in enumerate(gemma.windows) if window is not None)
    cards = Place("a", 10**7, sliding, (H100,)), Place("b", 10**7, full, (H100,))
    alone = tokens_that_fit(cards[1].part(gemma), FP32, 10**6, 8)
    assert tokens_on_all(gemma, FP32, cards, [10**7, 10**6], 8) == alone


def test_a_prompt_is_refused_by_the_card_that_it_does_not_fit_on() -> None:
    tiny_card = replace(RTX_3060, free_bytes=2 * GB)
    capacity = Capacity(
        8, 1000, LLAMA_8B, QUANTS["none"], (on(H100, range(16)), on(tiny_card, range(16, 32))), 2048
    )
    assert capacity.refusal(4000) is None
    assert "2,000.0 MB are free on NVIDIA GeForce RTX 3060" in str(capacity.refusal(60_000))


def test_a_layer_is_where_its_weights_are(tiny_model) -> None:
    model = tiny_model("llama")
    count = model.config.num_hidden_layers
    assert layer_devices(model) == [torch.device("cpu")] * count
    (place,) = places(model)
    assert (place.layers, place.gpus) == (tuple(range(count)), ())


def test_layers_on_two_cards_are_found_on_them() -> None:
    """Tensors that only claim to be there: no kernel runs."""
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 4})
    with FakeTensorMode():
        model = transformers.LlamaForCausalLM(config)
        for i, layer in enumerate(model.model.layers):
            weight = torch.empty_like(layer.self_attn.q_proj.weight, device=f"cuda:{i // 3}")
            layer.self_attn.q_proj.weight = torch.nn.Parameter(weight)
        assert [device.index for device in layer_devices(model)] == [0, 0, 0, 1]


def test_an_offloaded_layer_is_where_it_computes(tiny_dir, tmp_path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_dir, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=str(tmp_path)
    )
    assert "disk" in model.hf_device_map.values()
    assert set(layer_devices(model)) == {torch.device("cpu")}


def test_an_unknown_model_has_a_llamas_keys_and_values_and_no_prediction(tiny_dir):
    config = {**json.loads((tiny_dir / "config.json").read_text()), "model_type": "olmo"}
    assert known_architecture(config) is None
    assert kv_architecture(config).num_key_value_heads == 2
    setup = Setup(None, FP32, gpus=(), packed=False, prefill_tokens=256, copies_logits=False, limits=CPU)
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
    script = "from pipeline.common.host import host_free_bytes; print(host_free_bytes())"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))

    done = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=limit, capture_output=True, text=True, check=True,
        env=environment(), cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert 10**8 < int(done.stdout) < 10**9
