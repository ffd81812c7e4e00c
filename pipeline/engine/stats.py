"""Count what the engine does while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.limits import PAGE
from pipeline.engine.paged.pages import Pages
from pipeline.engine.rectangles.rectangle import Rectangle
from pipeline.engine.scheduler import padded


@dataclass
class EngineStats:
    """Hold the counts of one run; times in seconds."""

    completion_tokens: int = 0
    prefill_tokens: int = 0  # computed: a shared prefix and duplicates count once
    prefill_columns: int = 0  # the same with the padding of their rectangles
    prefill_sec: float = 0.0
    decode_sec: float = 0.0
    steps: int = 0
    rows: int = 0  # summed over steps
    peak_rows: int = 0
    columns_attended: int = 0  # summed over steps and rows
    columns_needed: int = 0
    peak_kv_cache_bytes: int = 0
    peak_rectangles: list[tuple[int, int, bool]] = field(default_factory=list)  # `shape` of those then
    largest_prefill_columns: int = 0  # of one group, with all padding, a model's own too
    longest_prompt_columns: int = 0
    out_of_memory: int = 0

    def count_prefill(self, rectangle: Rectangle, prefix: Rectangle | None, row_columns: int) -> None:
        shared = prefix.head if prefix else 0
        count, width = len(rectangle.rows), rectangle.head - shared
        self.prefill_columns += count * width
        self.largest_prefill_columns = max(self.largest_prefill_columns, count * padded(width, row_columns))
        self.longest_prompt_columns = max(self.longest_prompt_columns, rectangle.head)
        self.prefill_tokens += count * (rectangle.head - shared) - sum(rectangle.starts)

    def count_rectangles(self, rectangles: Sequence[Rectangle], prefixes: Sequence[Rectangle] = ()) -> None:
        held = sum(r.nbytes for r in (*rectangles, *prefixes))
        if held > self.peak_kv_cache_bytes:
            self.peak_kv_cache_bytes = held
            self.peak_rectangles = [r.shape for r in (*rectangles, *prefixes)]
        self.peak_rows = max(self.peak_rows, sum(len(r.rows) for r in rectangles))

    def count_step(self, rectangles: Sequence[Rectangle]) -> None:
        self.steps += 1
        for rectangle in rectangles:
            count = len(rectangle.rows)
            self.rows += count
            self.columns_attended += rectangle.columns
            self.columns_needed += count * (rectangle.head + 1) - sum(rectangle.starts)

    def count_pass(self, tokens: int, columns: int) -> None:
        """Count tokens that were computed without padding, in a row that then has so many columns."""
        self.prefill_tokens += tokens
        self.prefill_columns += tokens
        self.largest_prefill_columns = max(self.largest_prefill_columns, tokens)
        self.longest_prompt_columns = max(self.longest_prompt_columns, columns)

    def count_pages(self, rows: int, pages: Pages) -> None:
        if pages.nbytes > self.peak_kv_cache_bytes:
            self.peak_kv_cache_bytes = pages.nbytes
            self.peak_rectangles = [(1, pages.count * PAGE, False)]  # a row of them all, and the scratch page
        self.peak_rows = max(self.peak_rows, rows)

    def count_launch(self, held: Sequence[int]) -> None:
        """Count a step over pages, in which rows had so many columns before."""
        self.steps += 1
        self.rows += len(held)
        self.columns_attended += sum((h // PAGE + 1) * PAGE for h in held)
        self.columns_needed += sum(h + 1 for h in held)

    def summary(self) -> dict[str, Any]:
        """Return what stats.json says of the batch; a ratio of nothing is None."""
        padding = self.prefill_columns - self.prefill_tokens
        return {
            "prefill_tokens": self.prefill_tokens,
            "prefill_padding_fraction": padding / self.prefill_columns if self.prefill_columns else None,
            "prefill_sec": self.prefill_sec,
            "decode_sec": self.decode_sec,
            "decode_steps": self.steps,
            "mean_rows_in_flight": self.rows / self.steps if self.steps else None,
            "peak_rows_in_flight": self.peak_rows,
            "columns_attended_over_needed": (
                self.columns_attended / self.columns_needed if self.columns_needed else None
            ),
            "peak_kv_cache_bytes": self.peak_kv_cache_bytes,
            "out_of_memory": self.out_of_memory,
        }
