"""Run a decode step as a program: kernels one after the other on all threads, with no Python in between.

At a few dozen rows a kernel takes some dozen microseconds, and so does each way from one to the next through
Python and torch, whose own code and tables the streaming weights have just pushed out of the caches. A
program is a table of kernels and parameters, made once for a number of rows. Its threads meet at a barrier
after each kernel.
"""

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.cpu.packed_weight import PackedWeight
from pipeline.engine.rectangles.passes import RectangleDecode

FEW_ROWS = 8  # have a table for each number of rows; more would be too many,
ROWS = 4  # so that from there on there is one for every so many
EACH_STEP = ("tasks", "row_table", "block_table", "block_count")  # what attention reads anew in each step


class _Table:
    """Hold the kernels of one number of rows, ready to run; `attends` are the places of those that attend."""

    def __init__(self, kernels: ModuleType, calls: Sequence[Any], attends: list[int]) -> None:
        self._kernels, self.attends = kernels, attends
        width = max(len(call.numbers) for call in calls)
        self.numbers = np.zeros((len(calls), width), np.int64)
        for row, call in zip(self.numbers, calls, strict=True):
            row[: len(call.numbers)] = call.numbers
        addresses = self.numbers.ctypes.data + np.arange(len(calls)) * self.numbers.strides[0]
        self._calls = np.stack(([call.kernel.address for call in calls], addresses), 1).astype(np.int64)
        self._arrived = np.zeros(1, np.int64)
        own = kernels.loops.Run(
            calls=self._calls.ctypes.data,
            count=len(calls),
            arrived=self._arrived.ctypes.data,
            team=ctypes.cast(kernels.openmp.omp_get_num_threads, ctypes.c_void_p).value,
        )
        self._own = np.array(own, np.int64)

    def run(self) -> None:
        """Run all kernels on torch's threads.

        Raises:
            MemoryError: a kernel found none.
        """
        kernels = self._kernels
        self.numbers[:, kernels.NEXT_TASK] = 0
        self._arrived[0] = 0
        kernels.parallel(kernels.loops.run.address, self._own.ctypes.data, torch.get_num_threads(), 0)
        if (self.numbers[:, kernels.NEXT_TASK] < self.numbers[:, kernels.TASKS]).any():
            raise MemoryError("a kernel found no memory")


class DecodeProgram:
    """Run decode steps of one of fused_model's MODELS, its linear layers all packed in blocks."""

    def __init__(self, model: Any, kernels: ModuleType) -> None:
        self._body, self._kernels = model.model, kernels
        self._head: PackedWeight = model.lm_head.packed
        self._widths = _widths(model)
        self._buffers: dict[str, Tensor] = {}
        self._tables: dict[int, _Table] = {}
        self._each_step = [kernels.attention.Attend._fields.index(name) for name in EACH_STEP]

    def run(self, tokens: list[int], positions: Tensor, batch: RectangleDecode) -> Tensor:
        """Feed B tokens at positions [1, B] → logits [B, V], which are good until the next step.

        Raises:
            MemoryError: a kernel found none.
        """
        count = len(tokens)
        fewest = self._kernels.products_of(self._head.weight.dtype).FEWEST_ROWS
        step = 1 if count <= FEW_ROWS else max(ROWS, fewest)
        table = self._table(max(fewest, -(-count // step) * step))
        states = self._body.embed_tokens(torch.tensor([tokens]))
        inputs = states, *self._body.rotary_emb(states, positions)
        for name, new in zip(("states", "cos", "sin"), inputs, strict=True):
            self._buffers[name][:count] = new[0]
            self._buffers[name][count:] = 0
        tasks = count * self._body.config.num_key_value_heads
        for layer, place in enumerate(table.attends):
            rows, blocks = batch.tables(layer)
            numbers = tasks, rows.ctypes.data, blocks.ctypes.data, len(blocks)
            table.numbers[place, self._each_step] = numbers
        table.run()
        return self._buffers["logits"][:count]

    def _table(self, rows: int) -> _Table:
        if not self._buffers or rows > len(self._buffers["states"]):
            like = self._body.norm.weight
            self._buffers = {name: like.new_zeros(rows, width) for name, width in self._widths.items()}
            self._tables.clear()
        if rows not in self._tables:
            self._tables[rows] = self._build(rows)
        return self._tables[rows]

    def _build(self, rows: int) -> _Table:
        """List every kernel of a step of this many rows. The tables of rows and blocks come with each step."""
        at = {name: buffer[:rows] for name, buffer in self._buffers.items()}
        calls: list[Any] = []
        attends: list[int] = []
        addition: Tensor | None = None
        for layer in self._body.layers:
            calls.append(self._norm(layer.input_layernorm, at["states"], at["normed"], addition))
            calls += self._attention(layer.self_attn, at)
            attends.append(len(calls) - 1)
            addition = at["addition"]
            calls.append(self._linear(layer.self_attn.o_proj, at["attended"], addition))
            calls.append(self._norm(layer.post_attention_layernorm, at["states"], at["normed"], addition))
            calls.append(self._linear(layer.mlp.gate_proj, at["normed"], at["gated"], gated=True))
            calls.append(self._linear(layer.mlp.down_proj, at["gated"], addition))
        calls.append(self._norm(self._body.norm, at["states"], at["normed"], addition))
        head = self._head.weight, self._head.bias, at["logits"]
        calls.append(self._kernels.linear_call(at["normed"], *head))
        return _Table(self._kernels, calls, attends)

    def _attention(self, attention: Any, at: dict[str, Tensor]) -> list[Any]:
        sizes = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        parts = torch.split(at["projected"], sizes, 1)
        query, key, value = (t.view(len(t), -1, attention.head_dim) for t in parts)
        calls = [self._linear(attention.q_proj, at["normed"], at["projected"])]
        if hasattr(attention, "q_norm"):
            calls.append(self._norm(attention.q_norm, query, query))
            calls.append(self._norm(attention.k_norm, key, key))
        rotation, none = (at["cos"], at["sin"]), np.zeros((0, 4), np.int64)
        states = query, key, value, rotation, none, none, attention.scaling, at["attended"]
        return [*calls, self._kernels.attend_call(*states)]

    def _norm(self, norm: Any, states: Tensor, output: Tensor, addition: Tensor | None = None) -> Any:
        return self._kernels.norm_call(states, addition, norm.weight, norm.variance_epsilon, output)

    def _linear(self, linear: Any, input: Tensor, output: Tensor, gated: bool = False) -> Any:
        return self._kernels.linear_call(input, linear.packed.weight, linear.packed.bias, output, gated)


def can_run(model: Any) -> bool:
    """Say whether all linear layers of a fused model are packed in blocks, siblings together."""
    layers = [
        linear
        for layer in model.model.layers
        for linear in (*layer.self_attn.children(), *layer.mlp.children())
        if hasattr(linear, "out_features")
    ]
    packed = [getattr(linear, "packed", None) for linear in (*layers, model.lm_head)]
    return all(p is not None and p.kernels is not None for p in packed) and all(
        layer.mlp.gate_proj.packed.interleaved
        and layer.self_attn.q_proj.packed is layer.self_attn.v_proj.packed
        for layer in model.model.layers
    )


def _widths(model: Any) -> dict[str, int]:
    """Return how many numbers a row of each buffer has."""
    layer = model.model.layers[0]
    attention, size = layer.self_attn, layer.self_attn.head_dim
    projected = sum(p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    inside = {"projected": projected, "attended": attention.q_proj.out_features, "cos": size, "sin": size}
    across = dict.fromkeys(("states", "normed", "addition"), len(layer.input_layernorm.weight))
    return across | inside | {"gated": layer.mlp.gate_proj.out_features, "logits": model.lm_head.out_features}
