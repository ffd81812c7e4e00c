"""Hold a weight in the order in which the CPU's kernels, or oneDNN, multiply by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.cpu import load_kernels

INT8_MOST = 127  # stands for a row's largest weight, which bitsandbytes keeps as its scale


@dataclass(frozen=True)
class PackedWeight:
    """Hold one weight, or those of siblings one below the other, in an order for products."""

    weight: Any  # kernels' Blocks, else a tensor in oneDNN's own order
    bias: Tensor | None  # [M]
    kernels: ModuleType | None  # cpu.kernels.operators, where they multiply
    interleaved: bool = False  # 16 outputs of the first and 16 of the second sibling take turns

    def __deepcopy__(self, memo: object) -> "PackedWeight":
        """Share it with a copy of the model: it never changes, and neither kernels nor oneDNN's order can be copied."""
        return self

    def product(self, input: Tensor) -> Tensor:
        """Multiply. [.., K] → [.., M]."""
        output: Tensor = (
            self.kernels.linear(input, self.weight, self.bias)
            if self.kernels
            else torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        )
        return output

    def gated(self, input: Tensor) -> Tensor:
        """Compute silu(first sibling) · second. [.., K] → [.., M/2]."""
        assert self.kernels is not None
        assert self.interleaved
        output: Tensor = self.kernels.linear(input, self.weight, self.bias, gated=True)
        return output

    def split(self, output: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """Split an output into the siblings' own."""
        if not self.interleaved:
            return torch.split(output, sizes, -1)
        turns = output.view(*output.shape[:-1], -1, 2, 16)
        return [turns[..., i, :].flatten(-2) for i in (0, 1)]


def multiplies() -> bool:
    """Say whether the kernels multiply on this CPU."""
    kernels = load_kernels()
    return kernels is not None and kernels.products is not None


def fills_blocks(outputs: int, inputs: int, state: Any) -> bool:
    """Say whether a weight, quantized as `pack_matrices` is told, fills whole blocks, and is still as it was made."""
    if state is None or isinstance(state, Tensor):
        return outputs % 32 == 0 and inputs % 32 == 0
    whole = outputs % 32 == 0 and inputs % 64 == 0 and state.blocksize == 64
    return whole and not getattr(state, "packing_format_for_cpu", False)


def pack_matrices(
    matrices: Sequence[Tensor], states: Sequence[Any], biases: Sequence[Tensor | None], *, interleaved: bool
) -> PackedWeight:
    """Pack weights for the kernels, one below the other.

    Args:
        matrices: [M, K] each, in bf16 or float32, or bitsandbytes' codes.
        states: bitsandbytes' scales of each, in 8 bits a tensor, in 4 bits a QuantState; None of plain ones.
        biases: [M] each, or None for all.
        interleaved: their first and second half, gate and up, take turns, to lie side by side.
    """
    kernels = load_kernels()
    assert kernels is not None

    def joined(parts: Sequence[Any]) -> Tensor:
        whole = one_below_the_other(parts)
        if not interleaved:
            return whole
        return whole.view(2, -1, 16, *whole.shape[1:]).transpose(0, 1).reshape(whole.shape)

    if states[0] is None:
        weight = kernels.pack_blocks(joined(matrices))
    elif isinstance(states[0], Tensor):
        weight = kernels.pack_bytes(joined(matrices), joined(states) / INT8_MOST)
    else:
        codes, scales = zip(*map(_four_bits, matrices, states), strict=True)
        weight = kernels.pack_codes(joined(codes), joined(scales), states[0].code)
    bias = None if biases[0] is None else joined(biases)
    return PackedWeight(weight, bias, kernels, interleaved)


def one_below_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Join weights, or biases."""
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).detach()


def _four_bits(codes: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """Return a weight's codes, [M, K/2] bytes, and scales, [M, K/64] float32, where these are quantized, too."""
    rows, scales = state.shape[0], state.absmax
    if state.nested:
        functions = import_module("bitsandbytes.functional")
        scales = functions.dequantize_blockwise(scales, state.state2) + state.offset
    return codes.view(torch.uint8).reshape(rows, -1), scales.float().view(rows, -1)
