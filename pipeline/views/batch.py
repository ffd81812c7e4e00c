"""Show several prompts as one batch: ids, attention mask and position ids, padded on either side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Hold the rows, padded on one side: B rows, T columns; T is the longest row."""

    side: Side
    input_ids: list[list[int]]  # [B, T]
    attention_mask: list[list[int]]  # [B, T] 1 on tokens, 0 on pads
    position_ids: list[list[int]]  # [B, T] tokens so far in that row; 0 on pads
    next_columns: list[int]  # [B] where each row's first new token goes
    padding: float  # the share of the cells that are pads


@dataclass(frozen=True, slots=True)
class BatchView:
    """Hold the rows padded on the left, as a job runs them, and on the right."""

    pad_token_id: int
    prompts: list[str]  # as they are named on the screen: the rows' ids
    lengths: list[int]
    left: PaddedRows
    right: PaddedRows


def batch_view(rows: Sequence[Sequence[int]], pad_token_id: int, names: Sequence[str]) -> BatchView:
    """Pad these rows of token ids on either side."""
    return BatchView(
        pad_token_id,
        list(names),
        [len(row) for row in rows],
        padded(rows, pad_token_id, "left"),
        padded(rows, pad_token_id, "right"),
    )


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, side: Side) -> PaddedRows:
    """Pad these rows of token ids on one side."""
    width = max((len(row) for row in rows), default=0)

    def fill(row: Sequence[int], pad: int) -> list[int]:
        pads = [pad] * (width - len(row))
        return [*pads, *row] if side == "left" else [*row, *pads]

    cells = width * len(rows)
    return PaddedRows(
        side,
        [fill(row, pad_token_id) for row in rows],
        [fill([1] * len(row), 0) for row in rows],
        [fill(range(len(row)), 0) for row in rows],
        [width if side == "left" else len(row) for row in rows],
        1 - sum(map(len, rows)) / cells if cells else 0.0,
    )
