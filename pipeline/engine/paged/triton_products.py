"""Cut products of one input among programs, and put together what each has found.

One launch computes up to three products of the same input, each with a weight of its own: a program picks its
weight by its place. Few rows keep all of a GPU busy only where the inputs are split among programs, too. Then
each writes its part, and the last to arrive at a tile of outputs adds the parts up, in their order: which one
that is does not change a bit.

TRITON_INTERPRET=1 runs the kernels on a CPU. Importing this module raises ImportError without Triton.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128  # for more, a product of the whole weight in half precision is faster
OUTPUTS = 64  # the least that a program has: Hopper's tensor cores take no fewer
JOINED = 3  # products in one launch: query, key and value
MOST_SPLITS = 16
COUNTERS = 8192  # more than tiles whose inputs are split, in all shapes that are sensible
COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@dataclass(frozen=True, slots=True)
class Shape:
    """Say how products are cut into programs."""

    outputs: int  # of one program: all its rows' states are read again for each
    inputs: int  # read at a time
    rows: int  # of one program, at most: weights are read again for each
    warps: int
    stages: int
    programs: int  # inputs are split into as many parts as make no more than these, of one program's rows

    def cut(self, rows: int, sizes: Sequence[int], inputs: int) -> "Cut":
        """Cut products of so many outputs each. The inputs' splits are the same whatever the rows."""
        wide = OUTPUTS if any(size % self.outputs for size in sizes) else self.outputs
        deep = self.inputs if inputs % self.inputs == 0 else 64
        high = max(16, min(self.rows, triton.next_power_of_2(rows)))
        tiles = sum(sizes) // wide
        splits = max(1, min(MOST_SPLITS, self.programs // tiles))
        return Cut((triton.cdiv(rows, high), tiles, splits), wide, deep, high)


@dataclass(frozen=True, slots=True)
class Cut:
    """Hold the programs of a launch (tiles of rows, tiles of outputs, splits of the inputs), and what is one's."""

    grid: tuple[int, int, int]
    outputs: int
    inputs: int
    rows: int


class Results:
    """Allocate what a launch writes: the outputs of each product one after another, and parts where it splits.

    Launches that split share their counters, so two must never run at once: all products of so few rows
    run on one stream, or on streams that wait for each other, as those that record a step do.
    """

    def __init__(self, states: Tensor, sizes: Sequence[int], cut: Cut) -> None:
        rows, splits = len(states), cut.grid[2]
        self._sizes, self._rows = sizes, rows
        self.outputs = states.new_empty(rows * sum(sizes))
        self.parts = self.outputs
        if splits > 1:
            self.parts = states.new_empty(splits * self.outputs.numel(), dtype=torch.float32)
            assert cut.grid[0] * cut.grid[1] <= COUNTERS
        self.counters = _counters(states.device)

    def each(self, shape: Sequence[int]) -> list[Tensor]:
        """Return each product's output, contiguous, [*shape, N]."""
        flat = torch.split(self.outputs, [self._rows * size for size in self._sizes])
        return [part.view(*shape, size) for part, size in zip(flat, self._sizes, strict=True)]


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Make a device's counters of parts that have arrived. They are zero but while a launch runs."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def filled(members: Sequence[Any]) -> tuple[Any, ...]:
    """Repeat the last until there are JOINED: no program picks it."""
    return (*members, *[members[-1]] * (JOINED - len(members)))


@triton.jit
def awaited(total):
    """Use what a product has made so far, so that it ends before the next block's weights are written.

    On Hopper a product reads its weights' registers for as long as it runs. Triton 3.6 and older let it run on
    into the next block, whose weights then overwrite them under it (triton-lang/triton#9433): in a busy card some
    tiles come out wrong, and not the same ones each time. The assembler leaves nothing of the move.
    """
    if COMPILED:
        total = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def place(sizes, OUTPUTS: tl.constexpr):
    """Find a program's product: which of three (see `pick`), and the first of its outputs among all."""
    first = tl.program_id(1) * OUTPUTS
    second = first >= sizes[0]
    third = first >= sizes[0] + sizes[1]
    return second, third, tl.where(third, sizes[0] + sizes[1], tl.where(second, sizes[0], 0))


@triton.jit
def pick(members, second, third):
    """Pick a program's own of what each product has."""
    return tl.where(third, members[2], tl.where(second, members[1], members[0]))


@triton.jit
def store(
    total, results, scales, bias, parts, counters, rows, m, n, begin, size,
    SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Store a program's total of rows m and outputs n, [n, m]: at once, or as the last to bring its part.

    Args:
        results: all products' outputs; this one has `size`, after `begin` of those before it.
        parts: [splits, tiles of outputs, rows, n] float32.
    """
    splits = tl.num_programs(2)
    output = results + rows * begin
    if splits == 1:
        _finish(total, output, scales, bias, rows, m, n, size, SCALED, BIASED)
    else:
        wide: tl.constexpr = total.shape[0]
        there = (m < rows)[None, :]
        tile = tl.program_id(1)
        stride = tl.num_programs(1) * rows * wide
        at = (tile * rows + m[None, :]) * wide + tl.arange(0, wide)[:, None]
        tl.store(parts + tl.program_id(2) * stride + at, total, mask=there)
        tl.debug_barrier()  # the count that one thread releases stands for what all have written
        counter = counters + tile * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.store(counter, 0)  # for the next launch
            summed = tl.zeros(total.shape, tl.float32)
            for split in range(splits):
                summed += tl.load(parts + split * stride + at, mask=there, other=0.0, cache_modifier=".cg")
            _finish(summed, output, scales, bias, rows, m, n, size, SCALED, BIASED)


@triton.jit
def _finish(total, output, scales, bias, rows, m, n, size, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """Scale, add the bias, round."""
    if SCALED:
        total *= tl.load(scales + n)[:, None]
    if BIASED:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    at = m[None, :] * size + n[:, None]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=(m < rows)[None, :])
