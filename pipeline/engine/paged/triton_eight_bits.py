"""Multiply by bitsandbytes' 8-bit weights as they lie in memory, on GPUs.

LLM.int8 rounds inputs to 8 bits, looks for outliers in each product, and waits for the answer: the host holds up
a card that could read these weights in half of the time that bfloat16's take, and a step cannot be recorded. Here
the inputs stay as they are, as on a CPU: a whole number of 8 bits is exact in half precision, tensor cores sum
in float32, and an output's scale comes to its sum. A row does not depend on those beside it.

TRITON_INTERPRET=1 runs the kernel on a CPU. Importing this module raises ImportError without Triton.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.engine.paged.triton_products import (
    MOST_ROWS,
    OUTPUTS,
    Results,
    Shape,
    awaited,
    filled,
    pick,
    place,
    store,
)

INPUTS = 64  # a layer has a multiple of it
SHAPE = Shape(outputs=64, inputs=128, rows=128, warps=4, stages=3, programs=264)
LARGEST_CODE = 127  # stands for a row's largest weight, which bitsandbytes keeps as its scale


class EightBitWeight(NamedTuple):
    """Hold what the kernel reads of a layer."""

    codes: Tensor  # [N, K] int8
    scales: Tensor  # [N] float32
    bias: Tensor | None  # [N]


class EightBitLinear(nn.Module):
    """Stand in for a Linear8bitLt. [.., in] → [.., out]."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        largest = _largest(linear)
        assert largest is not None
        self._scales = largest / LARGEST_CODE

    @staticmethod
    def can_replace(module: Any) -> bool:
        """Say whether a layer of bitsandbytes' fills whole blocks."""
        if type(module).__name__ != "Linear8bitLt" or _largest(module) is None:
            return False
        return bool(module.out_features % OUTPUTS == 0 and module.in_features % INPUTS == 0)

    def forward(self, input: Tensor) -> Tensor:
        own = codes, scales, bias = self._read()
        if input.numel() // input.shape[-1] <= MOST_ROWS:
            return products(input, [own])[0]
        weight = input.new_empty(codes.shape)
        return F.linear(input, torch.mul(codes, scales[:, None], out=weight), bias)

    @classmethod
    def joined(cls, linears: Sequence["EightBitLinear"], input: Tensor) -> list[Tensor]:
        """Call layers with the same input: at once where the kernel can."""
        alike = len({linear.bias is None for linear in linears}) == 1
        if alike and input.numel() // input.shape[-1] <= MOST_ROWS:
            return products(input, [linear._read() for linear in linears])
        return [linear(input) for linear in linears]

    def _read(self) -> EightBitWeight:
        return EightBitWeight(self.weight.data, self._scales, self.bias)


def _largest(linear: Any) -> Tensor | None:
    """Return the largest weight of each row, [N] float32, which its first pass moves from the weight to the state."""
    largest: Tensor | None = getattr(linear.weight, "SCB", None)
    return linear.state.SCB if largest is None else largest


def products(input: Tensor, weights: Sequence[EightBitWeight]) -> list[Tensor]:
    """Multiply by up to three weights, all with a bias or all without. [.., K] → [.., N] of each."""
    states = input.reshape(-1, input.shape[-1]).contiguous()
    rows, inputs = states.shape
    codes, scales, biases = zip(*weights, strict=True)
    sizes = [len(each) for each in codes]
    cut = SHAPE.cut(rows, sizes, inputs)
    results = Results(states, sizes, cut)
    biased = biases[0] is not None
    _products_kernel[cut.grid](
        states, filled(codes), filled(scales), filled(biases if biased else scales), filled(sizes),
        results.outputs, results.parts, results.counters, rows, inputs, BIASED=biased,
        OUTPUTS=cut.outputs, INPUTS=cut.inputs, ROWS=cut.rows, num_warps=SHAPE.warps, num_stages=SHAPE.stages,
    )  # fmt: skip
    return results.each(input.shape[:-1])


@triton.jit(do_not_specialize=["rows"])
def _products_kernel(
    states, codes, scales, biases, sizes, results, parts, counters, rows, inputs,
    BIASED: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by some outputs' codes, over one split of the inputs."""
    second, third, begin = place(sizes, OUTPUTS)
    n = tl.program_id(1) * OUTPUTS - begin + tl.arange(0, OUTPUTS)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (m < rows)[None, :]
    each = tl.cdiv(inputs // INPUTS, tl.num_programs(2)) * INPUTS
    first = tl.program_id(2) * each
    k = tl.arange(0, INPUTS)
    first_code = pick(codes, second, third) + n.to(tl.int64)[:, None] * inputs + k[None, :]
    first_state = states + m[None, :] * inputs + k[:, None]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in range(first, tl.minimum(first + each, inputs), INPUTS):
        weights = tl.load(first_code + at).to(states.dtype.element_ty)
        total = awaited(tl.dot(weights, tl.load(first_state + at, mask=there, other=0.0), total))
    scale, bias = pick(scales, second, third), pick(biases, second, third)
    size = pick(sizes, second, third)
    store(total, results, scale, bias, parts, counters, rows, m, n, begin, size, True, BIASED)
