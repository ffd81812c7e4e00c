"""Keep keys and values of the running batch in rectangles.

A rectangle holds rows of similar length, left-padded to one width: row i's tokens occupy columns
[starts[i], head), and what lies before is its padding. All rows write their next token in column `head`,
so no row ever has a hole and column distance is token distance.

Keys and values are contiguous [rows, H, width, D]; the linear layers never see the padding, only the
attention of this rectangle does. Rows leave by moving the last row into their place. Growing, trimming,
merging and splitting are one verb, `regroup`: it copies rows into new rectangles, once in a chunk of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.engine.host_memory import return_heap
from pipeline.engine.limits import CPU, Limits
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload

# Layers copied before the holes that they leave in the heap go back to the system: larger blocks do not fit in.
LAYERS = 4


@dataclass(eq=False)
class Rectangle:
    """Hold rows of near-equal length.

    A sliding-window layer keeps only the columns that can still be seen: its column c is stored at
    c − first_columns[window].
    """

    rows: list[Sample]
    starts: list[int]
    head: int
    width: int
    windows: tuple[int | None, ...]  # each layer's sliding window; None is full attention
    limits: Limits
    keys: list[Tensor] = field(default_factory=list)  # each layer: [≥ rows, H_kv, width − first, D]
    values: list[Tensor] = field(default_factory=list)
    first_columns: dict[int | None, int] = field(default_factory=dict)
    biases: dict[tuple[int | None, torch.device], Tensor] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return self.head == self.width

    @property
    def columns(self) -> int:
        return len(self.rows) * self.width

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Say for how many rows it was made, its columns without the chunk, and whether sliding layers are cut."""
        return len(self.keys[0]), self.width - self.limits.chunk, bool(self.first_columns)

    @property
    def nbytes(self) -> int:
        """Count the bytes allocated for keys and values."""
        return sum(t.untyped_storage().nbytes() for t in (*self.keys, *self.values))

    def retire(self, row: int) -> None:
        """Drop a row: the last one takes its place, so the rest stay contiguous."""
        last = len(self.rows) - 1
        if row != last:
            for tensor in (*self.keys, *self.values, *self.biases.values()):
                tensor[row] = tensor[last]
            self.rows[row], self.starts[row] = self.rows[last], self.starts[last]
        self.rows.pop()
        self.starts.pop()

    def repeat(self, samples: list[list[Sample]]) -> None:
        """Turn each row into as many copies as it has samples, one for each."""
        index = [i for i, copies in enumerate(samples) for _ in copies]
        self.rows = [s for copies in samples for s in copies]
        self.starts = [self.starts[i] for i in index]
        on = {device: upload(index, device) for device in {t.device for t in self.keys}}
        self.keys = [t.index_select(0, on[t.device]) for t in self.keys]
        self.values = [t.index_select(0, on[t.device]) for t in self.values]

    def bias(self, window: int | None, keys: Tensor) -> Tensor:
        """Return what a decode step adds to the scores: 0 on the columns that a row may see, −inf elsewhere.

        It is made once for a rectangle and a device, then kept up by one column a step.

        Returns:
            [rows, H_kv or 1, width − first] in the dtype of `keys`: one for each head for `by_products`.
        """
        first = self.first_columns.get(window, 0)
        key = (window, keys.device)
        bias = self.biases.get(key)
        if bias is None:
            bias = self.biases[key] = self._new_bias(window, keys)
        else:
            bias[:, :, self.head - first].zero_()
            if window is not None and self.head - window >= first:
                bias[:, :, self.head - window - first].fill_(-torch.inf)
        return bias[: len(self.rows), :, : self.width - first]

    def _new_bias(self, window: int | None, keys: Tensor) -> Tensor:
        heads = keys.shape[1] if by_products(keys) else 1
        first = self.first_columns.get(window, 0)
        width = self.width - first if by_products(keys) else aligned(self.width - first)
        columns = torch.arange(first, first + width, device=keys.device)
        seen = (columns >= upload(self.starts, keys.device)[:, None]) & (columns <= self.head)
        if window is not None:
            seen &= columns > self.head - window
        bias = keys.new_zeros(len(self.rows), heads, width)
        return bias.masked_fill_(seen.logical_not()[:, None], -torch.inf)


def by_products(states: Tensor) -> bool:
    """Say whether attention is two products and a softmax.

    Else it is torch's own kernel, which keeps scores in float32 where these are in half precision.
    """
    return states.dtype == torch.float32


def aligned(columns: int) -> int:
    """Round up to columns of a mask that torch's kernels on a GPU read as it is; others they copy each time."""
    return -(-columns // 16) * 16


def allocate(
    rows: list[Sample], lengths: Sequence[int], windows: tuple[int | None, ...], limits: Limits = CPU
) -> Rectangle:
    """Make a rectangle for a prefill: its rows end together; each layer is made at its first write."""
    longest = max(lengths)
    return Rectangle(rows, [longest - n for n in lengths], longest, longest + limits.chunk, windows, limits)


def write(
    rectangle: Rectangle, layer: int, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor
) -> None:
    """Store a prefill's new tokens at their places.

    Args:
        keys, values: [N, H_kv, D].
        rows, columns: [N] int64.
    """
    if layer == len(rectangle.keys):
        new_layer(rectangle, keys, values)
    rectangle.keys[layer][rows, :, columns] = keys
    rectangle.values[layer][rows, :, columns] = values


def new_layer(rectangle: Rectangle, keys: Tensor, values: Tensor) -> None:
    """Make room for the next layer's keys and values: zeros, with the given ones' heads, size, dtype and device.

    Args:
        keys, values: [any, H_kv, D].
    """
    for store, new in ((rectangle.keys, keys), (rectangle.values, values)):
        store.append(new.new_zeros(len(rectangle.rows), new.shape[1], rectangle.width, new.shape[2]))


def regroup(rectangles: Sequence[Rectangle], groups: Sequence[Sequence[Sample]]) -> list[Rectangle]:
    """Copy rows into new rectangles, one for each group: padding trimmed, a chunk to grow into.

    The old rectangles are used up: their layers are freed one by one as they are copied, so that no more
    than LAYERS are held twice.
    """
    place = {id(s): (r, i) for r, old in enumerate(rectangles) for i, s in enumerate(old.rows)}
    windows = rectangles[0].windows
    new: list[Rectangle] = []
    for group in groups:
        rows = sorted(group, key=lambda s: place[id(s)])  # so that neighbours stay neighbours
        held = [rectangles[r].head - rectangles[r].starts[i] for r, i in (place[id(s)] for s in rows)]
        rectangle = allocate(rows, held, windows, rectangles[0].limits)
        rectangle.first_columns = {w: max(0, rectangle.head - w + 1) for w in windows if w is not None}
        new.append(rectangle)
    runs = [_runs([place[id(s)] for s in rectangle.rows]) for rectangle in new]
    for layer in range(len(windows)):
        for rectangle, its_runs in zip(new, runs, strict=True):
            rectangle.keys.append(_copy(rectangle, its_runs, rectangles, "keys", layer))
            rectangle.values.append(_copy(rectangle, its_runs, rectangles, "values", layer))
        for old in rectangles:
            old.keys[layer] = old.values[layer] = old.keys[layer].new_empty(0)
        if layer % LAYERS == LAYERS - 1 and new[0].keys[layer].device.type == "cpu":
            return_heap()
    return new


Run = tuple[int, int, int, int]  # neighbours in both: new row, rectangle copied from, its row, how many


def _runs(places: list[tuple[int, int]]) -> list[Run]:
    """Join neighbours that stay neighbours, so that each run is one copy."""
    runs: list[Run] = []
    for row, (source, source_row) in enumerate(places):
        if runs:
            first, last_source, last_row, count = runs[-1]
            if (source, source_row) == (last_source, last_row + count):
                runs[-1] = (first, source, last_row, count + 1)
                continue
        runs.append((row, source, source_row, 1))
    return runs


def _copy(new: Rectangle, runs: list[Run], rectangles: Sequence[Rectangle], name: str, layer: int) -> Tensor:
    """Copy one layer's keys or values to a new rectangle; rows are aligned on the right, at the head."""
    like: Tensor = getattr(rectangles[0], name)[layer]
    window = new.windows[layer]
    used = new.head - new.first_columns.get(window, 0)  # columns before the chunk
    tensor = like.new_empty(len(new.rows), like.shape[1], used + new.limits.chunk, like.shape[3])
    tensor[:, :, used:] = 0
    for row, source, source_row, count in runs:
        old = rectangles[source]
        old_used = old.head - old.first_columns.get(window, 0)
        kept = min(used, old_used)
        tensor[row : row + count, :, : used - kept] = 0
        block: Tensor = getattr(old, name)[layer]
        tensor[row : row + count, :, used - kept : used] = block[
            source_row : source_row + count, :, old_used - kept : old_used
        ]
    return tensor
