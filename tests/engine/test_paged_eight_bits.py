"""Products with bitsandbytes' 8-bit weights on a GPU, run by Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from interpreted import interpreted, off, random
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.paged.replaced import replace_linears


@pytest.fixture(scope="module")
def eight_bits() -> ModuleType:
    return interpreted("triton_eight_bits")


def layer(inputs: int, outputs: int, bias: bool = True) -> Any:
    """A layer of bitsandbytes', quantized by itself."""
    made = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False)
    made.load_state_dict(
        {"weight": random(outputs, inputs, seed=1), **({"bias": random(outputs, seed=2)} if bias else {})}
    )
    return made.to("cpu").half().requires_grad_(False)


def dequantized(linear: Any) -> Tensor:
    scales: Tensor = linear.weight.SCB[:, None]
    return linear.weight.data.float() * scales / 127


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 64, 64), (5, 128, 192), (20, 64, 256), (130, 192, 320)]
)
def test_a_product_is_that_of_the_dequantized_weight(eight_bits, rows, outputs, inputs, bias):
    linear = layer(inputs, outputs, bias)
    input = random(1, rows, inputs, seed=3)
    wanted = F.linear(input.float(), dequantized(linear), linear.bias.float() if bias else None)
    made = eight_bits.EightBitLinear(linear)(input)
    assert made.dtype == torch.float16
    assert made.shape == wanted.shape
    assert off(made, wanted) < 4e-4


def test_layers_are_replaced_once_and_only_those_that_fill_blocks(eight_bits):
    model = nn.Sequential(layer(128, 64), layer(64, 96), nn.Linear(96, 64), layer(64, 64, bias=False))
    assert [replace_linears(model, eight_bits.EightBitLinear, torch.float16) for _ in range(2)] == [2, 0]
    kinds = [type(child).__name__ for child in model]
    assert kinds == ["EightBitLinear", "Linear8bitLt", "Linear", "EightBitLinear"]


def test_a_layer_that_has_seen_a_pass_is_replaced(eight_bits):
    linear, input = layer(64, 64), random(3, 64)
    expected = eight_bits.EightBitLinear(linear)(input)
    model = nn.Sequential(linear)
    model(input)
    assert linear.weight.SCB is None, "bitsandbytes has moved it to the layer's state"
    assert replace_linears(model, eight_bits.EightBitLinear, torch.float16) == 1
    assert torch.equal(model(input), expected)


def test_a_layer_beside_an_adapter_stays(eight_bits):
    model = nn.Sequential(layer(64, 64), layer(64, 64))
    model.is_loaded_in_8bit = True  # as transformers says it to peft
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    assert replace_linears(adapted, eight_bits.EightBitLinear, torch.float16) == 1
    assert type(adapted.base_model.model[0]).__name__ == "Linear8bitLt"


def test_a_row_does_not_depend_on_how_many_there_are(eight_bits):
    linear = eight_bits.EightBitLinear(layer(320, 64))
    input = random(40, 320, seed=5)
    assert torch.equal(linear(input)[:6], linear(input[:6]))


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from interpreted import products_source, runs_on
from pipeline.engine.paged import triton_eight_bits as eight_bits

fixed = {"BIASED": True, "OUTPUTS": 64, "INPUTS": 128, "ROWS": int(sys.argv[2])}
kinds = {"states": "*bf16", "codes": ("*i8",) * 3, "scales": ("*fp32",) * 3, "biases": ("*bf16",) * 3}
source = products_source(eight_bits._products_kernel, kinds, fixed)
made = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4, "num_stages": 4})
ptx = made.asm["ptx"]
print(ptx.count("wgmma.mma_async" if sys.argv[1] == "90" else "mma.sync"))
assert not runs_on(ptx)
assert "cp.async.cg.shared.global" in ptx, "16 bytes at a time, whichever weight is picked"
"""


@pytest.mark.parametrize(("capability", "rows"), [(90, 16), (90, 128), (80, 64)])
def test_it_compiles_to_tensor_cores(eight_bits, capability, rows):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(capability), str(rows)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(made.stdout) >= 8, "one product over 128 inputs is eight of 16"
