"""A product of 8-bit blocks is that of the weight that bitsandbytes stores, on every kind of CPU."""

# ruff: noqa: E402  without the kernels, what they are made of cannot be imported either
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.cpu import load_kernels

kernels = load_kernels()
if kernels is None or kernels.products is None:
    pytest.skip("the kernels multiply on none but an x86 CPU with AVX2", allow_module_level=True)

from bitsandbytes.nn import Linear8bitLt
from cpu_products import PRODUCTS, ULP, check_ends, check_not_finite, error, packed

from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.kernels.blocks import IN_WHOLE_NUMBERS
from pipeline.engine.cpu.packing import PackedLinear, pack_weights
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.models.loading import load_model


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to multiply."""
    monkeypatch.setattr(kernels, "products", PRODUCTS[request.param]())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantized(inputs: int, outputs: int, bias: bool = True) -> Any:
    """A layer as bitsandbytes makes it of random weights."""
    layer = Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False, threshold=6.0).bfloat16()
    offsets = {"bias": random(outputs)} if bias else {}
    layer.load_state_dict({"weight": random(outputs, inputs, seed=outputs), **offsets})
    return layer.to("cpu").eval()


def weight_of(layer: Any) -> Tensor:
    """The weight that the layer stores, in float32."""
    codes, scales = layer.weight.data, layer.weight.SCB
    return codes.float() * scales[:, None] / 127


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (576, 96), (832, 64)])
def test_a_product_is_that_of_the_stored_weights_and_a_row_the_same_beside_any_others(
    inputs: int, outputs: int, bias: bool
) -> None:
    """Inputs that fill no part, and several: rows by the registers, and by a chunk; outliers among them."""
    layer = quantized(inputs, outputs, bias)
    weight, offsets = weight_of(layer).double(), layer.bias.double() if bias else None
    found = packed(own=layer)["own"]
    assert isinstance(found, PackedLinear)
    states = random(530, inputs)
    states[0, 3], states[1, -1], states[2] = 60, -1000, 0
    together = found(states)
    expected = F.linear(states.double(), weight, offsets)
    for own in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, None)):
        assert error(together[own], expected[own]) <= 1.001 * error(expected[own].bfloat16(), expected[own])
    # In whole numbers an input is rounded in parts of the largest in its block.
    first, atol = (3, 2.0**-14) if IN_WHOLE_NUMBERS else (0, 2.0**-20)
    torch.testing.assert_close(together[first:].double(), expected[first:], rtol=ULP, atol=inputs**0.5 * atol)
    for rows in (1, 2, 3, 4, 5, 12, 13, 40):
        assert torch.equal(found(states[:rows]), together[:rows])
        assert torch.equal(found(states[-rows:]), together[-rows:])


@pytest.mark.usefixtures("product")
def test_siblings_and_gates_are_those_of_the_stored_weights() -> None:
    names = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
    layers = {name: quantized(192, outputs) for name, outputs in names.items()}
    plain = {name: (weight_of(layer), layer.bias.float()) for name, layer in layers.items()}
    found = packed(**layers)
    for rows in (1, 21):
        states = random(rows, 192)
        for name in names:
            expected = F.linear(states.float(), *plain[name])
            torch.testing.assert_close(found[name](states).float(), expected, rtol=ULP, atol=1e-4)
        gated = found["gate_proj"].packed.gated(states)
        gate, up = found["gate_proj"](states), found["up_proj"](states)
        torch.testing.assert_close(gated, F.silu(gate) * up, rtol=2 * ULP, atol=1e-3)


@pytest.mark.usefixtures("product")
def test_the_largest_sums_fit_and_the_smallest_count() -> None:
    signs = random(32, 64).sign()
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0).bfloat16()
    layer.load_state_dict({"weight": signs})
    product = packed(own=layer.to("cpu").eval())["own"]
    check_ends(product, signs)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_its_own_row(number: float) -> None:
    check_not_finite(packed(own=quantized(128, 32))["own"], random(5, 128), number)


def test_what_does_not_fill_blocks_stays_with_bitsandbytes() -> None:
    odd = {"inputs": quantized(48, 32), "outputs": quantized(64, 48)}
    block = packed(**odd, fits=quantized(64, 32))
    assert [name for name, layer in block.items() if isinstance(layer, PackedLinear)] == ["fits"]
    for name in odd:
        assert torch.isfinite(block[name](random(3, block[name].in_features))).all()


def test_weights_are_not_held_twice() -> None:
    layer = quantized(64, 32)
    found = packed(own=layer)["own"]
    assert layer.weight.nbytes == 0
    assert layer.weight.CB is None
    assert layer.weight.SCB is None
    assert found.packed.weight.numbers.nbytes == 64 * 32


def test_a_quantized_model_runs_as_a_program_and_is_nearer_to_its_weights_than_bitsandbytes(
    smollm2_dir: Path,
) -> None:
    """bitsandbytes rounds each row's inputs to 8 bits; our products take them as they are."""
    model = load_model(ModelConfig(str(smollm2_dir), device_map="cpu"), QuantConfig(QuantMethod.int8), "none")
    ids = torch.arange(500, 540)[None]
    with torch.inference_mode():
        wide, ours = copy.deepcopy(model.model), copy.deepcopy(model.model)
        for path, layer in list(wide.named_modules()):
            if isinstance(layer, Linear8bitLt):
                parent, _, name = path.rpartition(".")
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
                linear.weight.data = weight_of(layer)
                setattr(wide.get_submodule(parent), name, linear)
        expected = nn.Module.float(wide)(ids).logits[0]
        assert pack_weights(ours) == 211
        found = ours(ids).logits[0].float()
        assert FlatForward(ours)._program is not None
        theirs = model.model(ids).logits[0].float()
    assert (found - expected).abs().mean() < 0.5 * (theirs - expected).abs().mean()
