"""Run a batch in pages: the device is always one launch ahead of the host.

What the host reads is a step old: while it looks at the tokens of one step, writes finished rows and admits
new ones, the device runs the next. A row that ends by itself has by then one more token under way, which is
dropped; one that ends at its length is known beforehand. A row with a constraint needs the token before its
mask: a step with such a row begins once the last one has been read, and masks are made while the device runs.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.engine.limits import PAGE
from pipeline.engine.masks import Masks
from pipeline.engine.model_facts import rope_switch
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.paged.pages import pages_for
from pipeline.engine.paged.passes import Segment
from pipeline.engine.paged.rows import Launch, Row
from pipeline.engine.prefixes import Prefixes, Tokens
from pipeline.engine.sampling import AGAIN, NONE, choose, penalises, record, report, seen_tokens
from pipeline.engine.scheduler import Sample, Scheduler
from pipeline.engine.stats import EngineStats
from pipeline.engine.upload import upload


class PagedBatch:
    """Hold rows in flight, each with a slot, and pages for its whole length from the time it is admitted.

    Args:
        max_rows: slots.
        accept: gives a row its next token, and says whether the row is done.
        masks: of rows with a constraint.
    """

    def __init__(
        self,
        forward: PagedForward,
        max_rows: int,
        prefill_tokens: int,
        share_prefix: bool,
        stats: EngineStats,
        accept: Callable[[Sample, int], bool],
        masks: Masks,
    ) -> None:
        self._forward = forward
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._shares = share_prefix
        self._stats = stats
        self._accept = accept
        self._masks = masks
        self._switch = rope_switch(forward.config) or 1 << 62
        self._rows: list[Row] = []
        self._admitted: list[Sample] = []  # those without pages yet
        self._again: list[Sample] = []  # those whose next token is to be chosen from all
        self._queue: deque[Row] = deque()  # those not yet prefilled to their end, without copies
        self._launches: deque[Launch] = deque()
        self._slots: list[int] = []  # free
        # Whole pages, which rows can share.
        self._prefixes = Prefixes(self._compute_prefix, self._release, PAGE, self._switch)
        self._seen: Tensor | None = None  # [slots met, V] bool, once a row has a repetition penalty

    @property
    def live(self) -> list[Sample]:
        return [row.sample for row in self._rows] + self._admitted + self._again

    def tokens_of(self, sample: Sample) -> int:
        """Count the columns of the pages that it takes at its longest; its last token is never fed."""
        return pages_for(sample.length + sample.remaining_tokens - 1) * PAGE

    def begin(self, scheduler: Scheduler) -> None:
        """Make room for what waits, and for what it shares."""
        self.look_ahead(scheduler)
        longest = sorted(map(self.tokens_of, scheduler.waiting), reverse=True)[: scheduler.max_rows]
        most = max(longest[0], scheduler.max_tokens)
        needed = min(most, sum(longest) + self._prefixes.tokens)
        self._forward.open(needed // PAGE, self._max_rows, longest[0] // PAGE)
        self._slots = list(range(self._max_rows - 1, -1, -1))

    def look_ahead(self, scheduler: Scheduler) -> None:
        if self._shares:
            self._prefixes.plan(scheduler)

    def step(self, scheduler: Scheduler) -> None:
        """Give the device its next work, then read what it had done before."""
        started = time.perf_counter()
        if any(row.sample.request.constraint is not None for row in self._rows):
            self._read(ahead=0)
        if not self._queue:
            if self._again:
                scheduler.put_back(self._again)
                self._again = []
            self._put_back_crossing(scheduler)
            self._admit(scheduler)
        prefills = bool(self._queue)
        launches = self._prefill() if prefills else self._decode_step()
        self._read(ahead=launches)
        seconds = time.perf_counter() - started
        if prefills:
            self._stats.prefill_sec += seconds
        else:
            self._stats.decode_sec += seconds

    def drop(self) -> list[Sample]:
        """Read what is under way, then give all memory back; return what was in flight, with its tokens."""
        self._read(ahead=0)
        rows = self.live
        self._rows, self._admitted, self._again, self._seen = [], [], [], None
        self._queue.clear()
        self._prefixes.clear()
        self._forward.close()
        return rows

    def _admit(self, scheduler: Scheduler) -> None:
        """Give each admitted sample a slot, and pages for its whole length."""
        if not scheduler.waiting or len(self._rows) >= scheduler.max_rows:
            return  # as in most steps, whose time on a fast card is short
        tokens = sum(map(self.tokens_of, self.live))
        self._admitted = scheduler.admit(len(self._rows), tokens + self._prefixes.tokens)
        added = sum(map(self.tokens_of, self._admitted))
        if self._admitted and tokens + self._prefixes.tokens + added > scheduler.max_tokens:
            self._prefixes.clear()  # the batch is one row, longer than there is room for
        self._make_room(added + self._prefixes.tokens_to_come, scheduler)
        made: list[Row] = []
        leader: Row | None = None
        for sample in self._admitted:
            same = leader is not None and leader.sample.all_token_ids == sample.all_token_ids
            row = self._row(sample, leader if same else None)
            made.append(row)
            if same and leader is not None:
                leader.copies.append(row)
            else:
                leader = row
                self._queue.append(row)
        if made:
            self._forward.assign([row.slot for row in made], [row.pages for row in made])
            self._rows, self._admitted = self._rows + made, []
        self._prefixes.free_unneeded()

    def _make_room(self, tokens: int, scheduler: Scheduler) -> None:
        """Add pages where too few are free."""
        pages = self._forward.pages
        if (missing := tokens // PAGE - pages.free) > 0:
            self._forward.grow(
                max(missing, min(pages.count // 2, scheduler.max_tokens // PAGE - pages.count))
            )

    def _compute_prefix(self, ids: Tokens) -> list[int]:
        """Compute a prefix; return its pages."""
        pages = self._forward.pages.take(len(ids) // PAGE)
        try:
            for first in range(0, len(ids), self._prefill_tokens):
                last = min(first + self._prefill_tokens, len(ids))
                self._forward.prefill([Segment(ids, pages, first, last)], [])
                self._stats.count_pass(last - first, last)
        except Exception:
            self._release(pages)
            raise
        return pages

    def _release(self, pages: list[int]) -> None:
        self._forward.pages.release(pages)

    def _row(self, sample: Sample, leader: Row | None) -> Row:
        """Make a row of its own pages, but for those shared with a leader of the same tokens, or with the prefix."""
        pages = self._forward.pages
        prefix = self._prefixes.take(sample)
        shared = prefix.stored if prefix else []
        if leader is not None:
            shared = leader.pages[: len(sample.all_token_ids) // PAGE]
        own = pages.take(self.tokens_of(sample) // PAGE - len(shared))
        slot, made = self._slots.pop(), len(sample.token_ids)
        return Row(sample, slot, pages.share(shared) + own, len(shared) * PAGE, made)

    def _prefill(self) -> int:
        """Launch one pass over what is admitted; return how many launches made tokens."""
        segments: list[Segment] = []
        rows: list[Row] = []
        keep: list[int] = []  # the segment of each row
        left = self._prefill_tokens
        long = len(self._queue[0].sample.all_token_ids) > self._switch
        while self._queue and left > 0:
            row = self._queue[0]
            ids = row.sample.all_token_ids
            # Under longrope a pass's largest position decides for all of it: long rows are never cut.
            last = len(ids) if long else min(len(ids), row.held + left)
            if (len(ids) > self._switch) != long or (long and segments and last > left):
                break
            segments.append(Segment(ids, row.pages, row.held, last))
            self._stats.count_pass(last - row.held, last)
            left -= last - row.held
            row.held = last
            if last == len(ids):
                rows += [row, *row.copies]
                keep += [len(segments) - 1] * (1 + len(row.copies))
                self._queue.popleft()
        logits = self._forward.prefill(segments, keep, long)
        self._copy_pages(rows)
        self._stats.count_pages(len(self._rows), self._forward.pages)
        if rows:
            self._choose(rows, logits)
        return int(bool(rows))

    def _copy_pages(self, rows: list[Row]) -> None:
        """Give copies the page that their leader has begun; the ones before are shared."""
        pairs: list[tuple[int, int]] = []
        for leader in rows:
            for row in leader.copies:
                row.held = leader.held
                if leader.held % PAGE:
                    pairs.append((leader.pages[leader.held // PAGE], row.pages[leader.held // PAGE]))
        self._forward.pages.copy(pairs)

    def _decode_step(self) -> int:
        """Launch one token for every row that may have more; return how many launches that took."""
        launched = 0
        for long in (True, False):
            rows = [row for row in self._rows if row.goes_on and (row.held >= self._switch) == long]
            if rows:
                logits, tokens = self._forward.decode([(row.slot, row.held) for row in rows], long)
                self._choose(rows, logits, tokens)
                for row in rows:
                    row.held += 1
                launched += 1
        return launched

    def _put_back_crossing(self, scheduler: Scheduler) -> None:
        """Put rows back that grow past longrope's switch, to be prefilled again, as `generate` does."""
        if any(row.goes_on and row.held == self._switch for row in self._rows):
            self._read(ahead=0)
            crossing = [row for row in self._rows if row.held == self._switch and row.goes_on]
            for row in crossing:
                self._retire(row)
            scheduler.put_back(row.sample for row in crossing)

    def _choose(self, rows: list[Row], logits: Tensor, likeliest: Tensor | None = None) -> None:
        """Choose each row's next token, and start to bring the choice to the host.

        Args:
            logits: [B, V].
            likeliest: [B] int64, after a decode step: the most probable tokens, which the device has as its
                newest already.
        """
        samples = [row.sample for row in rows]
        tokens = likeliest
        if tokens is None or not all(_is_plain(s) for s in samples):
            seen = self._seen_by(rows, logits)
            slots = upload([row.slot for row in rows], self._forward.device)
            masks, steps = self._masks.start(samples), [row.made for row in rows]
            tokens = choose(logits, samples, steps, seen, masks(), waits=likeliest is None)
            self._forward.tokens[slots] = tokens
            if seen is not None and self._seen is not None:
                self._seen[slots, tokens.clamp(min=0)] = True
        reported = report(logits, tokens, samples)
        held = [] if likeliest is None else [row.held for row in rows]
        self._launches.append(Launch.of(rows, held, tokens, reported))
        for row in rows:
            row.made += 1

    def _seen_by(self, rows: list[Row], logits: Tensor) -> Tensor | None:
        """Mark the tokens that each row has, where one has a repetition penalty. [B, V] bool."""
        samples = [row.sample for row in rows]
        if not penalises(samples):
            return None
        seen = logits.new_zeros(0, logits.shape[1], dtype=torch.bool) if self._seen is None else self._seen
        if more := max(0, max(row.slot for row in rows) + 1 - len(seen)):
            self._seen = seen = torch.cat([seen, seen.new_zeros(more, seen.shape[1])])
        slots = upload([row.slot for row in rows], self._forward.device)
        fresh = [i for i, row in enumerate(rows) if row.made == len(row.sample.token_ids)]
        if fresh:  # their tokens are all on the host
            index = upload(fresh, self._forward.device)
            seen[slots[index]] = seen_tokens([samples[i] for i in fresh], logits[: len(fresh)])
        return seen[slots]

    def _read(self, ahead: int) -> None:
        """Read launched tokens, all but those of the newest `ahead` launches; retire the rows that are done."""
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            chosen = launch.read()
            if launch.report is not None:
                record(launch.report, chosen, [None if row.done else row.sample for row in launch.rows])
            if launch.held:
                live = zip(launch.held, launch.rows, strict=True)
                self._stats.count_launch([held for held, row in live if not row.done])
            for row, token in zip(launch.rows, chosen, strict=True):
                if token == AGAIN and not row.done:
                    row.sample.reaches = True
                    self._retire(row)
                    self._again.append(row.sample)
                elif not row.done and self._accept(row.sample, token):
                    if token == NONE:
                        self._forward.pages.clear(row.pages)
                    self._retire(row)

    def _retire(self, row: Row) -> None:
        """Give a row's slot and pages to others: what is launched for them comes after its last step."""
        row.done = True
        self._rows.remove(row)
        self._slots.append(row.slot)
        self._forward.pages.release(row.pages)


def _is_plain(sample: Sample) -> bool:
    """Say whether the next token is the most probable one."""
    params = sample.request.params
    chosen = sample.request.constraint is None and not sample.forced
    return params.greedy and params.repetition_penalty == 1 and chosen
