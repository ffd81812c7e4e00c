"""Keep track of rows in flight, and of what the device has been told to do with some of them."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from pipeline.engine.sampling import Report
from pipeline.engine.scheduler import Sample


@dataclass(eq=False, slots=True)
class Row:
    """Follow a sample through the running batch."""

    sample: Sample
    slot: int
    pages: list[int]
    held: int  # columns written, those of launched work included
    made: int  # tokens of the completion, those under way included
    copies: list["Row"] = field(default_factory=list)  # of the same tokens so far: prefilled with this one
    done: bool = False

    @property
    def goes_on(self) -> bool:
        most = len(self.sample.forced) or self.sample.request.params.max_new_tokens
        return not self.done and self.made < most


@dataclass(frozen=True, slots=True)
class Launch:
    """Remember work that the device was given, and whose tokens the host has not read yet."""

    rows: list[Row]
    held: list[int]  # columns that each row of a decode step held before; none of a prefill
    tokens: Tensor  # [B] int64, on the host once `ready`
    ready: torch.cuda.Event | None
    report: Report | None

    @classmethod
    def of(cls, rows: list[Row], held: list[int], tokens: Tensor, report: Report | None) -> Self:
        """Begin to bring the tokens, [B] int64, to the host."""
        if not (tokens.is_cuda and torch.cuda.is_available()):
            return cls(rows, held, tokens.clone(), None, report)
        copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        copy.copy_(tokens, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return cls(rows, held, copy, ready, report)

    def read(self) -> list[int]:
        """Read each row's token, once the device has made it."""
        if self.ready is not None:
            self.ready.synchronize()
        return [int(token) for token in self.tokens.tolist()]
