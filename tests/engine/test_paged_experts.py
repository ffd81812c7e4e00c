"""Experts in bitsandbytes' 4 and 8 bits on a GPU, run by Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, tiny_tokenizer
from interpreted import interpreted, off, random
from transformers import AutoModelForCausalLM

from pipeline.config.quant import Dtype, QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.paged.replaced import replace_experts
from pipeline.models.loading import load_model
from pipeline.models.quantized_experts import held_experts

KINDS = {  # gated, gated in pairs with biases and the other way round, and not gated
    "Qwen3MoeConfig": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "GptOssConfig": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64},
    "NemotronHConfig": {
        "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "layers_block_type": ["moe", "attention"],
    },
}  # fmt: skip
QUANTS = {
    "double": QuantConfig(QuantMethod.nf4, Dtype.float16, double_quant=True, compute_dtype=Dtype.float16),
    "single": QuantConfig(QuantMethod.fp4, Dtype.float16, double_quant=False, compute_dtype=Dtype.float16),
    "int8": QuantConfig(QuantMethod.int8, Dtype.float16),
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted("triton_experts")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Make a tiny mixture of random weights, load it as a job would, and give its experts."""

    def make(kind: str, quant: str, **changes: Any) -> Any:
        config = getattr(transformers, kind)(**{**SMALL, **KINDS[kind], **changes})
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        for name, weight in network.named_parameters():
            if name.endswith("_bias"):
                weight.data = random(*weight.shape)
        network.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        loaded = load_model(ModelConfig(str(tmp_path)), QUANTS[quant], "none").model
        return next(module for module in loaded.modules() if held_experts(module))

    return make


def replaced(kernels: ModuleType, experts: Any) -> int:
    return replace_experts(experts, kernels.GroupedExperts, torch.float16)


def sent(experts: Any, tokens: int) -> Any:
    """Send the first of 90 random tokens through two experts each; the router skips the second of some."""
    chosen = torch.rand(90, 5, generator=torch.Generator().manual_seed(1)).topk(2).indices
    chosen[::3, 1] = 5
    weights = random(90, 2, seed=2).abs()
    with torch.inference_mode():
        return experts(random(90, 64, seed=3)[:tokens], chosen[:tokens], weights[:tokens])


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_give_what_their_dequantized_matrices_give(kernels, load, kind, quant):
    experts = load(kind, quant)
    found = {tokens: sent(experts, tokens) for tokens in (1, 7, 90)}
    assert replaced(kernels, experts) == 1
    for tokens, expected in found.items():
        made = sent(experts, tokens)
        assert made.dtype == torch.float16
        assert off(made, expected) < 2e-3


def test_a_token_does_not_depend_on_those_beside_it(kernels, load):
    experts = load("Qwen3MoeConfig", "double")
    replaced(kernels, experts)
    assert torch.equal(sent(experts, 90)[:9], sent(experts, 9))


def test_scales_are_views_of_what_the_kernel_reads(kernels, load):
    experts = load("Qwen3MoeConfig", "double")
    before = experts.quantized_experts["down_proj"].dequantize(experts.down_proj, 3)
    replaced(kernels, experts)
    state = experts.quantized_experts["down_proj"].states[3]
    assert torch.equal(experts.quantized_experts["down_proj"].dequantize(experts.down_proj, 3), before)
    read = experts.grouped_experts.weights["down_proj"].scales
    assert state.absmax.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()


def test_experts_are_replaced_once_and_only_where_they_fill_blocks(kernels, load):
    experts = load("Qwen3MoeConfig", "double")
    assert [replaced(kernels, experts) for _ in range(2)] == [1, 0]
    assert replaced(kernels, load("Qwen3MoeConfig", "double", moe_intermediate_size=96)) == 0


def test_experts_stay_where_the_kernels_prove_wrong(kernels, load, monkeypatch):
    experts = load("Qwen3MoeConfig", "int8")
    expected = sent(experts, 9)
    monkeypatch.setattr(kernels, "LARGEST_CODE", 120)
    assert replaced(kernels, experts) == 0
    assert torch.equal(sent(experts, 9), expected)


@pytest.mark.parametrize("ids", [[], [0, 0, 0], [4] * 40, [0] * 16 + [1, 3, 5, 5], list(range(5)) * 30])
@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_hold_each_row_of_an_expert_once(kernels, ids, rows):
    ids = torch.tensor(sorted(ids), dtype=torch.int64)
    tiles = kernels.Tiles(ids, 5, rows)
    seen: list[int] = []
    for tile, expert in enumerate(tiles.experts.tolist()):
        if expert < 5:
            begin = int(tiles.ends[expert - 1]) if expert else 0
            first = int(tiles.bounds[expert]) + (tile - begin) * rows
            own = range(first, min(first + rows, int(tiles.bounds[expert + 1])))
            assert own
            assert (ids[own.start : own.stop] == expert).all()
            seen += own
    assert seen == [row for row, expert in enumerate(ids.tolist()) if expert < 5]


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from interpreted import runs_on
from pipeline.engine.paged import triton_experts as experts
from pipeline.engine.paged.triton_four_bits import permutations

name, capability, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kernel = getattr(experts, name)
fixed = {"OUTPUTS": 64, "ROWS": rows, "BIASED": True}
kinds = dict.fromkeys(("states", "bias", "output"), "*bf16") | dict.fromkeys(("experts", "ends", "bounds"), "*i64")
kinds |= {"words": "*i16", "scales": "*u8", "codes": "*fp32", "largest": "*fp32"}
kinds |= dict.fromkeys(("scale_codes", "scale_scales", "offsets"), "*fp32")
if name == "_four_bits_kernel":
    fixed |= {"NESTED": True, "PERMUTATIONS": permutations(tuple(i / 16 for i in range(16)))}
else:
    fixed |= {"INPUTS": 64, "LARGEST": 127}
    kinds["codes"] = "*i8"
kinds |= dict.fromkeys(fixed, "constexpr")
names = kernel.arg_names
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds.get(name, "")[:1] == "*"}
source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in names}, fixed, aligned)
made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})
print(made.metadata.shared)
assert not runs_on(made.asm["ptx"])
"""


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("name", ["_four_bits_kernel", "_eight_bits_kernel"])
def test_it_compiles_and_fits_the_memory_of_a_block(kernels, name, capability, rows):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, name, str(capability), str(rows)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 0 < int(made.stdout) <= 99 * 1024, "what a block has with compute capability 8.9"
