"""Run a batch in rectangles: rows of similar length together, left-padded to one width.

This is the way for CPUs, where a contiguous product is everything, and for a model that is split over several GPUs.
"""

import time
from collections.abc import Callable

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.masks import Masks
from pipeline.engine.model_facts import rope_switch
from pipeline.engine.prefixes import Prefixes, Tokens
from pipeline.engine.rectangles.forward import Forward
from pipeline.engine.rectangles.rectangle import Rectangle, regroup
from pipeline.engine.sampling import next_tokens
from pipeline.engine.scheduler import Prefix, Sample, Scheduler, partition, prefill_groups
from pipeline.engine.stats import EngineStats

SPARE_RECTANGLES = 3  # more than the best partition has: time to regroup them all


class RectangleBatch:
    """Hold rows in flight, each in one of several rectangles.

    Args:
        accept: gives a row its next token, and says whether the row is done.
        masks: of rows with a constraint.
        row_columns: the model pads each row of a prefill to a multiple of it.
    """

    def __init__(
        self,
        forward: Forward,
        prefill_tokens: int,
        share_prefix: bool,
        stats: EngineStats,
        accept: Callable[[Sample, int], bool],
        masks: Masks,
        row_columns: int = 1,
    ) -> None:
        self._forward = forward
        self._row_columns = row_columns
        self._prefill_tokens = prefill_tokens
        self._overhead = forward.limits.rectangle_overhead
        self._stats = stats
        self._accept = accept
        self._masks = masks
        self._rope_switch = rope_switch(forward.config)
        self._rectangles: list[Rectangle] = []
        self._groups: list[
            tuple[list[Sample], Rectangle | None]
        ] = []  # admitted, not yet prefilled; their prefix
        self._shares = share_prefix and forward.can_share_prefix
        self._prefixes = Prefixes(self._compute_prefix, longest=self._rope_switch)

    @property
    def live(self) -> list[Sample]:
        return [s for r in self._rectangles for s in r.rows] + [s for group, _ in self._groups for s in group]

    def tokens_of(self, sample: Sample) -> int:
        return sample.length

    def begin(self, scheduler: Scheduler) -> None:
        self.look_ahead(scheduler)

    def look_ahead(self, scheduler: Scheduler) -> None:
        if self._shares:
            self._prefixes.plan(scheduler)

    def step(self, scheduler: Scheduler) -> None:
        if not self._groups:
            self._admit(scheduler)
        if self._groups:
            self._prefill()
        else:
            self._decode_step(scheduler)

    def drop(self) -> list[Sample]:
        rows = self.live
        self._rectangles, self._groups = [], []
        self._prefixes.clear()
        return rows

    def _admit(self, scheduler: Scheduler) -> None:
        """Cut what there is room for into groups, each of rows with one prefix, or none."""
        live = self.live
        tokens = sum(s.length for s in live)
        admitted = scheduler.admit(len(live), tokens + self._prefixes.tokens)
        if (
            admitted
            and tokens + self._prefixes.tokens + sum(s.length for s in admitted) > scheduler.max_tokens
        ):
            self._prefixes.clear()  # the batch is one row, longer than there is room for
        self._groups = [(admitted, None)] if admitted else []
        shared: dict[tuple[Prefix | None, bool], list[Sample]] = {}
        for sample in admitted:
            shared.setdefault((self._prefixes.take(sample), self._is_long(sample)), []).append(sample)
        self._groups = []
        for (prefix, _), samples in shared.items():
            columns = len(prefix.token_ids) if prefix else 0
            groups = prefill_groups(
                samples, columns, self._prefill_tokens, self._forward.equal_lengths, self._row_columns
            )
            self._groups += [(group, prefix.stored if prefix else None) for group in groups]
        self._prefixes.free_unneeded()

    def _prefill(self) -> None:
        """Run one admitted group; it joins the batch as a rectangle of its own."""
        started = time.perf_counter()
        group, prefix = self._groups[0]
        copies: dict[tuple[int, ...], list[Sample]] = {}
        for sample in group:
            copies.setdefault(sample.all_token_ids, []).append(sample)
        masks = self._masks.start([s for c in copies.values() for s in c])
        # Under longrope a pass's largest position decides for all of it: long rows are never cut.
        budget = self._prefill_tokens if not self._is_long(group[0]) else 1 << 62
        rectangle, logits = self._forward.prefill([c[0] for c in copies.values()], prefix, budget)
        self._stats.count_prefill(rectangle, prefix, self._row_columns)
        if len(group) > len(copies):
            rectangle.repeat(list(copies.values()))
            logits = logits[[i for i, c in enumerate(copies.values()) for _ in c]]
        tokens = next_tokens(logits, rectangle.rows, masks())
        del self._groups[0]
        self._rectangles.append(rectangle)
        self._stats.count_rectangles(self._rectangles, self._prefixes.stored)
        self._extend([rectangle], tokens)
        self._stats.prefill_sec += time.perf_counter() - started

    def _decode_step(self, scheduler: Scheduler) -> None:
        """Give every row one token. The second pass can fail when rows of the first have finished."""
        started = time.perf_counter()
        self._put_back_crossing(scheduler)
        self._regroup()
        for long in (True, False):
            rectangles = [r for r in self._rectangles if self._is_long(r.rows[0]) == long]
            if rectangles:
                samples = [s for r in rectangles for s in r.rows]
                masks = self._masks.start(samples)
                logits = self._forward.decode(rectangles)
                tokens = next_tokens(logits, samples, masks())
                self._stats.count_step(rectangles)
                for rectangle in rectangles:
                    rectangle.head += 1
                if self._forward.equal_lengths:  # which may grow at every step
                    self._stats.count_rectangles(self._rectangles)
                self._extend(rectangles, tokens)
        self._stats.decode_sec += time.perf_counter() - started

    def _extend(self, rectangles: list[Rectangle], tokens: list[int]) -> None:
        """Give every row its token; retire the rows that are done."""
        end = len(tokens)
        for rectangle in reversed(rectangles):
            end -= len(rectangle.rows)
            for row in reversed(range(len(rectangle.rows))):  # a retired row is replaced by one seen before
                if self._accept(rectangle.rows[row], tokens[end + row]):
                    rectangle.retire(row)
        self._rectangles = [r for r in self._rectangles if r.rows]

    def _regroup(self) -> None:
        """Copy rectangles that are full, and thin ones beside them, into the best partition of their rows."""
        if self._forward.equal_lengths:
            return
        best = sum(len(self._partition(r)) for r in self._by_regime(self._rectangles))
        if len(self._rectangles) > best + SPARE_RECTANGLES:
            due = self._rectangles
        elif any(r.full for r in self._rectangles):
            due = [r for r in self._rectangles if r.full or r.columns < self._overhead]
        else:
            return
        kept = [r for r in self._rectangles if r not in due]
        for rectangles in self._by_regime(due):
            kept += regroup(rectangles, self._partition(rectangles))
        self._rectangles = kept
        self._stats.count_rectangles(kept, self._prefixes.stored)

    def _by_regime(self, rectangles: list[Rectangle]) -> list[list[Rectangle]]:
        """Part rectangles under long and short rotary factors, which never share a pass."""
        parts = ([r for r in rectangles if self._is_long(r.rows[0]) == long] for long in (True, False))
        return [part for part in parts if part]

    def _partition(self, rectangles: list[Rectangle]) -> list[list[Sample]]:
        rows = sorted((s for r in rectangles for s in r.rows), key=lambda s: s.length, reverse=True)
        return [rows[part] for part in partition([s.length for s in rows], self._overhead)]

    def _put_back_crossing(self, scheduler: Scheduler) -> None:
        """Put rows back that grow past longrope's switch, to be prefilled again, as `generate` does."""
        if self._rope_switch is None:
            return
        for rectangle in self._rectangles:
            for row in reversed(range(len(rectangle.rows))):
                held = rectangle.head - rectangle.starts[row]
                if held <= self._rope_switch < rectangle.rows[row].length:
                    scheduler.put_back([rectangle.rows[row]])
                    rectangle.retire(row)
        self._rectangles = [r for r in self._rectangles if r.rows]

    def _compute_prefix(self, ids: Tokens) -> Rectangle:
        row = Sample(Request("", ids, GenerationParams()), 0)
        rectangle, _ = self._forward.prefill([row], None, self._prefill_tokens)
        self._stats.count_prefill(rectangle, None, 1)
        return rectangle

    def _is_long(self, sample: Sample) -> bool:
        return self._rope_switch is not None and sample.length > self._rope_switch
