"""Keep account of which samples of which rows are written.

33 bytes a row: a million rows are as good as none.
"""

from array import array
from bisect import bisect_left

import numpy as np

from pipeline.common.terminal import how_many

MISSING, DONE = 0, 1


class Ledger:
    """Keep the rows of a job in the order of its prompt file, each with its key and its samples.

    Keys are 64-bit hashes: of a million rows, two share one with a chance of 3 in 10⁸.
    """

    def __init__(self) -> None:
        self.errors = 0  # samples that ended in an error
        self.done = 0
        self._keys = array("Q")
        self._indices = array("Q")  # each row's place in the file
        self._metadata = array("Q")  # hashes
        self._firsts = array("Q", [0])  # [rows + 1] its first sample's place in _state
        self._state = bytearray()
        self._sorted: tuple[array[int], array[int]] | None = None  # keys, and their rows

    @property
    def rows(self) -> int:
        """Count the rows."""
        return len(self._keys)

    @property
    def total(self) -> int:
        """Count the samples of all rows."""
        return len(self._state)

    @property
    def missing(self) -> int:
        """Count the samples that are not written."""
        return self.total - self.done

    @property
    def shown(self) -> str:
        """Show how far it is: 3 of 8 rows."""
        return f"{self.done:,} of {how_many(self.total, 'row')}"

    def add(self, key: str, index: int, samples: int, metadata: int = 0) -> None:
        """Add the next row of the prompt file; nothing of it is written yet."""
        self._keys.append(int(key, 16))
        self._indices.append(index)
        self._metadata.append(metadata)
        self._state.extend(bytes(samples))
        self._firsts.append(len(self._state))

    def find(self, key: str) -> int | None:
        """Find the row with this key, when all rows are added."""
        if self._sorted is None:
            order = np.argsort(np.frombuffer(self._keys, np.uint64)) if self._keys else np.array([], int)
            keys = np.frombuffer(self._keys, np.uint64)[order] if self._keys else order
            self._sorted = array("Q", keys.tobytes()), array("Q", order.tobytes())
        keys_sorted, rows = self._sorted
        wanted = int(key, 16)
        place = bisect_left(keys_sorted, wanted)
        return rows[place] if place < len(rows) and keys_sorted[place] == wanted else None

    def index(self, row: int) -> int:
        """Give a row's place in the file."""
        return self._indices[row]

    def metadata(self, row: int) -> int:
        """Give the hash of what a row carries along."""
        return self._metadata[row]

    def mark(self, row: int, sample: int, *, failed: bool) -> bool:
        """Note that a sample is written; return False if it was before, or the row has no such sample."""
        place = self._firsts[row] + sample
        if not self._firsts[row] <= place < self._firsts[row + 1] or self._state[place] == DONE:
            return False
        self._state[place] = DONE
        self.done += 1
        self.errors += failed
        return True

    def missing_samples(self, row: int, key: str) -> list[int] | None:
        """List what is still to be made of the row at this place; None if that is not the row that was added."""
        if row >= len(self._keys) or self._keys[row] != int(key, 16):
            return None
        first, end = self._firsts[row], self._firsts[row + 1]
        return [place - first for place in range(first, end) if self._state[place] == MISSING]
