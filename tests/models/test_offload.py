"""A model larger than its budget runs from disk: slower, with the same text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_runs import alone, mixed_requests, run, tokens

from pipeline.config.quant import Dtype, QuantConfig
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.packing import PackedLinear, pack_weights
from pipeline.engine.host_memory import release_files
from pipeline.engine.probe import choose_forward
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.models.loading import load_model


def offloaded(folder: Path, offload_dir: Path, dtype: Dtype, budget: str) -> Any:
    """Loaded with room for a part of it; the rest is on disk."""
    config = ModelConfig(
        name=str(folder), device_map="auto", max_memory={"cpu": budget}, offload_dir=str(offload_dir)
    )
    model = load_model(config, QuantConfig(dtype=dtype), "models").model
    assert "disk" in model.hf_device_map.values()
    return model


@pytest.mark.parametrize("budget", ["150KB", "250KB", "400KB"])
def test_an_offloaded_model_makes_the_same_text(tiny_model, tiny_dir, tmp_path, budget):
    model = offloaded(tiny_dir, tmp_path / "offload", Dtype.float32, budget)
    release_files(model)
    forward, probe = choose_forward(model)
    assert isinstance(forward, FlatForward)
    assert probe["max_logit_difference"] < 1e-3
    requests = mixed_requests()[:6]
    assert tokens(run(forward, requests)) == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}


def test_packing_leaves_offloaded_layers_alone(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipeline.engine.rectangles.forward.load_kernels", lambda: None
    )  # they round otherwise than torch
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.bfloat16).eval()
    model = offloaded(tiny_dir, tmp_path / "offload", Dtype.bfloat16, "200KB")
    on_disk = [path for path, place in model.hf_device_map.items() if place == "disk"]
    pack_weights(model)
    assert on_disk
    for path in on_disk:
        assert not any(isinstance(module, PackedLinear) for module in model.get_submodule(path).modules())
    forward, _ = choose_forward(model)
    requests = mixed_requests()[:3]
    assert tokens(run(forward, requests)) == tokens(run(FlatForward(whole), requests))
