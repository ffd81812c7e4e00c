"""Keep keys and values in pages of PAGE columns, and count who holds which.

A row's columns lie on pages that its table lists, the first token in the first page's first column, without
padding. Pages are all alike, so rows of any length share the memory without holes, and rows that begin with
the same tokens share the pages of that beginning.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.limits import PAGE
from pipeline.engine.upload import upload

SCRATCH = 0  # the page of rows that only fill a graph up


class Pages:
    """Keep all pages: which are free, how many rows hold each, and each layer's tensors.

    A layer's keys and values are made at its first write, [pages, PAGE, H_kv, D].
    """

    def __init__(self, count: int) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._holders = [0] * (count + 1)  # with SCRATCH
        self._holders[SCRATCH] = 1
        self._free = list(range(count, 0, -1))

    @property
    def count(self) -> int:
        """Count the pages for rows."""
        return len(self._holders) - 1

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Count the bytes allocated for keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def take(self, count: int) -> list[int]:
        """Take so many free pages, for one holder. The caller knows that there are enough."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> list[int]:
        """Share the same pages with one more holder."""
        shared = list(pages)
        for page in shared:
            self._holders[page] += 1
        return shared

    def release(self, pages: Iterable[int]) -> None:
        """Release pages from one holder; a page without any is free."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def clear(self, pages: Iterable[int]) -> None:
        """Write zeros where only one holder has written: 0 times a NaN that it leaves would be NaN for the next."""
        if self.keys:
            own = upload(
                [page for page in pages if self._holders[page] == 1], self.keys[0].device, torch.int64
            )
            for tensor in (*self.keys, *self.values):
                tensor[own] = 0

    def grow(self, count: int) -> None:
        """Add pages; what is written stays. Layer by layer, so that one at a time is held twice."""
        first = len(self._holders)
        self._holders += [0] * count
        self._free = [*range(first + count - 1, first - 1, -1), *self._free]
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = new = old.new_zeros(first + count, *old.shape[1:])
                new[:first] = old
                del old

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values; the first time, make them like those given, [any, H_kv, D].

        Zeros, since a masked column's weight of 0 times whatever it holds must be 0.
        """
        if index == len(self.keys):
            for tensors, like in ((self.keys, key), (self.values, value)):
                tensors.append(like.new_zeros(len(self._holders), PAGE, *like.shape[1:]))
        return self.keys[index], self.values[index]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, each (from, to), in all layers."""
        if pairs and self.keys:
            source, target = upload(pairs, self.keys[0].device).T
            for tensor in (*self.keys, *self.values):
                tensor[target] = tensor[source]


def pages_for(columns: int) -> int:
    """Count the pages that hold so many columns."""
    return -(-columns // PAGE)


def places(pages: Sequence[int], first: int, last: int) -> np.ndarray:
    """Locate columns [first, last) of a row: page · PAGE + column on the page. [last − first] int64."""
    columns = np.arange(first, last)
    return np.asarray(pages, dtype=np.int64)[columns // PAGE] * PAGE + columns % PAGE
