"""Run the model behind one interface: prefill a rectangle, decode a step.

`FlatForward` is the fast path: one flat row of tokens, attention by rectangles (passes.py). `PaddedForward`
is the plain path for models whose attention is not transformers' own interface: one rectangle at a time,
padded, with a mask, through the model's own attention.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pipeline.engine.attention import ATTENTION
from pipeline.engine.cpu import load_kernels
from pipeline.engine.cpu.packing import is_packed, is_packed_by_onednn
from pipeline.engine.cpu.program import DecodeProgram, can_run
from pipeline.engine.fused_model import FusedModel, can_fuse
from pipeline.engine.limits import Limits, limits
from pipeline.engine.model_facts import cache_name, input_device, layer_windows
from pipeline.engine.rectangles.passes import RectangleDecode, rectangle_prefill
from pipeline.engine.rectangles.rectangle import Rectangle, allocate, new_layer
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload

log = logging.getLogger(__name__)


class Forward(Protocol):
    """Be a way through a model whose batch is in rectangles."""

    config: Any
    can_share_prefix: bool
    equal_lengths: bool  # rows of different length may not share a rectangle, nor may rectangles be regrouped
    limits: Limits

    def prefill(
        self, rows: list[Sample], prefix: Rectangle | None, max_tokens: int
    ) -> tuple[Rectangle, Tensor]:
        """Compute the rows' tokens, at most about max_tokens in a pass: the rectangle, and logits [R, V]."""
        ...

    def decode(self, rectangles: Sequence[Rectangle]) -> Tensor:
        """Feed every row its newest token: logits [B, V]."""
        ...


class FlatForward:
    """Feed one flat row of tokens for all rectangles; the linear layers compute no padding."""

    can_share_prefix = True
    equal_lengths = False

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config()
        self._windows = layer_windows(self.config)
        self._model = model
        self._device = input_device(model)
        self.limits = limits(self._device.type)
        self._kernels = load_kernels() if _has_kernels(model) else None
        self._rounds = self._kernels is not None and is_packed_by_onednn(model)
        self._fused = FusedModel(model, self._kernels) if self._kernels and can_fuse(model) else None
        self._program = (
            DecodeProgram(model, self._kernels) if self._kernels and self._fused and can_run(model) else None
        )
        model.set_attn_implementation(ATTENTION)

    def prefill(
        self, rows: list[Sample], prefix: Rectangle | None, max_tokens: int
    ) -> tuple[Rectangle, Tensor]:
        rectangle = allocate(rows, [s.length for s in rows], self._windows, self.limits)
        ids = [s.all_token_ids for s in rows]
        first = prefix.head if prefix else 0
        width = max(1, max_tokens // len(rows))
        while True:
            last = min(first + width, rectangle.head)
            batch = rectangle_prefill(rectangle, first, last, prefix, self._kernels)
            positions = batch.positions
            places = zip(batch.rows.tolist(), positions, strict=True)
            tokens = [ids[row][position] for row, position in places]
            if last == rectangle.head:
                ends = np.flatnonzero(batch.columns == last - 1).tolist()
                return rectangle, self._run(tokens, positions, ends, batch)
            self._run(tokens, positions, [0], batch)
            first = last

    def decode(self, rectangles: Sequence[Rectangle]) -> Tensor:
        batch = RectangleDecode(rectangles, self._kernels)
        tokens, positions = [s.token_ids[-1] for s in batch.samples], batch.positions
        if self._program is not None:
            return self._program.run(tokens, torch.tensor([positions]), batch)
        spare = [0] * (_round_up(len(tokens)) - len(tokens)) if self._rounds else []
        return self._run(tokens + spare, positions + spare, list(range(len(tokens))) if spare else 0, batch)

    def _run(self, tokens: list[int], positions: list[int], keep: list[int] | int, batch: Any) -> Tensor:
        """Return the logits of the places in `keep`; of all for 0.

        Plain numbers, never a tensor: with layers on several GPUs, accelerate would bring a tensor to the
        first, and the head's states are on the last.
        """
        both = upload([tokens, positions], self._device)
        inputs = {"input_ids": both[:1], "position_ids": both[1:], "logits_to_keep": keep, "batch": batch}
        if self._fused is not None:
            return self._fused(**inputs)
        logits: Tensor = self._model(**inputs, use_cache=False).logits[0]
        return logits


class PaddedForward:
    """Feed one padded rectangle a pass, through the model's own attention with an explicit mask."""

    can_share_prefix = False
    equal_lengths = False

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config()
        self._windows = (None,) * self.config.num_hidden_layers  # the model makes its own masks
        self._model = model
        self._cache_name = cache_name(model)
        self._device = input_device(model)
        self.limits = limits(self._device.type)

    def prefill(
        self, rows: list[Sample], prefix: Rectangle | None, max_tokens: int
    ) -> tuple[Rectangle, Tensor]:
        rectangle = allocate(rows, [s.length for s in rows], self._windows, self.limits)
        width, rectangle.head = rectangle.head, 0
        ids = [[0] * start + list(s.all_token_ids) for s, start in zip(rows, rectangle.starts, strict=True)]
        logits = self._run(rectangle, ids, width)
        rectangle.head = width
        return rectangle, logits

    def decode(self, rectangles: Sequence[Rectangle]) -> Tensor:
        return torch.cat([self._run(r, [s.token_ids[-1:] for s in r.rows], r.head + 1) for r in rectangles])

    def _run(self, rectangle: Rectangle, ids: list[list[int]], columns: int) -> Tensor:
        """Run columns [head, columns) of one rectangle. ids: [R, columns − head] → logits [R, V]."""
        both = upload([[s, *own] for s, own in zip(rectangle.starts, ids, strict=True)], self._device)
        positions = torch.arange(columns, device=self._device) - both[:, :1]
        output = self._model(
            input_ids=both[:, 1:],
            attention_mask=(positions >= 0).long(),
            position_ids=positions[:, rectangle.head :].clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: _RectangleCache(rectangle, columns)},
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _RectangleLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Show one layer of a rectangle as the cache that transformers' attention layers expect."""

    is_sliding = False

    def __init__(self, rectangle: Rectangle, layer: int, columns: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rectangle, self._layer, self._columns = rectangle, layer, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        new_layer(self._rectangle, key_states.transpose(1, 2)[0], value_states.transpose(1, 2)[0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._layer == len(self._rectangle.keys):
            self.lazy_initialization(key_states, value_states)
        rows = len(self._rectangle.rows)
        keys, values = self._rectangle.keys[self._layer][:rows], self._rectangle.values[self._layer][:rows]
        keys[:, :, self._rectangle.head : self._columns] = key_states
        values[:, :, self._rectangle.head : self._columns] = value_states
        return keys[:, :, : self._columns], values[:, :, : self._columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns, 0

    def get_seq_length(self) -> int:
        return self._rectangle.head

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the same, as transformers called it at first
        return -1


class _RectangleCache(Cache):
    def __init__(self, rectangle: Rectangle, columns: int) -> None:
        layers: list[Any] = [_RectangleLayer(rectangle, i, columns) for i in range(len(rectangle.windows))]
        super().__init__(layers=layers)


def _round_up(rows: int) -> int:
    """Round up to a number of rows that comes up often.

    oneDNN compiles a product anew for each number of rows: half a millisecond and half a megabyte, for each
    shape of weight.
    """
    step = 1 if rows <= 16 else 4 if rows <= 64 else 8
    return -(-rows // step) * step


def _has_kernels(model: Any) -> bool:
    """Say whether a CPU's kernels are for its precision, and it lies there.

    In float32 its products must be theirs, too (cpu/packing.py says why).
    """
    ours = model.dtype == torch.bfloat16 or (model.dtype == torch.float32 and is_packed(model))
    return ours and all(p.device.type in ("cpu", "meta") for p in model.parameters())
