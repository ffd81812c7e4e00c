"""A product in float32 is the linear layer's, and a model in float32 says on the kernels what it says without."""

# ruff: noqa: E402  without the kernels, what they are made of cannot be imported either

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, build_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pipeline.engine.cpu import load_kernels

kernels = load_kernels()
if kernels is None or kernels.products is None:
    pytest.skip("the kernels multiply on none but an x86 CPU with AVX2", allow_module_level=True)


from cpu_products import fed_one_by_one

from pipeline.config.quant import QUANTS, Dtype
from pipeline.engine.cpu.packing import PackedLinear, pack_weights
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.models.formats import quantization


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (576, 96), (2080, 320)])
def test_float32_is_the_linear_layers_and_a_row_the_same_beside_any_others(
    inputs: int, outputs: int, bias: bool
) -> None:
    """Weights that are one part, and several; rows that fill no registers, several groups, and more than a chunk."""
    states, weight = random(600, inputs), random(outputs, inputs, seed=1)
    offsets = random(outputs, seed=2) if bias else None
    blocks = kernels.pack_blocks(weight)
    together = kernels.linear(states, blocks, offsets)
    expected = F.linear(states.double(), weight.double(), None if offsets is None else offsets.double())
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=4e-4)
    for rows in (1, 2, 3, 5, 7, 13, 40, 300):
        assert torch.equal(kernels.linear(states[:rows], blocks, offsets), together[:rows])


def test_float32_takes_any_view_and_no_other_precision() -> None:
    states, blocks = random(32, 8, 2).permute(2, 1, 0), kernels.pack_blocks(random(32, 32, seed=1))
    assert torch.equal(
        kernels.linear(states, blocks, None), kernels.linear(states.contiguous(), blocks, None)
    )
    part = random(8, 48)[:, :32]
    assert torch.equal(kernels.linear(part, blocks, None), kernels.linear(part.contiguous(), blocks, None))
    with pytest.raises(TypeError, match="bfloat16"):
        kernels.linear(states.bfloat16(), blocks, None)


def test_gates_in_float32_are_silu_times_up_for_small_and_large_numbers() -> None:
    states, linears = random(21, 64) * 8, [nn.Linear(64, 48) for _ in range(2)]
    gate, up = (linear(states) for linear in linears)
    block = nn.ModuleDict({"gate_proj": linears[0], "up_proj": linears[1]})
    block.get_input_embeddings = lambda: nn.Embedding(1, 1)
    with torch.inference_mode():
        assert pack_weights(block) == 2
        found = block["gate_proj"].packed.gated(states)
        torch.testing.assert_close(found, F.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_model_in_float32_on_the_kernels_gives_the_logits_that_it_gives_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "head_dim" in ARCHITECTURES[name][1]:
        monkeypatch.setitem(ARCHITECTURES[name][1], "head_dim", 32)  # which causal_attend takes
    model = build_tiny(name)
    model.resize_token_embeddings(320, mean_resizing=False)  # whole blocks
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        expected = model(ids).logits[0]
        assert pack_weights(model) > 0
        torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-4, atol=1e-4)
        forward = FlatForward(model)
        assert (forward._program is not None) == (name in ("llama", "qwen2", "qwen3"))
        found = fed_one_by_one(forward, ids[0].tolist(), given=30)
    torch.testing.assert_close(found, expected[29:], rtol=1e-4, atol=1e-4)


def test_what_does_not_fill_blocks_or_is_in_another_precision_stays() -> None:
    layers = {"odd": nn.Linear(48, 32), "outputs": nn.Linear(32, 48), "precise": nn.Linear(32, 32).double()}
    layers["of another library"] = nn.Linear(32, 32)
    layers["of another library"].forward = lambda input: input.round()  # as one that rounds its inputs
    block = nn.ModuleDict({**layers, "fits": nn.Linear(32, 64)})
    block.get_input_embeddings = lambda: nn.Embedding(1, 1)
    assert pack_weights(block) == 1
    assert isinstance(block["fits"], PackedLinear)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_bitsandbytes_layers_in_float32_keeps_its_head_and_torchs_operators(
    tmp_path: Path,
) -> None:
    """As the plan says: a head that is also the embedding is held once."""
    model = build_tiny("llama")
    model.resize_token_embeddings(320, mean_resizing=False)  # whole blocks
    model.save_pretrained(tmp_path)
    quant = replace(QUANTS["nf4"], dtype=Dtype.float32, compute_dtype=Dtype.float32)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization(quant)
    )
    assert pack_weights(loaded) == 0
    assert FlatForward(loaded)._kernels is None
    assert pack_weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) > 0
