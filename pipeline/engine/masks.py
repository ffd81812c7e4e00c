"""Compute which tokens the rows of a batch may not take next, while the model runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.constraint import Constraints
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Hold what some rows of a batch may not take."""

    rows: list[int]  # K of the batch's rows: those with a constraint
    tokens: Tensor  # [K, at most V] bool; what lies beyond is forbidden, too

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits with −inf where a token may not come; a copy. [B, V] → [B, V]."""
        tokens = upload(self.tokens, logits.device)[:, : logits.shape[1]]
        tokens = F.pad(tokens, (0, logits.shape[1] - tokens.shape[1]), value=True)
        if len(self.rows) == len(logits):
            return logits.masked_fill(tokens, -torch.inf)
        scores, rows = logits.clone(), upload(self.rows, logits.device)
        scores[rows] = logits[rows].masked_fill_(tokens, -torch.inf)
        return scores


class Masks:
    """Compute masks on a thread of its own: llguidance and the model both let others run meanwhile."""

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._thread: ThreadPoolExecutor | None = None

    def start(self, samples: Sequence[Sample]) -> Callable[[], Forbidden | None]:
        """Begin to compute the masks of these rows, in their order; return what waits for them.

        It gives None where no row has a constraint.
        """
        rows = [row for row, sample in enumerate(samples) if sample.request.constraint is not None]
        if not rows:
            return lambda: None
        self._thread = self._thread or ThreadPoolExecutor(1, "masks")
        return self._thread.submit(self._compute, rows, [samples[row] for row in rows]).result

    def _compute(self, rows: list[int], samples: list[Sample]) -> Forbidden:
        allowed = np.zeros((len(rows), self._constraints.words), np.uint32)
        for bits, sample in zip(allowed, samples, strict=True):
            if sample.constraint is None:
                assert sample.request.constraint is not None
                sample.constraint = self._constraints.begin(sample.request.constraint)
            sample.constraint.write_allowed(bits)
        forbidden = np.unpackbits(~allowed.view(np.uint8), axis=1, bitorder="little")
        return Forbidden(rows, torch.from_numpy(forbidden.view(bool)))
