"""Layers in 4 bits are multiplied on every device, whatever their sizes."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from job_helper import arguments, outputs, run_job, write_rows
from models.test_quantized_experts import PROMPT, saved

from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.models.loading import load_model

# A gate of one output; outputs that are no multiple of 32, inputs that are none of 64.
QWEN2_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 80, "moe_intermediate_size": 40}
SIZES = {**QWEN2_MOE, "shared_expert_intermediate_size": 72}


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_a_layer_that_fills_no_blocks_is_multiplied_by_its_dequantized_weight(
    quant: str, tmp_path: Path
) -> None:
    """On a CPU with AVX512-BF16, too, where bitsandbytes reorders weights in blocks of 32 outputs."""
    folder = saved(tmp_path / "model", "Qwen2MoeConfig", SIZES)
    network = load_model(ModelConfig(str(folder), device_map="cpu"), QUANTS[quant], "none").model
    layers = [module for module in network.modules() if isinstance(module, Linear4bit)]
    assert {layer.out_features for layer in layers} == {1, 40, 72, 80}
    with torch.inference_mode():
        for layer in layers:
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            states = torch.randn(5, layer.in_features).bfloat16()
            expected = torch.nn.functional.linear(
                states.float(), weight, None if layer.bias is None else layer.bias.float()
            )
            torch.testing.assert_close(layer(states).float(), expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("pack", ["true", "false"])
def test_a_mixture_with_a_gate_of_one_output_runs_in_4_bits(pack: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "Qwen2MoeConfig", SIZES)
    rows = write_rows(tmp_path / "p.jsonl", PROMPT)
    line = [*arguments(folder, rows, tmp_path / "out")[:3], "quant=nf4", "generation.max_new_tokens=3"]
    line.append(f"engine.pack_weights={pack}")
    assert run_job(line) == 0
    assert [(row["id"], row["error"]) for row in outputs(line)] == [("a", None), ("b", None)]
