"""A product of 4-bit blocks is that of the weight that bitsandbytes dequantizes, on every kind of CPU."""

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

import bitsandbytes.functional as bnb
from bitsandbytes.nn import Linear4bit
from cpu_products import PRODUCTS, packed

from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.packing import PackedLinear, pack_weights
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.models.loading import load_model

TYPES = [(name, nested) for name in ("nf4", "fp4") for nested in (False, True)]


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to multiply."""
    monkeypatch.setattr(kernels, "products", PRODUCTS[request.param]())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantized(
    inputs: int, outputs: int, kind: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A layer as bitsandbytes makes it of random weights, with a bias."""
    layer = Linear4bit(inputs, outputs, compute_dtype=dtype, quant_type=kind, compress_statistics=nested).to(
        dtype
    )
    layer.load_state_dict({"weight": random(outputs, inputs, seed=outputs), "bias": random(outputs)})
    return layer.to("cpu")


def plain(layer: Any) -> nn.Linear:
    """The same layer with the weight that bitsandbytes dequantizes."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).bfloat16()
    linear.bias = layer.bias
    return linear


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(("kind", "nested"), TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 96), (832, 64)])
def test_a_product_has_the_bits_of_the_dequantized_weights(
    kind: str, nested: bool, inputs: int, outputs: int
) -> None:
    """Inputs that fill no part, one and a half parts, and many: rows by the registers, and by a chunk."""
    layer = quantized(inputs, outputs, kind, nested)
    expected = plain(layer)
    same = packed(own=copy.deepcopy(expected))["own"]
    found = packed(own=layer)["own"]
    assert isinstance(found, PackedLinear)
    for rows in (1, 2, 3, 5, 12, 40, 530):
        states = random(rows, inputs)
        assert torch.equal(found(states), same(states))
        wide = F.linear(states.float(), expected.weight.float(), expected.bias.float())
        torch.testing.assert_close(found(states).float(), wide, rtol=2.0**-7, atol=inputs**0.5 * 2.0**-11)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(("kind", "nested"), TYPES)
def test_siblings_and_gates_are_those_of_the_dequantized_weights(kind: str, nested: bool) -> None:
    names = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
    layers = {name: quantized(192, outputs, kind, nested) for name, outputs in names.items()}
    same, found = packed(**{name: plain(layer) for name, layer in layers.items()}), packed(**layers)
    for rows in (1, 21):
        states = random(rows, 192)
        for name in names:
            assert torch.equal(found[name](states), same[name](states))
        gated = [block["gate_proj"].packed.gated(states) for block in (found, same)]
        assert torch.equal(*gated)


def test_what_does_not_fill_blocks_stays_with_bitsandbytes() -> None:
    odd = {"inputs": quantized(96, 32), "outputs": quantized(64, 48)}
    other = {"dtype": quantized(64, 32, dtype=torch.float32), "fits": quantized(64, 32)}
    block = packed(**odd, **other)
    assert [name for name, layer in block.items() if isinstance(layer, PackedLinear)] == ["fits"]
    for name in odd:
        assert torch.isfinite(block[name](random(3, block[name].in_features))).all()


def test_siblings_of_two_kinds_are_packed_one_by_one() -> None:
    block = packed(gate_proj=quantized(64, 32, "nf4"), up_proj=quantized(64, 32, "fp4"))
    assert all(isinstance(layer, PackedLinear) for layer in block.values())


def test_codes_and_scales_are_not_held_twice() -> None:
    layer = quantized(64, 32)
    scales = layer.weight.quant_state.absmax
    found = packed(own=layer)["own"]
    assert layer.weight.nbytes == 0
    assert layer.weight.quant_state is None
    assert layer.quant_state is None
    assert found.packed.weight.numbers.nbytes == 64 * 32 // 2 + 4 * len(scales)


@pytest.mark.parametrize(("kind", "nested"), TYPES)
def test_a_quantized_model_runs_as_a_program_and_its_logits_are_bitsandbytes_own(
    smollm2_dir: Path, kind: str, nested: bool
) -> None:
    """Our products and bitsandbytes' part from float32 ones on the same weights by the same rounding."""
    quant = QuantConfig(QuantMethod[kind], double_quant=nested)
    model = load_model(ModelConfig(str(smollm2_dir), device_map="cpu"), quant, "none").model
    ids = torch.arange(500, 540)[None]
    with torch.inference_mode():
        wide = copy.deepcopy(model)
        for path, layer in list(wide.named_modules()):
            if isinstance(layer, Linear4bit):
                parent, _, name = path.rpartition(".")
                setattr(wide.get_submodule(parent), name, plain(layer))
        expected = nn.Module.float(wide)(ids).logits[0]
        theirs = copy.deepcopy(model)(ids).logits[0].float()
        assert pack_weights(model) == 211
        found = model(ids).logits[0].float()
        assert FlatForward(model)._program is not None
    assert (found - expected).abs().mean() < 1.25 * (theirs - expected).abs().mean()
