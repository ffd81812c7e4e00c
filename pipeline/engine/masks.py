"""Compute which tokens the rows of a batch may not take next, while the model runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine.constraint import Constraints
from pipeline.engine.cpu import load_kernels
from pipeline.engine.scheduler import Sample
from pipeline.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Hold what some rows of a batch may not take."""

    rows: list[int]  # K of the batch's rows: those with a constraint
    allowed: Tensor  # [K, words] int64, a bit for each token that may come; beyond, none may

    def apply(self, logits: Tensor, *, keep: bool) -> Tensor:
        """Return the logits with −inf where a token may not come. [B, V] → [B, V].

        Args:
            keep: leave those that are given as they are.
        """
        plain = logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and logits.is_contiguous()
        if plain and (kernels := load_kernels()):
            scores = logits.clone() if keep else logits
            kernels.forbid(scores, torch.tensor(self.rows), self.allowed)
            return scores
        tokens = self._forbidden(logits)
        if len(self.rows) == len(logits):
            return logits.masked_fill(tokens, -torch.inf)
        scores, rows = logits.clone(), upload(self.rows, logits.device)
        scores[rows] = logits[rows].masked_fill_(tokens, -torch.inf)
        return scores

    def _forbidden(self, logits: Tensor) -> Tensor:
        """Spread the bits out, on the logits' device: an eighth of it is brought there. → [K, V] bool."""
        bits = upload(self.allowed.view(torch.uint8), logits.device)
        each = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
        tokens = (bits[:, :, None] & upload(each, logits.device)).eq(0).flatten(1)[:, : logits.shape[1]]
        return F.pad(tokens, (0, logits.shape[1] - tokens.shape[1]), value=True)


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
        words = self._constraints.words
        allowed = torch.zeros(len(rows), -(-words // 2), dtype=torch.int64)
        first, row_bytes = allowed.data_ptr(), allowed.shape[1] * 8
        for place, sample in enumerate(samples):
            if sample.constraint is None:
                assert sample.request.constraint is not None
                sample.constraint = self._constraints.begin(sample.request.constraint)
            sample.constraint.write_allowed(first + place * row_bytes, 4 * words)
        return Forbidden(rows, allowed)
