"""Multiply by bitsandbytes' 4-bit weights as they lie in memory, on GPUs where that is faster than their own way.

On Hopper, bitsandbytes writes out the whole weight in bfloat16 at every product of 5 rows or more, and reads it
again. Here codes become numbers in registers: the same float32 product of code and scale, rounded once to the
dtype of the input, then tensor cores with float32 sums. On an H200, 64 rows by Llama-3.1-8B's layers take half
the time.

A code is looked up by permuting bytes: any load from a table would wait for its address.
TRITON_INTERPRET=1 runs the kernels on a CPU, with such loads. Importing this module raises ImportError without
Triton.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

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

BLOCK = 64  # weights that share a scale
LEAST_ROWS = 4  # for fewer, bitsandbytes' own kernel is faster on an H200
SHAPE = Shape(outputs=128, inputs=BLOCK, rows=128, warps=4, stages=3, programs=264)


class FourBitLinear(nn.Module):
    """Stand in for a Linear4bit: for a decode step's rows, multiply by the kernel. [.., in] → [.., out]."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear
        state = linear.weight.quant_state
        self._weight = FourBitWeight(linear.weight.data, state, linear.out_features, linear.bias)
        self._dtype = linear.compute_dtype

    @staticmethod
    def can_replace(module: Any) -> bool:
        """Say whether a layer of bitsandbytes' fills whole blocks and multiplies in half precision."""
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if type(module).__name__ != "Linear4bit" or state is None:
            return False
        whole = (
            module.out_features % OUTPUTS == 0
            and module.in_features % BLOCK == 0
            and state.blocksize == BLOCK
        )
        nested = not state.nested or state.state2.blocksize == 256
        half = module.compute_dtype in (torch.bfloat16, torch.float16)
        return (
            whole and nested and half and (module.bias is None or module.bias.dtype == module.compute_dtype)
        )

    def forward(self, input: Tensor) -> Tensor:
        if self._takes(input):
            return products(input, [self._weight])[0]
        output: Tensor = self.linear(input)
        return output

    @classmethod
    def joined(cls, linears: Sequence["FourBitLinear"], input: Tensor) -> list[Tensor]:
        """Call layers with the same input: at once where the kernel can."""
        alike = len({linear._weight.kind for linear in linears}) == 1
        if alike and all(linear._takes(input) for linear in linears):
            return products(input, [linear._weight for linear in linears])
        return [linear(input) for linear in linears]

    def _takes(self, input: Tensor) -> bool:
        rows = input.numel() // input.shape[-1]
        return LEAST_ROWS <= rows <= MOST_ROWS and input.dtype == self._dtype


class FourBitWeight:
    """Hold what the kernel reads of a layer; nothing is copied.

    Args:
        packed: bitsandbytes' bytes, two codes in each, the first in the high bits.
        state: its QuantState, with quantized scales or without.
        bias: [N], or None.
    """

    def __init__(self, packed: Tensor, state: Any, outputs: int, bias: Tensor | None = None) -> None:
        self.words = packed.view(-1).view(torch.int16).view(outputs, -1)  # [N, K/4]
        self.scales: Tensor = state.absmax  # [N · K/64], float32 or codes of 8 bits
        self.codes: Tensor = state.code  # [16] float32
        self.nested: bool = state.nested
        self.scale_codes: Tensor = state.state2.code if state.nested else self.codes  # [256] float32
        self.scale_scales: Tensor = state.state2.absmax if state.nested else self.codes  # one for 256 scales
        self.offset: Tensor = state.offset if state.nested else self.codes  # scalar
        self.bias = bias
        table = tuple(self.codes.tolist())
        self.permutations = permutations_where_compiled(table)
        self.kind = table, self.nested, bias is None  # those of one kind can be joined


def products(input: Tensor, weights: Sequence[FourBitWeight]) -> list[Tensor]:
    """Multiply by up to three weights of one kind, as F.linear does by the dequantized ones. [.., K] → [.., N]."""
    states = input.reshape(-1, input.shape[-1]).contiguous()
    rows, inputs = states.shape
    sizes = [len(weight.words) for weight in weights]
    cut = SHAPE.cut(rows, sizes, inputs)
    results = Results(states, sizes, cut)
    one = weights[0]

    def members(name: str) -> tuple[Any, ...]:
        return filled([getattr(weight, name) for weight in weights])

    _products_kernel[cut.grid](
        states, members("words"), members("scales"), members("scale_codes"), members("scale_scales"),
        members("offset"), one.codes, members("codes" if one.bias is None else "bias"), filled(sizes),
        results.outputs, results.parts, results.counters, rows, inputs, NESTED=one.nested,
        PERMUTATIONS=one.permutations, BIASED=one.bias is not None, OUTPUTS=cut.outputs, ROWS=cut.rows,
        num_warps=SHAPE.warps, num_stages=SHAPE.stages,
    )  # fmt: skip
    return results.each(input.shape[:-1])


@triton.jit(do_not_specialize=["rows"])
def _products_kernel(
    states, words, scales, scale_codes, scale_scales, offsets, codes, biases, sizes,
    results, parts, counters, rows, inputs, NESTED: tl.constexpr, PERMUTATIONS: tl.constexpr,
    BIASED: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply some rows by some outputs' weights, over one split of the inputs."""
    second, third, begin = place(sizes, OUTPUTS)
    n = tl.program_id(1) * OUTPUTS - begin + tl.arange(0, OUTPUTS)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (m < rows)[None, :]
    kind = states.dtype.element_ty
    blocks = inputs // 64
    each = tl.cdiv(blocks, tl.num_programs(2))
    first = tl.program_id(2) * each
    first_word = (
        pick(words, second, third) + (n.to(tl.int64) * (inputs // 4))[:, None] + tl.arange(0, 16)[None, :]
    )
    first_scale = n.to(tl.int64) * blocks
    own_scales, own_scale_scales = pick(scales, second, third), pick(scale_scales, second, third)
    own_scale_codes, offset = pick(scale_codes, second, third), pick(offsets, second, third)
    column = tl.arange(0, 64)[:, None]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for block in range(first, tl.minimum(first + each, blocks)):
        at = first_scale + block
        scale = tl.load(own_scales + at)
        if NESTED:
            nested = tl.load(own_scale_codes + scale.to(tl.int32)) * tl.load(own_scale_scales + at // 256)
            scale = nested + tl.load(offset)
        weights = dequantized(tl.load(first_word + block * 16), scale, codes, PERMUTATIONS, kind, OUTPUTS)
        x = tl.load(states + m[None, :] * inputs + (block * 64 + column), mask=there, other=0.0)
        total = awaited(tl.dot(weights, x, total))
    size, bias = pick(sizes, second, third), pick(biases, second, third)
    store(total, results, bias, bias, parts, counters, rows, m, n, begin, size, False, BIASED)


@triton.jit
def dequantized(
    words, scale, codes, PERMUTATIONS: tl.constexpr, KIND: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    """Turn [OUTPUTS, 16] words of four codes, and each output's scale, into [OUTPUTS, 64] weights."""
    s = scale[:, None]
    b, a, d, c = _codes(words, codes, PERMUTATIONS)
    even = tl.join((a * s).to(KIND), (c * s).to(KIND))
    odd = tl.join((b * s).to(KIND), (d * s).to(KIND))
    return tl.join(even, odd).reshape(OUTPUTS, 64)


@triton.jit
def _codes(word, codes, PERMUTATIONS: tl.constexpr):
    """Turn words of four codes into four tensors of float32, the lowest bits' first."""
    if PERMUTATIONS is None:
        wide = word.to(tl.int32)
        return (
            tl.load(codes + (wide & 15)), tl.load(codes + ((wide >> 4) & 15)),
            tl.load(codes + ((wide >> 8) & 15)), tl.load(codes + ((wide >> 12) & 15)),
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        PERMUTATIONS, "=r,=r,=r,=r,=r,=r,=r,=r,r", [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
    )  # fmt: skip


def permutations_where_compiled(codes: Sequence[float]) -> str | None:
    """Write `permutations`; None where kernels are interpreted, which look codes up in a table."""
    return None if type(_products_kernel).__name__ == "InterpretedFunction" else permutations(codes)


@functools.cache
def permutations(codes: Sequence[float]) -> str:
    """Write PTX that turns two words of four codes, in $8, into eight float32: code i of word w is $(2 i + w).

    `prmt` picks four bytes of eight by selectors of three bits, which four codes without their highest bits are.
    For each byte of the float32 numbers: one from the table's lower half, one from its upper half, and of the two
    the one that the highest bit says. What is left is to put each number's four bytes together.
    """
    table = struct.pack("<16f", *codes)
    lines = [".reg .b32 word, low, high, side, lower, upper, pair, other, byte0, byte1, byte2, byte3;"]
    for word in range(2):
        lines += [
            f"shr.u32 word, $8, {16 * word};",
            "and.b32 low, word, 0x7777;",
            "and.b32 high, word, 0x8888;",
            "shr.u32 side, high, 1;",
            "or.b32 side, side, 0x3210;",
        ]
        for byte in range(4):
            t = [
                f"0x{int.from_bytes(table[16 * q + byte : 16 * q + 16 : 4], 'little'):08x}" for q in range(4)
            ]
            lines += [
                f"{{ .reg .b32 t0, t1, t2, t3; mov.b32 t0, {t[0]}; mov.b32 t1, {t[1]}; mov.b32 t2, {t[2]}; "
                f"mov.b32 t3, {t[3]}; prmt.b32 lower, t0, t1, low; prmt.b32 upper, t2, t3, low; }}",
                f"prmt.b32 byte{byte}, lower, upper, side;",
            ]
        for first, picked in ((0, "0x5140"), (2, "0x7362")):
            lines += [
                f"prmt.b32 pair, byte0, byte1, {picked};",
                f"prmt.b32 other, byte2, byte3, {picked};",
                f"prmt.b32 ${2 * first + word}, pair, other, 0x5410;",
                f"prmt.b32 ${2 * first + 2 + word}, pair, other, 0x7632;",
            ]
    return "{ " + " ".join(lines) + " }"
