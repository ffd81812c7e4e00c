"""Prepare a forward pass over rows in pages: its inputs, and the attention that reads the pages.

As with rectangles, the model sees one flat row of tokens, [1, N], with explicit position ids, and hands the
pass down to attention as the keyword argument `batch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.limits import PAGE
from pipeline.engine.paged.pages import Pages, places
from pipeline.engine.upload import upload

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """Name columns [first, last) of a row, to be computed in one pass."""

    token_ids: Sequence[int]  # the row's, from its first
    pages: Sequence[int]
    first: int
    last: int


class PagedPrefill:
    """Prefill tokens of several rows, one row after the other: N in all, without padding.

    They attend to their row's earlier columns, which are written already, and to each other.
    """

    def __init__(self, segments: Sequence[Segment], pages: Pages, model: "PassModel") -> None:
        self._pages, self._model = pages, model
        self._counts = [s.last - s.first for s in segments]
        self._held = [s.last for s in segments]
        fresh = all(s.first == 0 for s in segments)
        parts = [
            np.concatenate([s.token_ids[s.first : s.last] for s in segments]),
            np.concatenate([np.arange(s.first, s.last) for s in segments]),
            np.concatenate([places(s.pages, s.first, s.last) for s in segments]),
            np.concatenate([places(s.pages, 0, 0 if fresh else s.last) for s in segments]),
            np.cumsum([0, *self._counts]),
            np.cumsum([0, *self._held]),
        ]
        uploaded = upload(np.concatenate(parts), model.device)  # one copy to the device
        self.ids, self.positions, self._written, self._read, *both = torch.split(
            uploaded, [len(p) for p in parts]
        )
        self.windows = model.windows
        self._query_ends, self._key_ends = (t.int() for t in both)
        self._fresh = fresh
        self.last_tokens = self._query_ends[1:].long() - 1  # of each segment, among the N

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Store keys and values, and attend. query [N, H, D], key and value [N, H_kv, D] → [N, H, D].

        A rotation is still to be applied.
        """
        if rotation is not None:
            assert self._model.kernels is not None, "only the kernels rotate"
            query, key = (self._model.kernels.rotate(t, rotation) for t in (query, key))
        keys, values = (t.flatten(0, 1) for t in self._pages.layer(layer, key, value))
        keys[self._written] = key
        values[self._written] = value
        if not self._fresh:
            key, value = keys[self._read], values[self._read]
        window = self._model.windows[layer]
        if self._model.has_flash(query, value):
            return self._flash(query, key, value, scaling, window)
        return self._row_by_row(query, key, value, scaling, window)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Attend from all rows in one kernel, FlashAttention-2 for rows of any length (Dao 2023)."""
        left = None if window is None else window - 1
        output: Tensor = torch.ops.aten._flash_attention_forward(
            query.contiguous(), key.contiguous(), value.contiguous(), self._query_ends, self._key_ends,
            max(self._counts), max(self._held), 0.0, True, False,
            scale=scaling, window_size_left=left, window_size_right=None if left is None else 0,
        )[0]  # fmt: skip
        return output

    def _row_by_row(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Attend from one row after the other, by torch's own operators."""
        outs: list[Tensor] = []
        parts = (
            torch.split(query, self._counts),
            torch.split(key, self._held),
            torch.split(value, self._held),
        )
        for q, k, v in zip(*parts, strict=True):  # where all is fresh, a row holds what it computes
            columns = torch.arange(len(k), device=q.device)
            own = columns[len(k) - len(q) :, None]
            seen = columns <= own
            if window is not None:
                seen &= columns > own - window
            outs.append(_attend(q[None], k[None], v[None], seen[None], scaling)[0])
        return torch.cat(outs)


class PagedDecode:
    """Decode one token of each row of a batch, B in all; it is written to the column after those held.

    Args:
        control: [B, 2] int32, each row's slot, and how many columns it holds.
        table: [slots, T] int32, the pages of each slot.
        columns: no row holds more, the new one included.
    """

    def __init__(
        self, control: Tensor, table: Tensor, columns: int, pages: Pages, model: "PassModel"
    ) -> None:
        self._control, self._table, self._columns = control, table, columns
        self._pages, self._model = pages, model
        self.windows = model.windows

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Store keys and values, and attend. query [B, H, D], key and value [B, H_kv, D] → [B, H, D].

        A rotation is still to be applied.
        """
        keys, values = self._pages.layer(layer, key, value)
        window, kernels = self._model.windows[layer], self._model.kernels
        if kernels is not None and key.shape == value.shape:
            output: Tensor = kernels.attend(
                query,
                key,
                value,
                rotation,
                keys,
                values,
                self._control,
                self._table,
                self._columns,
                window,
                scaling,
            )
            return output
        assert rotation is None, "only the kernels rotate"
        held = self._control[:, 1].long()
        table = self._table[self._control[:, 0].long(), : -(-self._columns // PAGE)].long()
        page = table.gather(1, held[:, None] // PAGE)[:, 0]
        keys[page, held % PAGE] = key
        values[page, held % PAGE] = value
        columns = torch.arange(table.shape[1] * PAGE, device=query.device)
        seen = columns <= held[:, None]
        if window is not None:
            seen &= columns > held[:, None] - window
        k, v = (t[table].flatten(1, 2) for t in (keys, values))
        return _attend(query[:, None], k, v, seen[:, None], scaling)[:, 0]


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attend with a mask. query [R, T, H, D]; keys, values [R, W, H_kv, D]; seen [R, T, W] bool → [R, T, H, D].

    Query heads that share a key head are queries of their own: of the kernels that take a mask, none knows
    groups.
    """
    rows, tokens, heads, _ = query.shape
    kv_heads = keys.shape[2]
    groups = heads // kv_heads
    folded = query.view(rows, tokens, kv_heads, groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = seen[:, None].expand(-1, groups, -1, -1).flatten(1, 2)[:, None]
    made = F.scaled_dot_product_attention(
        folded, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scaling
    )
    made = made.view(rows, kv_heads, groups, tokens, -1).permute(0, 3, 1, 2, 4)
    return made.reshape(rows, tokens, heads, -1)


@dataclass(frozen=True, slots=True)
class PassModel:
    """Tell attention what it needs to know of the model."""

    device: torch.device
    windows: tuple[int | None, ...]  # each layer's sliding window; None is full attention
    kernels: ModuleType | None  # triton_kernels, on GPUs that Triton knows
    flash: bool  # the GPU is one of FlashAttention-2's

    def has_flash(self, query: Tensor, value: Tensor) -> bool:
        """Say whether FlashAttention takes these."""
        half = query.dtype in (torch.float16, torch.bfloat16)
        size = query.shape[-1]
        return self.flash and half and size == value.shape[-1] and size % 8 == 0 and size <= 256
