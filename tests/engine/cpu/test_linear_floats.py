"""A product in float32 of few rows is the linear layer's, and the weight stays as it lies."""

# ruff: noqa: E402  without the kernels, what they are made of cannot be imported either

import pytest
import torch
from conftest import build_tiny
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.cpu import load_kernels

kernels = load_kernels()
if kernels is None or kernels.products is None:
    pytest.skip("the kernels multiply on none but an x86 CPU with AVX2", allow_module_level=True)


from pipeline.engine.cpu.packing import FloatLinear, pack_weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 4), (576, 36), (1040, 320)])
def test_float32_is_the_linear_layers_and_a_row_the_same_beside_any_others(
    inputs: int, outputs: int, bias: bool
) -> None:
    """Outputs that fill no task, one and a part, and several; rows that fill no registers, and several groups."""
    states, weight = random(64, inputs), random(outputs, inputs, seed=1)
    offsets = random(outputs, seed=2) if bias else None
    together = kernels.linear_in_float32(states, weight, offsets)
    expected = F.linear(states.double(), weight.double(), None if offsets is None else offsets.double())
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=1e-4)
    for rows in (1, 2, 3, 5, 7, 13, 40):
        assert torch.equal(kernels.linear_in_float32(states[:rows], weight, offsets), together[:rows])


def test_float32_takes_any_view() -> None:
    states, weight = random(32, 8, 2).permute(2, 1, 0), random(8, 32, seed=1)
    found = kernels.linear_in_float32(states, weight, None)
    assert torch.equal(found, kernels.linear_in_float32(states.contiguous(), weight, None))
    part = random(8, 48)[:, :32]
    assert torch.equal(
        kernels.linear_in_float32(part, weight, None),
        kernels.linear_in_float32(part.contiguous(), weight, None),
    )


def test_a_float32_models_layers_keep_their_weights_and_say_the_same() -> None:
    model = build_tiny("llama")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
        assert pack_weights(model) == len(layers)
        found = model(ids).logits
    assert sum(isinstance(layer, FloatLinear) for layer in model.modules()) == len(layers)
    assert {parameter.data_ptr() for parameter in model.parameters()} == weights
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fill_registers_or_is_in_another_precision_stays() -> None:
    layers = {"odd": nn.Linear(24, 8), "outputs": nn.Linear(16, 6), "precise": nn.Linear(16, 8).double()}
    layers["of another library"] = nn.Linear(16, 8)
    layers["of another library"].forward = lambda input: input[
        ..., :8
    ].round()  # as one that rounds its inputs
    block = nn.ModuleDict({**layers, "fits": nn.Linear(16, 8)})
    block.get_input_embeddings = lambda: nn.Embedding(1, 1)
    assert pack_weights(block) == 1
    assert isinstance(block["fits"], FloatLinear)
