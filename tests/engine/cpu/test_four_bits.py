"""A product of 4-bit blocks is as near to the stored weights' own as one in bf16, on every kind of CPU."""

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
from cpu_products import PRODUCTS, ULP, check_ends, check_not_finite, error, packed

from pipeline.config.quant import QuantConfig, QuantMethod
from pipeline.config.schema import ModelConfig
from pipeline.engine.cpu.kernels.blocks import IN_WHOLE_NUMBERS
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


def exact(layer: Any, states: Tensor) -> Tensor:
    """The product in float64 with the weight that bitsandbytes dequantizes, not rounded to bf16."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    weight = bnb.dequantize_4bit(layer.weight.data, state)
    return F.linear(states.double(), weight.double(), layer.bias.double())


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(("kind", "nested"), TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 96), (832, 64)])
def test_a_product_is_as_exact_as_one_in_bf16_and_a_row_the_same_beside_any_others(
    kind: str, nested: bool, inputs: int, outputs: int
) -> None:
    """Inputs that fill no part, one and a half parts, and many: rows by the registers, and by a chunk; outliers."""
    layer = quantized(inputs, outputs, kind, nested)
    states = random(530, inputs)
    states[0, 3], states[1, -1], states[2] = 60, -1000, 0
    expected, in_bf16 = exact(layer, states), packed(own=plain(layer))["own"](states)
    wide = F.linear(states.float(), plain(layer).weight.float(), layer.bias.float())
    product = packed(own=layer)["own"]
    assert isinstance(product, PackedLinear)
    together = product(states)
    if not IN_WHOLE_NUMBERS:
        assert torch.equal(together, in_bf16)
    for row in range(3):
        assert error(together[row], expected[row]) <= error(in_bf16[row], expected[row])
    assert error(together[3:], expected[3:]) <= error(in_bf16[3:], expected[3:])
    # In whole numbers a weight is rounded in parts of the largest in its block, in bf16 before the product.
    near, atol = (expected, 2.0**-9) if IN_WHOLE_NUMBERS else (wide, 2.0**-11)
    torch.testing.assert_close(
        together[3:].double(), near[3:].double(), rtol=2 * ULP, atol=inputs**0.5 * atol
    )
    for rows in (1, 2, 3, 4, 5, 12, 13, 40):
        assert torch.equal(product(states[:rows]), together[:rows])
        assert torch.equal(product(states[-rows:]), together[-rows:])


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(("kind", "nested"), TYPES)
def test_siblings_and_gates_are_those_of_the_layers_alone(kind: str, nested: bool) -> None:
    names = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
    layers = {name: quantized(192, outputs, kind, nested) for name, outputs in names.items()}
    in_bf16 = packed(**{name: plain(layer) for name, layer in layers.items()})
    alone = {name: packed(own=copy.deepcopy(layer))["own"] for name, layer in layers.items()}
    found = packed(**layers)
    for rows in (1, 21):
        states = random(rows, 192)
        for name in names:
            assert torch.equal(found[name](states), alone[name](states))
        gated = found["gate_proj"].packed.gated(states)
        expected = F.silu(alone["gate_proj"](states)) * alone["up_proj"](states)
        torch.testing.assert_close(gated, expected, rtol=2 * ULP, atol=1e-3)
        if not IN_WHOLE_NUMBERS:
            assert torch.equal(gated, in_bf16["gate_proj"].packed.gated(states))


@pytest.mark.usefixtures("product")
def test_the_largest_sums_fit_and_the_smallest_count() -> None:
    signs = random(32, 64).sign()
    layer = Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False)
    layer.load_state_dict({"weight": signs})
    product = packed(own=layer.to("cpu"))["own"]
    check_ends(product, signs)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_its_own_row(number: float) -> None:
    check_not_finite(packed(own=quantized(128, 32))["own"], random(5, 128), number)


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
