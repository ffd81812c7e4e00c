"""Multiply by bitsandbytes' 8-bit weights as they lie in memory, on GPUs.

LLM.int8 rounds inputs to 8 bits, looks for outliers in each product, and waits for the answer: the host holds up
a card that could read these weights in half of the time that bfloat16's take, and a step cannot be recorded. Here
the inputs stay as they are, as on a CPU: a whole number of 8 bits is exact in half precision, tensor cores sum
in float32, and an output's scale comes to its sum. A row does not depend on those beside it.

TRITON_INTERPRET=1 runs the kernel on a CPU. Importing this module raises ImportError without Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.model_facts import is_adapted, outside_adapters
from pipeline.engine.paged.triton_splits import MOST_ROWS, OUTPUTS, Shape, add_up

INPUTS = 64  # a layer has a multiple of it
SHAPE = Shape(outputs=128, inputs=64, warps=8, stages=3, programs=256)  # the fastest on an H200
LARGEST_CODE = 127  # stands for a row's largest weight, which bitsandbytes keeps as its scale


class EightBitLinear(nn.Module):
    """Stand in for a Linear8bitLt. [.., in] → [.., out]."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # [N, K] int8
        largest = _largest(linear)
        assert largest is not None
        self._scales = largest / LARGEST_CODE  # [N] float32

    def forward(self, input: Tensor) -> Tensor:
        codes = self.weight.data
        if input.numel() // input.shape[-1] <= MOST_ROWS:
            return product(input, codes, self._scales, self.bias)
        weight = input.new_empty(codes.shape)
        return F.linear(input, torch.mul(codes, self._scales[:, None], out=weight), self.bias)


def replace_linears(model: nn.Module) -> int:
    """Replace the layers of a model in half precision that the kernel can stand in for; return how many."""
    count = 0
    for module in outside_adapters(model):
        for name, child in module.named_children():
            if not is_adapted(child) and _can_replace(child):
                setattr(module, name, EightBitLinear(child))
                count += 1
    return count


def _can_replace(module: Any) -> bool:
    """Say whether a layer of bitsandbytes' fills whole blocks."""
    if type(module).__name__ != "Linear8bitLt" or _largest(module) is None:
        return False
    return bool(module.out_features % OUTPUTS == 0 and module.in_features % INPUTS == 0)


def _largest(linear: Any) -> Tensor | None:
    """Return the largest weight of each row, [N] float32, which its first pass moves from the weight to the state."""
    largest: Tensor | None = getattr(linear.weight, "SCB", None)
    return linear.state.SCB if largest is None else largest


def product(input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by codes, [N, K] int8, and scales, [N] float32. [.., K] → [.., N]."""
    states = input.reshape(-1, input.shape[-1]).contiguous()
    (rows, inputs), outputs = states.shape, len(codes)
    wide, deep, tile, splits = SHAPE.split(rows, outputs, inputs)
    parts = states.new_empty(splits, rows, outputs, dtype=torch.float32)
    _product_kernel[(outputs // wide, triton.cdiv(rows, tile), splits)](
        states, codes, parts, rows, outputs, inputs, splits, OUTPUTS=wide, INPUTS=deep, ROWS=tile,
        num_warps=SHAPE.warps, num_stages=SHAPE.stages,
    )  # fmt: skip
    return add_up(parts, input.dtype, scales, bias).view(*input.shape[:-1], outputs)


@triton.jit(do_not_specialize=["rows", "splits"])
def _product_kernel(
    states, codes, parts, rows, outputs, inputs, splits,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by some outputs' codes, over one split of the inputs. → parts [splits, rows, outputs]."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = (m < rows)[None, :]
    each = tl.cdiv(inputs // INPUTS, splits) * INPUTS
    first = tl.program_id(2) * each
    k = tl.arange(0, INPUTS)
    first_code = codes + n.to(tl.int64)[:, None] * inputs + k[None, :]
    first_state = states + m[None, :] * inputs + k[:, None]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in range(first, tl.minimum(first + each, inputs), INPUTS):
        weights = tl.load(first_code + at).to(states.dtype.element_ty)
        total = tl.dot(weights, tl.load(first_state + at, mask=there, other=0.0), total)
    at = (tl.program_id(2) * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(parts + at, total, mask=there)
