"""Products with bitsandbytes' 4-bit weights on a GPU, run by Triton's interpreter on a CPU."""

import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import numpy as np
import peft
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from interpreted import interpreted, off, random
from torch import nn
from torch.nn import functional as F

from pipeline.engine.paged.replaced import replace_linears


@pytest.fixture(scope="module")
def four_bits() -> ModuleType:
    return interpreted("triton_four_bits")


def layer(kind: str, inputs: int, outputs: int, bias: bool = True, nested: bool = True) -> Any:
    """A layer of bitsandbytes', quantized by itself."""
    made = bnb.nn.Linear4bit(
        inputs, outputs, bias, torch.float16, quant_type=kind, compress_statistics=nested
    )
    made.weight = bnb.nn.Params4bit(
        random(outputs, inputs, seed=1), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    made = made.to("cpu")
    if bias:
        made.bias.data = random(outputs, seed=2)
    return made.requires_grad_(False)


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(5, 128, 192), (20, 64, 64), (130, 192, 320)])
def test_a_product_is_that_of_the_dequantized_weight(four_bits, rows, outputs, inputs, kind, nested):
    linear = layer(kind, inputs, outputs, nested=nested)
    state = linear.weight.quant_state
    weight = bnb_functional.dequantize_4bit(linear.weight.data, state)
    input = random(rows, inputs, seed=3)
    [made] = four_bits.products(
        input, [four_bits.FourBitWeight(linear.weight.data, state, outputs, linear.bias)]
    )
    assert made.dtype == torch.float16
    assert off(made, F.linear(input.float(), weight.float(), linear.bias.float())) < 4e-4


def test_layers_are_replaced_once_and_only_those_that_fill_blocks(four_bits):
    model = nn.Sequential(
        layer("nf4", 128, 64),
        layer("nf4", 64, 96, bias=False),
        nn.Linear(96, 64),
        layer("fp4", 64, 64, bias=False),
    )
    assert [replace_linears(model, four_bits.FourBitLinear) for _ in range(2)] == [2, 0]
    kinds = [type(child).__name__ for child in model]
    assert kinds == ["FourBitLinear", "Linear4bit", "Linear", "FourBitLinear"]


@pytest.mark.parametrize("added", [100, float("nan"), None], ids=["wrong", "NaN", "fails"])
def test_no_layer_is_replaced_where_the_first_proves_wrong(four_bits, monkeypatch, caplog, added):
    own = four_bits.products

    def wrong(input: Any, weights: Any) -> Any:
        if added is None:
            raise RuntimeError("no kernel image is available")
        made = own(input, weights)
        if len(input) == 17:
            made[0].view(-1)[-1] += added
        return made

    monkeypatch.setattr(four_bits, "products", wrong)
    model = nn.Sequential(layer("nf4", 64, 64), layer("nf4", 64, 64))
    assert replace_linears(model, four_bits.FourBitLinear) == 0
    assert {type(child).__name__ for child in model} == {"Linear4bit"}
    assert "FourBitLinear is not used on this GPU" in caplog.text


def test_a_layer_beside_an_adapter_stays(four_bits):
    model = nn.Sequential(layer("nf4", 64, 64), layer("nf4", 64, 64))
    model.is_loaded_in_4bit = True  # as transformers says it to peft
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert replace_linears(adapted, four_bits.FourBitLinear) == 1
    assert type(adapted.base_model.model[0]).__name__ == "Linear4bit"


@pytest.mark.parametrize("rows", [1, 3, 4, 128, 129])
def test_a_replaced_layer_leaves_few_and_many_rows_to_bitsandbytes(four_bits, monkeypatch, rows):
    own, calls = four_bits.products, []
    model = nn.Sequential(layer("nf4", 64, 64))
    input = random(1, rows, 64, seed=4)
    expected = model(input)
    replace_linears(model, four_bits.FourBitLinear)
    monkeypatch.setattr(four_bits, "products", lambda *args: calls.append(1) or own(*args))
    made = model(input)
    assert made.shape == expected.shape
    assert off(made, expected) < 2e-3
    assert len(calls) == (4 <= rows <= 128)


def test_a_row_does_not_depend_on_how_many_there_are(four_bits):
    linear = layer("nf4", 320, 64)
    weight = four_bits.FourBitWeight(linear.weight.data, linear.weight.quant_state, 64)
    input = random(40, 320, seed=5)
    assert torch.equal(four_bits.products(input, [weight])[0][:6], four_bits.products(input[:6], [weight])[0])


def permute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """PTX's prmt: each of four bytes is one of eight, by the low three bits of a selector's four."""
    pool = [(side >> (8 * byte)) & 255 for side in (a, b) for byte in range(4)]
    made = np.zeros(np.broadcast_shapes(a.shape, b.shape, selectors.shape), np.int64)
    for byte in range(4):
        picked = (selectors >> (4 * byte)) & 15
        assert (picked < 8).all(), "a fourth bit would copy signs"
        made |= np.choose(picked, np.broadcast_arrays(*pool)) << (8 * byte)
    return made


def run_ptx(text: str, word: np.ndarray) -> list[np.ndarray]:
    """What the few instructions in use leave in $0 to $7, for all these words in $8."""
    values = {"$8": word}
    operations = {
        "mov": lambda a: a, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b, "or": lambda a, b: a | b,
        "prmt": permute,
    }  # fmt: skip
    for name, arguments in re.findall(r"(\w+)\.[bu]32 ([^;]+);", text):
        target, *sources = arguments.split(", ")
        if not sources or target.startswith("word,"):
            continue  # a declaration
        read = [values[s] if s in values else np.asarray(int(s, 0), np.int64) for s in sources]
        values[target] = operations[name](*read)
    return [values[f"${i}"] for i in range(8)]


def test_permutations_look_up_every_code_of_every_word(four_bits):
    codes = bnb_functional.get_4bit_type("nf4", device="cpu").numpy()
    words = np.arange(1 << 16, dtype=np.int64)
    others = words[::-1]
    text = re.sub(r"\.reg[^;]+;", "", four_bits.permutations(tuple(codes.tolist())))
    made = run_ptx(text, words | others << 16)
    for place in range(4):
        for part, source in enumerate((words, others)):
            found = made[2 * place + part].astype(np.uint32).view(np.float32)
            assert np.array_equal(found, codes[(source >> (4 * place)) & 15])


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from interpreted import products_source, runs_on
from pipeline.engine.paged import triton_four_bits as four_bits

nested, rows = sys.argv[1] == "True", int(sys.argv[2])
fixed = {"NESTED": nested, "PERMUTATIONS": four_bits.permutations(tuple(i / 16 for i in range(16)))}
fixed |= {"BIASED": True, "OUTPUTS": 64, "ROWS": rows}
kinds = {"states": "*bf16", "words": ("*i16",) * 3, "scales": ("*u8" if nested else "*fp32",) * 3}
kinds |= dict.fromkeys(("scale_codes", "scale_scales", "offsets"), ("*fp32",) * 3)
kinds |= {"codes": "*fp32", "biases": ("*bf16",) * 3}
source = products_source(four_bits._products_kernel, kinds, fixed)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
print(made.asm["ptx"].count("wgmma.mma_async"))
assert not runs_on(made.asm["ptx"])
"""


@pytest.mark.parametrize(("nested", "rows"), [(True, 16), (False, 128)])
def test_it_compiles_to_the_tensor_cores_of_hopper(four_bits, nested, rows):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(nested), str(rows)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(made.stdout) >= 4, "one product over 64 inputs is four of 16"
