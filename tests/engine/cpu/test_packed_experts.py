"""Experts of mixtures go through the CPU's kernels, each packed apart, as exactly as through bf16 products."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from memory.test_counted import count_here
from models.test_quantized_experts import as_transformers, experts_of, saved
from torch import Tensor, nn

from pipeline.config.quant import QUANTS
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.packed_weight import PackedWeight
from pipeline.engine.cpu.packing import PackedLinear, PackedSibling, pack_weights
from pipeline.memory.peaks import held_weight_bytes, load_peak, packed_bytes
from pipeline.models.loading import load_model

FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
# Gated by silu; by a gate of its own, with biases, the other way round; not gated.
KINDS = {
    "MixtralConfig": FEW,
    "Qwen3MoeConfig": FEW | {"moe_intermediate_size": 64},
    "GptOssConfig": FEW | {"head_dim": 16},
    "NemotronHConfig": {
        "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "head_dim": 16,
    },
}  # fmt: skip


def mixture(kind: str, quant: str, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    saved(folder, kind, KINDS[kind] | (changes or {}))
    return load_model(ModelConfig(str(folder), device_map="cpu"), QUANTS[quant], "none").model


def experts(network: Any) -> list[Any]:
    """The experts of each layer, quantized or not."""
    return [module for module in network.modules() if hasattr(module, "is_transposed")]


def routed(rows: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts that they chose, and their weights."""
    chosen = torch.rand(rows, count).topk(2, dim=-1).indices
    return torch.randn(rows, 64).bfloat16(), chosen, torch.rand(rows, 2).bfloat16()


def error(found: Tensor, expected: Tensor) -> Tensor:
    return (found.float() - expected).square().mean().sqrt()


@pytest.mark.parametrize("quant", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_pass_is_as_exact_as_transformers_own_and_a_row_the_same_beside_any_others(
    kind: str, quant: str, tmp_path: Path
) -> None:
    network = mixture(kind, quant, tmp_path / "model")
    (module, *_) = experts(network)
    plain = copy.deepcopy(as_transformers(module))
    wide = nn.Module.float(copy.deepcopy(plain))
    pack_weights(network)
    assert len(module.packed_experts["down_proj"]) == 4
    tokens, chosen, weights = routed(23, 4)
    with torch.inference_mode():
        expected = wide(tokens.float(), chosen, weights.float())
        theirs, found = nn.Module.bfloat16(plain)(tokens, chosen, weights), module(tokens, chosen, weights)
        assert found.dtype == torch.bfloat16
        assert error(found, expected) <= 1.05 * error(theirs, expected)
        for row in (0, 11, 22):
            one = slice(row, row + 1)
            assert torch.equal(module(tokens[one], chosen[one], weights[one]), found[one])
        assert torch.equal(copy.deepcopy(module)(tokens, chosen, weights), found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_float32_is_transformers_own_and_a_row_the_same_beside_any_others(
    kind: str, tmp_path: Path
) -> None:
    network = mixture(kind, "fp32", tmp_path / "model")
    (module, *_) = experts(network)
    plain = copy.deepcopy(module)
    pack_weights(network)
    assert len(module.packed_experts["down_proj"]) == 4
    tokens, chosen, weights = routed(23, 4)
    states, weights = tokens.float(), weights.float()
    with torch.inference_mode():
        found = module(states, chosen, weights)
        torch.testing.assert_close(found, plain(states, chosen, weights), rtol=1e-4, atol=1e-5)
        for row in (0, 11, 22):
            one = slice(row, row + 1)
            assert torch.equal(module(states[one], chosen[one], weights[one]), found[one])


def packed_in(network: Any) -> dict[int, PackedWeight]:
    """Each packed weight once, by its id."""
    layers = [m.packed for m in network.modules() if isinstance(m, PackedLinear | PackedSibling)]
    of_experts = [w for m in experts(network) for weights in m.packed_experts.values() for w in weights]
    return {id(weight): weight for weight in (*layers, *of_experts)}


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4_single", "int8"])
def test_the_plan_counts_packed_experts_to_the_byte_and_nothing_is_held_twice(
    quant: str, tmp_path: Path
) -> None:
    network = mixture("MixtralConfig", quant, tmp_path / "model", {"vocab_size": 320})
    arch = count_here(network.config.to_dict())
    pack_weights(network)
    found = [tensor for w in packed_in(network).values() for tensor in (w.weight.numbers, w.weight.scales)]
    held = sum(tensor.nbytes for tensor in found if tensor is not None)
    held += sum(parameter.nbytes for parameter in network.parameters())
    held += sum(buffer.nbytes for buffer in network.buffers())
    assert not any(name for name, p in network.named_parameters() if "experts" in name and p.numel())
    assert not any(held.states for m in experts_of(network) for held in m.quantized_experts.values())
    predicted = held_weight_bytes(arch, QUANTS[quant]) + packed_bytes(arch, QUANTS[quant])
    tables = predicted - held  # of codes: every weight's own in the plan
    layers = 2 * (4 + 2 * 4)  # in two layers: four of attention, two of four experts
    assert 0 <= tables <= (layers * (16 + 256 + 1) * 4 if QUANTS[quant].four_bit else 0)


def test_the_plan_counts_a_weight_of_plain_experts_twice_while_it_is_packed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "MixtralConfig", FEW)
    arch = count_here(transformers.AutoConfig.from_pretrained(folder).to_dict())
    plain, packed = (load_peak(arch, QUANTS["none"], gpus=(), packed=packed).held for packed in (False, True))
    assert packed - plain >= 2 * 4 * 256 * 64


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_experts_that_fill_no_blocks_stay_as_they_are(quant: str, tmp_path: Path) -> None:
    network = mixture("Qwen3MoeConfig", quant, tmp_path / "model", {"moe_intermediate_size": 40})
    assert pack_weights(network) > 0
    assert not any(hasattr(module, "packed_experts") for module in experts(network))
    with torch.inference_mode():
        assert network(torch.arange(20, 40)[None]).logits.isfinite().all()


def test_packing_twice_changes_nothing(tmp_path: Path) -> None:
    network = mixture("MixtralConfig", "nf4", tmp_path / "model")
    assert pack_weights(network) > 0
    with torch.inference_mode():
        before = network(torch.arange(20, 40)[None]).logits
        assert pack_weights(network) == 0
        assert torch.equal(network(torch.arange(20, 40)[None]).logits, before)
