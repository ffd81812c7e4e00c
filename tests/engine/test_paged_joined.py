"""Products of one input in one launch, by 8- and 4-bit weights, run by Triton's interpreter on a CPU.

In float16: the interpreter multiplies bfloat16 as if its bits were whole numbers.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from interpreted import interpreted, off, random
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.fused_model import FusedModel

SIZES = (128, 64, 64)
Make = Callable[[int, int, bool, int], Any]


def eight(inputs: int, outputs: int, bias: bool, seed: int) -> Any:
    """A layer that has its own quantization."""
    made = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    made.load_state_dict(
        {
            "weight": random(outputs, inputs, seed=seed),
            **({"bias": random(outputs, seed=seed + 50)} if bias else {}),
        }
    )
    made = made.to("cpu").half().requires_grad_(False)
    return interpreted("triton_eight_bits").EightBitLinear(made)


def four(nested: bool) -> Make:
    def make(inputs: int, outputs: int, bias: bool, seed: int) -> Any:
        made = bnb.nn.Linear4bit(
            inputs, outputs, bias, torch.float16, quant_type="nf4", compress_statistics=nested
        )
        made.weight = bnb.nn.Params4bit(
            random(outputs, inputs, seed=seed),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=nested,
        )
        made = made.to("cpu").requires_grad_(False)
        if bias:
            made.bias.data = random(outputs, seed=seed + 50)
        return interpreted("triton_four_bits").FourBitLinear(made)

    return make


KINDS = {
    "8 bits": ("triton_eight_bits", eight),
    "4 bits": ("triton_four_bits", four(False)),
    "4 bits, nested": ("triton_four_bits", four(True)),
}


@pytest.fixture(params=KINDS)
def kind(request) -> tuple[ModuleType, Make]:
    name, make = KINDS[request.param]
    return interpreted(name), make


def split(module: ModuleType, monkeypatch: pytest.MonkeyPatch, parts: int, rows: int = 128) -> None:
    """Split all inputs in so many; otherwise joined products are split less than single ones."""
    monkeypatch.setattr(interpreted("triton_products"), "MOST_SPLITS", parts)
    monkeypatch.setattr(module, "SHAPE", replace(module.SHAPE, programs=1 << 20, outputs=64, rows=rows))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 17, 128])
def test_joined_products_are_the_single_ones_bit_for_bit(kind, monkeypatch, rows, parts):
    module, make = kind
    split(module, monkeypatch, parts)
    layers = [make(192, size, rows != 17, seed) for seed, size in enumerate(SIZES)]
    input = random(1, rows, 192, seed=9)
    single = [layer(input) for layer in layers]
    for count in (2, 3):  # the second time the counters are back at zero
        made = type(layers[0]).joined(layers[:count], input)
        assert len(made) == count
        assert all(output.is_contiguous() for output in made)
        assert all(torch.equal(*both) for both in zip(made, single, strict=False))


def test_a_split_product_is_the_whole_one_and_leaves_its_counters_at_zero(kind, monkeypatch):
    module, make = kind
    layers = [make(192, size, True, seed) for seed, size in enumerate(SIZES)]
    input = random(20, 192, seed=9)
    outputs = []
    for parts, rows in ((1, 128), (2, 128), (5, 16)):  # of three blocks
        split(module, monkeypatch, parts, rows)
        outputs.append(type(layers[0]).joined(layers, input))
    for made in outputs[1:]:
        assert all(off(a, b) < 1e-3 for a, b in zip(made, outputs[0], strict=True))
    counters = interpreted("triton_products")._counters(torch.device("cpu"))
    assert not counters.any()


def test_a_row_does_not_depend_on_how_many_rows_are_joined(kind):
    _, make = kind
    layers = [make(192, size, False, seed) for seed, size in enumerate(SIZES)]
    input = random(40, 192, seed=9)
    all_rows, few = (type(layers[0]).joined(layers, input[:rows]) for rows in (40, 6))
    assert all(torch.equal(a[:6], b) for a, b in zip(all_rows, few, strict=True))


def test_layers_that_differ_in_their_bias_are_called_one_by_one(kind):
    _, make = kind
    layers = [make(64, 64, bias, 1) for bias in (True, False)]
    input = random(5, 64, seed=9)
    made = type(layers[0]).joined(layers, input)
    assert all(torch.equal(a, layer(input)) for a, layer in zip(made, layers, strict=True))


def test_more_rows_than_the_kernel_takes_are_multiplied_as_before(kind):
    _, make = kind
    layers = [make(64, 64, False, seed) for seed in range(2)]
    input = random(129, 64, seed=9)
    made = type(layers[0]).joined(layers, input)
    assert all(torch.equal(a, layer(input)) for a, layer in zip(made, layers, strict=True))


class Attends:
    """A batch whose tokens see themselves alone."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, rotation: Any
    ) -> Tensor:
        return query + key.mean(1, keepdim=True) + value.mean(1, keepdim=True)


def test_a_fused_model_gives_the_logits_of_its_layers_one_by_one(kind, monkeypatch, tiny_model):
    module, make = kind
    model = copy.deepcopy(tiny_model("llama")).half()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for seed, (name, child) in enumerate(list(part.named_children())):
                whole = (
                    isinstance(child, nn.Linear) and child.out_features % 64 == child.in_features % 64 == 0
                )
                if whole:
                    setattr(part, name, make(child.in_features, child.out_features, False, seed))
    split(module, monkeypatch, 1)
    fused = FusedModel(model, interpreted("triton_kernels"))
    ids, places = torch.arange(3, 9)[None], torch.arange(6)[None]
    calls, own = [], module.products
    monkeypatch.setattr(module, "products", lambda i, w: calls.append(len(w)) or own(i, w))
    joined = fused(ids, places, 0, Attends())
    assert {2, 3} & set(calls)
    monkeypatch.delattr(next(type(m) for m in model.modules() if hasattr(type(m), "joined")), "joined")
    assert torch.equal(fused(ids, places, 0, Attends()), joined)
    assert F.softmax(joined.float(), -1).isfinite().all()
