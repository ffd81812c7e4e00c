"""Prepare a forward pass over rectangles: its inputs, and the attention that reads them.

The model sees one flat row of tokens, [1, N], with explicit position ids: its linear layers compute no
padding at all. Only attention knows rectangles, through the interface in ../attention.py.

What a pass needs on a device goes there once, whatever the number of layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.cpu import onednn_has_bf16
from pipeline.engine.rectangles.rectangle import Rectangle, aligned, by_products, new_layer, write
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload

SEEN = 64  # columns: what lies beyond the head is not read, in steps that leave masks aligned

# cuDNN's attention plans each new shape anew, and rectangles come in ever new ones; nor is it deterministic.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(eq=False)
class RectanglePrefill:
    """Prefill columns [first, last) of one rectangle, whose earlier columns are already written.

    N tokens: those of every row in these columns, row by row; without those of a shared prefix, which the
    first pass copies from the rectangle of one row where they were computed.
    """

    rectangle: Rectangle
    prefix: Rectangle | None
    first: int
    last: int
    rows: np.ndarray  # [N] int64, each token's row
    columns: np.ndarray  # [N] int64, and its column in the rectangle
    kernels: ModuleType | None = None  # cpu.kernels.operators, for models on a CPU
    _places: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, torch.device], Tensor] = field(default_factory=dict)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.rectangle.windows

    @property
    def positions(self) -> list[int]:
        """Count for each of the N the tokens so far in its row; never the column."""
        positions: list[int] = (self.columns - np.array(self.rectangle.starts)[self.rows]).tolist()
        return positions

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Bring rows [N], columns [N] and starts [R] to a device, all together."""
        if device not in self._places:
            parts = (self.rows, self.columns, np.array(self.rectangle.starts))
            together = upload(np.concatenate(parts), device)
            self._places[device] = torch.split(together, [len(part) for part in parts])
        return self._places[device]

    @cached_property
    def _spans(self) -> np.ndarray:
        """Find each row's first token among the N, and the first column that is its own. [R, 2] int64."""
        own = np.array(self.rectangle.starts) + (self.prefix.head if self.prefix else 0)
        counts = self.last - np.clip(own, self.first, self.last)
        return np.stack((counts.cumsum() - counts, own), 1)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Store keys and values, and attend. query [N, H, D], key and value [N, H_kv, D] → [N, H, D].

        A rotation is still to be applied.
        """
        rectangle, window = self.rectangle, self.rectangle.windows[layer]
        if layer == len(rectangle.keys):
            new_layer(rectangle, key, value)
            if self.prefix is not None:
                self._write_prefix(self.prefix, layer)
        keys, values = rectangle.keys[layer], rectangle.values[layer]
        if self.kernels is not None and key.shape == value.shape:
            spans, span = self._spans, (self.first, self.last)
            padded = self.kernels.place(query, key, value, rotation, spans, span, keys, values)
            if self.kernels.attends_causally(query.shape[2], query.dtype):
                seen = rectangle.starts, self.first, window
                out = self.kernels.causal_attend(padded, keys, values, *seen, scaling)
            else:
                keys, values = keys[:, :, : self.last], values[:, :, : self.last]
                out = self._attend_block(padded, keys, values, window, scaling)
            collected: Tensor = self.kernels.collect(out, spans, span, len(query))
            return collected
        assert rotation is None, "only the kernels rotate"
        rows, columns, _ = self._on(query.device)
        write(rectangle, layer, key, value, rows, columns)
        rows_count, width = len(rectangle.rows), self.last - self.first
        padded = query.new_zeros(rows_count, query.shape[1], width, query.shape[2])
        padded[rows, :, columns - self.first] = query
        keys, values = keys[:, :, : self.last], values[:, :, : self.last]
        out = self._attend_block(padded, keys, values, window, scaling)
        return out[rows, :, columns - self.first]

    def _attend_block(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scaling: float
    ) -> Tensor:
        """Attend in one block. query [R, H, T, D]; keys, values [R, H_kv, W, D] → [R, H, T, D].

        On a CPU short blocks are products of all query heads that share a key head: 1.6 times faster there, if
        oneDNN makes those in bf16.
        """
        rows, heads, columns, size = query.shape
        kv_heads, width = keys.shape[1:3]
        on_cpu = query.device.type == "cpu"
        in_bf16 = self.kernels if query.dtype == torch.bfloat16 else None
        products = onednn_has_bf16() if in_bf16 else by_products(query)
        if not on_cpu or width > 1024 or not products:
            mask = self._mask(window, query)
            if not on_cpu and heads > kv_heads:
                # With a mask, torch has a fused kernel for grouped heads on a CPU and on few GPUs. On the
                # others it would hold all scores in float32.
                keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
            grouped = keys.shape[1] < heads
            return F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
            )
        packed = query if in_bf16 else query * scaling
        packed = packed.reshape(rows * kv_heads, heads // kv_heads * columns, size)
        scores = torch.bmm(packed, keys.reshape(rows * kv_heads, width, size).transpose(1, 2))
        scores = scores.view(rows, heads, columns, width)
        if in_bf16:
            in_bf16.causal_softmax(scores, self.rectangle.starts, self.first, window, scaling)
        else:
            scores = scores.masked_fill_(~self._mask(window, query), -torch.inf).softmax(-1)
        out = torch.bmm(scores.view(*packed.shape[:2], width), values.reshape(rows * kv_heads, width, -1))
        return out.view(rows, heads, columns, -1)

    def _mask(self, window: int | None, query: Tensor) -> Tensor:
        """Return the mask [R, 1, T, last]: True where a query sees a key; on a GPU 0 there and −inf elsewhere.

        It is made once for all layers of this window and device.
        """
        key = (window, query.device)
        if key not in self._masks:
            seen = self._seen(window, query.device)
            if query.device.type != "cpu":  # what torch would make of it at each layer
                rows, columns = seen.shape[0], self.last - self.first
                bias = query.new_zeros(rows, 1, columns, aligned(self.last))[..., : self.last]
                seen = bias.masked_fill_(seen.logical_not(), -torch.inf)
            self._masks[key] = seen
        return self._masks[key]

    def _seen(self, window: int | None, device: torch.device) -> Tensor:
        starts = self._on(device)[2][:, None, None]
        queries = torch.arange(self.first, self.last, device=device)[:, None]
        keys = torch.arange(self.last, device=device)
        seen = (keys <= queries) & (keys >= starts)
        if window is not None:
            seen &= keys > queries - window
        seen |= queries < starts  # a padding query sees all: its result is not read, nor NaN
        return seen[:, None]

    def _write_prefix(self, prefix: Rectangle, layer: int) -> None:
        """Copy the shared prefix into each row, from its own start on."""
        starts, length = self.rectangle.starts, prefix.head
        for stores, sources in ((self.rectangle.keys, prefix.keys), (self.rectangle.values, prefix.values)):
            store, source = stores[layer], sources[layer]
            if self.kernels is not None:
                self.kernels.copy_prefix(store, source, starts, length)
            else:
                rows = torch.arange(len(starts), device=store.device)[:, None]
                columns = self._on(store.device)[2][:, None] + torch.arange(length, device=store.device)
                store[rows, :, columns] = source[0, :, :length].transpose(0, 1)


@dataclass(eq=False)
class RectangleDecode:
    """Decode one token of every row, in column `head` of its rectangle. N = B, or more with spare rows last."""

    rectangles: Sequence[Rectangle]
    kernels: ModuleType | None = None  # cpu.kernels.operators, for models on a CPU
    _biases: dict[tuple[int, int | None, torch.device], Tensor] = field(default_factory=dict)
    _tables: dict[int | None, np.ndarray] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        return [s for rectangle in self.rectangles for s in rectangle.rows]

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.rectangles[0].windows

    @property
    def positions(self) -> list[int]:
        """Count each row's tokens so far."""
        return [r.head - start for r in self.rectangles for start in r.starts]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Store keys and values, and attend. query [N, H, D], key and value [N, H_kv, D] → [N, H, D].

        A rotation is still to be applied.
        """
        window = self.rectangles[0].windows[layer]
        if self.kernels is None or key.shape != value.shape:
            assert rotation is None, "only the kernels rotate"
            return self._attend_rectangles(layer, window, query, key, value, scaling)
        output: Tensor = self.kernels.attend(query, key, value, rotation, *self.tables(layer), scaling)
        return output

    def tables(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `kernels.attend` reads: where the rows are, and where their rectangles."""
        return self._table(self.rectangles[0].windows[layer]), self._blocks[layer]

    @cached_property
    def _blocks(self) -> np.ndarray:
        """Locate each layer's keys and values, and say how wide they are. [L, rectangles, 3] int64."""
        return np.array(
            [
                [(k.data_ptr(), v.data_ptr(), k.shape[2]) for k, v in layer]
                for layer in zip(*(zip(r.keys, r.values, strict=True) for r in self.rectangles), strict=True)
            ]
        )

    def _table(self, window: int | None) -> np.ndarray:
        """List each row's rectangle, its row there, the first column it sees, the one it writes. [B, 4] int64."""
        if window not in self._tables:
            rows = []
            for index, rectangle in enumerate(self.rectangles):
                stored = rectangle.first_columns.get(window, 0)
                last = rectangle.head - stored
                seen = 0 if window is None else max(0, last + 1 - window)
                for row, start in enumerate(rectangle.starts):
                    rows.append((index, row, max(start - stored, seen), last))
            self._tables[window] = np.array(rows)
        return self._tables[window]

    def _attend_rectangles(
        self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Attend rectangle by rectangle, in torch's own operators.

        Query heads that share a key head are queries of that one head, so keys are read once.
        """
        outs: list[Tensor] = []
        first = 0
        for rectangle in self.rectangles:
            count = len(rectangle.rows)
            own = slice(first, first + count)
            keys, values = rectangle.keys[layer][:count], rectangle.values[layer][:count]
            column = rectangle.head - rectangle.first_columns.get(window, 0)
            keys[:, :, column] = key[own]
            values[:, :, column] = value[own]
            bias = self._bias(rectangle, window, keys)
            if by_products(query):
                outs.append(_attend_by_products(query[own], keys, values, bias, scaling))
            else:
                seen = slice(min(keys.shape[2], -(-(column + 1) // SEEN) * SEEN))
                used = keys[:, :, seen], values[:, :, seen], bias[:, :, seen]
                outs.append(_attend_rows(query[own], *used, scaling))
            first += count
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _bias(self, rectangle: Rectangle, window: int | None, keys: Tensor) -> Tensor:
        """Return the rectangle's bias, brought up to date once a step."""
        key = (id(rectangle), window, keys.device)
        if key not in self._biases:
            self._biases[key] = rectangle.bias(window, keys)
        return self._biases[key]


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attend from one token a row. query [R, H, D]; keys, values [R, H_kv, W, D]; bias [R, 1, W] → [R, H, D]."""
    rows, heads, size = query.shape
    folded = query.reshape(rows, keys.shape[1], heads // keys.shape[1], size)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias[:, :, None], scale=scaling)
    return out.reshape(rows, heads, values.shape[-1])


def _attend_by_products(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attend by two products and a softmax: the same with bias [R, H_kv, W]; all blocks are contiguous."""
    rows, heads, size = query.shape
    kv_heads, width = keys.shape[1:3]
    scores = torch.baddbmm(
        bias.reshape(rows * kv_heads, 1, width),
        query.reshape(rows * kv_heads, heads // kv_heads, size),
        keys.reshape(rows * kv_heads, width, size).transpose(1, 2),
        alpha=scaling,
    )
    out = torch.bmm(scores.softmax(-1), values.reshape(rows * kv_heads, width, values.shape[-1]))
    return out.reshape(rows, heads, values.shape[-1])


def rectangle_prefill(
    rectangle: Rectangle, first: int, last: int, prefix: Rectangle | None, kernels: ModuleType | None = None
) -> RectanglePrefill:
    """Prepare the tokens of columns [first, last) that are neither padding nor shared prefix."""
    own = np.array(rectangle.starts)[:, None] + (prefix.head if prefix else 0)
    rows, columns = np.nonzero(np.arange(first, last) >= own)
    return RectanglePrefill(rectangle, prefix, first, last, rows, columns + first, kernels)
