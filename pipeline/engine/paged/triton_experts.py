"""Multiply by the experts of a mixture in bitsandbytes' 4 and 8 bits, as they lie in memory, on GPUs.

Dequantizing an expert takes a launch or two for each one that a pass meets, thousands a step, and the host has to
know which. Here tokens are sorted by expert and cut into tiles of one expert each, on the card: one launch for
all experts, nothing waits for the host, and a step can be recorded. Codes become numbers in registers, rounded as
the dequantized matrix would be.

TRITON_INTERPRET=1 runs the kernels on a CPU. Importing this module raises ImportError without Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.engine.experts import gather, weigh
from pipeline.engine.paged.triton_eight_bits import LARGEST_CODE
from pipeline.engine.paged.triton_four_bits import BLOCK, dequantized, permutations_where_compiled
from pipeline.engine.paged.triton_products import OUTPUTS, awaited

INPUTS = 64  # of one product of a program


class GroupedExperts:
    """Send tokens through a module's experts, all by one launch a weight; to be the module's `forward`.

    Args:
        dtype: of the products, float16 or bfloat16.
    """

    TILES = (16, 32, 64, 128)  # rows of one expert that a program multiplies

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype
        held = module.quantized_experts
        self.weights = {name: _weight(getattr(module, name), held[name]) for name in held}

    @staticmethod
    def can_replace(module: Any) -> bool:
        """Say whether a module has experts that the kernels can multiply by."""
        held = getattr(module, "quantized_experts", {})
        fresh = bool(held) and not hasattr(module, "grouped_experts")
        return fresh and all(map(_can_multiply, held.values()))

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor, tile: int | None = None) -> Tensor:
        """Multiply. hidden [T, D], chosen and weights [T, K] → [T, D].

        Args:
            tile: which of TILES; None is the least that holds what an expert has on average.
        """
        module, (experts, *_) = self._module, self.weights["down_proj"].shape
        rows, ids, order = gather(hidden.to(self._dtype), chosen)
        average = triton.cdiv(len(ids), experts)
        tiles = Tiles(ids, experts, tile or next((t for t in self.TILES if t >= average), self.TILES[-1]))

        def multiply(name: str, rows: Tensor) -> Tensor:
            bias = getattr(module, f"{name}_bias") if module.has_bias else None
            return self.weights[name].multiply(rows.contiguous(), tiles, bias)

        if module.has_gate:
            rows = module._apply_gate(multiply("gate_up_proj", rows))
        else:
            rows = module.act_fn(multiply("up_proj", rows))
        rows = multiply("down_proj", rows)
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        return weigh(rows, weights, order, hidden)


def _can_multiply(held: Any) -> bool:
    """Say whether a weight of all experts fills whole blocks, and multiplies in the dtype it would dequantize to."""
    _, outputs, inputs = held.shape
    if outputs % OUTPUTS or inputs % INPUTS:
        return False
    if held.settings.load_in_8bit:
        return True
    state = held.states[0]
    return (
        state.dtype == held.settings.bnb_4bit_compute_dtype
        and state.dtype in (torch.bfloat16, torch.float16)
        and state.blocksize == BLOCK
        and (not state.nested or state.state2.blocksize == 256)
    )


def _weight(packed: Tensor, held: Any) -> "FourBitExperts | EightBitExperts":
    return EightBitExperts(packed, held) if held.settings.load_in_8bit else FourBitExperts(packed, held)


class FourBitExperts:
    """Hold what the kernel reads of one weight of all experts, whose scales are put side by side."""

    def __init__(self, packed: Tensor, held: Any) -> None:
        states, (experts, outputs, inputs) = held.states, held.shape
        self.shape = experts, outputs, inputs
        self.words = packed.data.view(experts, -1).view(torch.int16)  # [E, N · K/4]
        self.scales = _side_by_side(states, "absmax")  # [E, N · K/64], float32 or codes of 8 bits
        self.codes: Tensor = states[0].code  # [16] float32
        self.nested: bool = states[0].nested
        seconds = [state.state2 for state in states] if self.nested else []
        self.scale_codes: Tensor = seconds[0].code if seconds else self.codes  # [256] float32
        # [E, N · K/64/256]
        self.scale_scales = _side_by_side(seconds, "absmax") if seconds else self.codes[None]
        self.offsets = _side_by_side(states, "offset") if seconds else self.codes  # [E]
        self.permutations = permutations_where_compiled(tuple(self.codes.tolist()))

    def multiply(self, rows: Tensor, tiles: "Tiles", bias: Tensor | None) -> Tensor:
        """Multiply each row, sorted by expert, by its expert's matrix. [S, K], bias [E, N] → [S, N]; zeros for none."""
        experts, outputs, inputs = self.shape
        output = rows.new_zeros(len(rows), outputs)
        _four_bits_kernel[(outputs // OUTPUTS, tiles.most)](
            rows, self.words, self.scales, self.scale_codes, self.scale_scales, self.offsets, self.codes,
            rows if bias is None else bias, output,
            tiles.experts, tiles.ends, tiles.bounds, experts, outputs, inputs, self.scale_scales.shape[1],
            NESTED=self.nested, PERMUTATIONS=self.permutations, BIASED=bias is not None, OUTPUTS=OUTPUTS,
            ROWS=tiles.rows, num_warps=4, num_stages=3,
        )  # fmt: skip
        return output


class EightBitExperts:
    """Hold what the kernel reads of one weight of all experts."""

    def __init__(self, packed: Tensor, held: Any) -> None:
        self.shape = held.shape
        self.codes = packed.data  # [E, N, K] int8
        self.largest = torch.stack(held.states)  # [E, N] float32, each output's largest weight
        held.states = list(self.largest)

    def multiply(self, rows: Tensor, tiles: "Tiles", bias: Tensor | None) -> Tensor:
        """Multiply each row, sorted by expert, by its expert's matrix. [S, K], bias [E, N] → [S, N]; zeros for none."""
        experts, outputs, inputs = self.shape
        output = rows.new_zeros(len(rows), outputs)
        _eight_bits_kernel[(outputs // OUTPUTS, tiles.most)](
            rows, self.codes, self.largest, rows if bias is None else bias, output,
            tiles.experts, tiles.ends, tiles.bounds, experts, outputs, inputs,
            BIASED=bias is not None, LARGEST=LARGEST_CODE, OUTPUTS=OUTPUTS, INPUTS=INPUTS, ROWS=tiles.rows,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return output


def _side_by_side(states: list[Any], name: str) -> Tensor:
    """Stack what each state holds by a name, and leave the states views of it."""
    stacked = torch.stack([getattr(state, name) for state in states])
    for state, own in zip(states, stacked, strict=True):
        setattr(state, name, own)
    return stacked


class Tiles:
    """Cut rows that are sorted by expert into tiles of one expert each, without asking how many each has.

    Args:
        ids: of each row's expert, [S] sorted; those beyond the experts are in no tile.
        rows: of a tile.
    """

    def __init__(self, ids: Tensor, experts: int, rows: int) -> None:
        self.rows = rows
        self.most = min(experts, len(ids)) + len(ids) // rows
        every = torch.arange(max(experts + 1, self.most), device=ids.device, dtype=ids.dtype)
        self.bounds = torch.searchsorted(ids, every[: experts + 1])  # [E + 1], each expert's first row
        each = (self.bounds[1:] - self.bounds[:-1] + (self.rows - 1)) // self.rows
        self.ends = each.cumsum(0)  # [E], the first tile that is no longer an expert's
        self.experts = torch.searchsorted(self.ends, every[: self.most], right=True)  # [most]; E is none


@triton.jit
def _tile(experts, ends, bounds, count, ROWS: tl.constexpr):
    """Find a tile's expert, its rows, [1, ROWS], and whether they are the expert's; `count` is no expert."""
    tile = tl.program_id(1)
    expert = tl.load(experts + tile)
    first, last = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if expert < count:
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        last = tl.load(bounds + expert + 1)
        first = tl.load(bounds + expert) + (tile - begin) * ROWS
    rows = first + tl.arange(0, ROWS)[None, :]
    return expert, rows, rows < last


@triton.jit
def _four_bits_kernel(
    states, words, scales, scale_codes, scale_scales, offsets, codes, bias, output, experts, ends, bounds, count,
    outputs, inputs, groups, NESTED: tl.constexpr, PERMUTATIONS: tl.constexpr, BIASED: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile's rows by some outputs' weights of its expert."""
    expert, m, there = _tile(experts, ends, bounds, count, ROWS)
    if expert < count:
        kind = states.dtype.element_ty
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        blocks = inputs // 64
        row = expert * outputs + n
        first_word = words + (row * (inputs // 4))[:, None] + tl.arange(0, 16)[None, :]
        k = tl.arange(0, 64)[:, None]
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for block in range(blocks):
            scale = tl.load(scales + row * blocks + block)
            if NESTED:
                group = expert * groups + (n * blocks + block) // 256
                scale = tl.load(scale_codes + scale.to(tl.int32)) * tl.load(scale_scales + group)
                scale += tl.load(offsets + expert)
            weights = dequantized(tl.load(first_word + block * 16), scale, codes, PERMUTATIONS, kind, OUTPUTS)
            x = tl.load(states + m * inputs + (block * 64 + k), mask=there, other=0.0)
            total = awaited(tl.dot(weights, x, total))
        if BIASED:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(output + m * outputs + n[:, None], total.to(kind), mask=there)


@triton.jit
def _eight_bits_kernel(
    states, codes, largest, bias, output, experts, ends, bounds, count, outputs, inputs,
    BIASED: tl.constexpr, LARGEST: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile's rows by some outputs' codes of its expert."""
    expert, m, there = _tile(experts, ends, bounds, count, ROWS)
    if expert < count:
        kind = states.dtype.element_ty
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        k = tl.arange(0, INPUTS)
        row = expert * outputs + n
        first_code = codes + (row * inputs)[:, None] + k[None, :]
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for at in range(0, inputs, INPUTS):
            weights = tl.load(first_code + at).to(kind)
            x = tl.load(states + m * inputs + (at + k[:, None]), mask=there, other=0.0)
            total = awaited(tl.dot(weights, x, total))
        total *= tl.load(largest + row)[:, None] / LARGEST
        if BIASED:
            total += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(output + m * outputs + n[:, None], total.to(kind), mask=there)
