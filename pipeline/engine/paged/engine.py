"""Continuous batching with keys and values in pages: the device is always one launch ahead of the host.

What the host reads is a step old: while it looks at the tokens of one step, writes finished rows and admits
new ones, the device runs the next. A row that ends by itself has by then one more token under way, which is
dropped; one that ends at its length is known beforehand.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.engine import Engine, _completions, _has_stop
from pipeline.engine.forward import Forward
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.paged.pages import PAGE, pages_for
from pipeline.engine.paged.passes import Segment, upload
from pipeline.engine.sampling import Report, choose, penalises, record, report, seen_tokens
from pipeline.engine.scheduler import Scheduler, Sequence, shared_prefix
from pipeline.engine.stats import EngineStats
from pipeline.request import Completion, FinishReason, Request

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Row:
    """A sequence in the running batch."""

    sequence: Sequence
    slot: int
    pages: list[int]
    held: int  # columns written, those of launched work included
    made: int  # tokens of the completion, those under way included
    copies: list["Row"] = field(default_factory=list)  # of the same tokens so far: prefilled with this one
    done: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """Something that the device was told to do, and whose tokens the host has not read yet."""

    rows: list[Row]
    held: list[int]  # columns that each row of a decode step held before; none of a prefill
    tokens: Tensor  # [B] int64, on the host once `ready`
    ready: torch.cuda.Event | None
    report: Report | None


class PagedEngine:
    """Runs requests through a model whose keys and values lie in pages. Arguments as for `Engine`.

    Pages for a row's whole length are set aside when it is admitted, so that a row never has to leave.
    """

    def __init__(
        self,
        forward: PagedForward,
        eos_token_ids: frozenset[int],
        decode: Callable[[Ordered[int]], str] | None = None,
        *,
        max_rows: int = 128,
        max_tokens: int = 1 << 20,
        prefill_tokens: int = 2048,
        window: int = 4096,
        share_prefix: bool = True,
    ) -> None:
        self.stats = EngineStats()
        self._forward = forward
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._limits = (max_rows, max_tokens, window)
        self._prefill_tokens = prefill_tokens
        self._share_prefix = share_prefix
        self._rows: list[Row] = []  # in the running batch
        self._queue: deque[Row] = deque()  # admitted, not yet prefilled to their end
        self._launches: deque[Launch] = deque()
        self._slots: list[int] = []  # free
        self._prefix: tuple[tuple[int, ...], list[int]] = (), []  # what all begin with, and its pages
        self._seen: Tensor | None = None  # [slots + 1, V] bool, where a row has a repetition penalty
        self._open = False

    @property
    def live(self) -> list[Sequence]:
        """The rows of the running batch."""
        return [row.sequence for row in self._rows]

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order."""
        for finished in self.steps(requests):
            yield from finished

    @torch.inference_mode()
    def steps(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The same, step by step: yields after each launch, often an empty list."""
        scheduler = Scheduler(requests, *self._limits, tokens_of=reserved_tokens)
        scheduler.read_ahead()
        while self._rows or scheduler.waiting:
            finished: list[Completion] = []
            recover = False
            try:
                self._step(scheduler, finished)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                recover = is_out_of_memory(error)
                if not recover:
                    raise
            # Outside the handler, whose traceback would keep the failed step's tensors alive.
            if recover:
                self._recover(scheduler, finished)
            yield finished
            scheduler.read_ahead()
        self._forward.close()
        self._open = False

    def _step(self, scheduler: Scheduler, finished: list[Completion]) -> None:
        """Give the device its next work, then read what it had done before."""
        started = time.perf_counter()
        if not self._open:
            self._begin(scheduler)
        if not self._queue:
            self._admit(scheduler)
        prefills = bool(self._queue)
        launches = self._prefill() if prefills else self._decode_step()
        self._read(scheduler, finished, ahead=int(launches))
        seconds = time.perf_counter() - started
        if prefills:
            self.stats.prefill_sec += seconds
        else:
            self.stats.decode_sec += seconds

    def _begin(self, scheduler: Scheduler) -> None:
        """Make room for what waits, and compute once what all of it begins with."""
        slots = scheduler.max_rows
        reserved = sorted(map(reserved_tokens, scheduler.waiting), reverse=True)[:slots]
        ids = shared_prefix(scheduler.waiting) if self._share_prefix else ()
        ids = ids[: len(ids) // PAGE * PAGE]  # whole pages, which rows can share
        most = max(reserved[0], scheduler.max_tokens) // PAGE
        self._forward.open(min(most, sum(reserved) // PAGE) + len(ids) // PAGE, slots)
        self._slots = list(range(slots - 1, -1, -1))
        self._seen = None
        self._prefix = ids, self._forward.pages.take(len(ids) // PAGE)
        self._open = True
        for first in range(0, len(ids), self._prefill_tokens):
            last = min(first + self._prefill_tokens, len(ids))
            self._forward.prefill([Segment(ids, self._prefix[1], first, last)], [])
            self.stats.count_pass(last - first, last)

    def _admit(self, scheduler: Scheduler) -> None:
        """Give each admitted sequence a slot, and pages for its whole length."""
        reserved = sum(reserved_tokens(row.sequence) for row in self._rows)
        admitted = scheduler.admit(len(self._rows), reserved)
        pages = self._forward.pages
        if (missing := sum(map(reserved_tokens, admitted)) // PAGE - pages.free) > 0:
            self._forward.grow(
                max(missing, min(pages.count // 2, scheduler.max_tokens // PAGE - pages.count))
            )
        made: list[Row] = []
        leader: Row | None = None
        for sequence in admitted:
            same = leader is not None and leader.sequence.all_token_ids == sequence.all_token_ids
            row = self._row(sequence, leader if same else None)
            made.append(row)
            if same and leader is not None:
                leader.copies.append(row)
            else:
                leader = row
                self._queue.append(row)
        if made:
            self._forward.assign([row.slot for row in made], [row.pages for row in made])
            self._rows += made

    def _row(self, sequence: Sequence, leader: Row | None) -> Row:
        """A row of its own pages, but for those that it shares with a leader of the same tokens or the prefix."""
        pages, ids = self._forward.pages, sequence.all_token_ids
        prefix, shared = self._prefix
        if leader is not None:
            shared = leader.pages[: len(ids) // PAGE]
        elif len(ids) <= len(prefix) or ids[: len(prefix)] != prefix:
            shared = []
        own = pages.take(reserved_tokens(sequence) // PAGE - len(shared))
        slot, made = self._slots.pop(), len(sequence.token_ids)
        return Row(sequence, slot, pages.share(shared) + own, len(shared) * PAGE, made)

    def _prefill(self) -> bool:
        """Launch one pass over what is admitted; whether it made tokens."""
        segments: list[Segment] = []
        rows: list[Row] = []
        keep: list[int] = []  # the segment of each row
        left = self._prefill_tokens
        while self._queue and left:
            row = self._queue[0]
            ids = row.sequence.all_token_ids
            last = min(len(ids), row.held + left)
            segments.append(Segment(ids, row.pages, row.held, last))
            self.stats.count_pass(last - row.held, last)
            left -= last - row.held
            row.held = last
            if last == len(ids):
                rows += [row, *row.copies]
                keep += [len(segments) - 1] * (1 + len(row.copies))
                self._queue.popleft()
        logits = self._forward.prefill(segments, keep)
        self._copy_pages(rows)
        self.stats.count_pages(len(self._rows), self._forward.pages)
        if rows:
            self._sample(rows, logits)
        return bool(rows)

    def _copy_pages(self, rows: list[Row]) -> None:
        """Give copies the page that their leader has begun; the ones before are shared."""
        pairs: list[tuple[int, int]] = []
        for leader in rows:
            for row in leader.copies:
                row.held = leader.held
                if leader.held % PAGE:
                    pairs.append((leader.pages[leader.held // PAGE], row.pages[leader.held // PAGE]))
        self._forward.pages.copy(pairs)

    def _decode_step(self) -> bool:
        """Launch one token for every row that may have more; whether there is one."""
        rows = [row for row in self._rows if row.made < row.sequence.request.params.max_new_tokens]
        if rows:
            logits, tokens = self._forward.decode([(row.slot, row.held) for row in rows])
            self._sample(rows, logits, tokens)
            for row in rows:
                row.held += 1
        return bool(rows)

    def _sample(self, rows: list[Row], logits: Tensor, likeliest: Tensor | None = None) -> None:
        """Choose each row's next token, and start to bring the choice to the host.

        Args:
            logits: [B, V].
            likeliest: [B] int64, after a decode step: the most probable tokens, which the device has as its
                newest already.
        """
        sequences = [row.sequence for row in rows]
        tokens = likeliest
        if likeliest is None or not all(_is_plain(s) for s in sequences):
            seen = self._seen_by(rows, logits)
            slots = upload([row.slot for row in rows], self._forward.device)
            tokens = choose(logits, sequences, [row.made for row in rows], seen)
            self._forward.tokens[slots] = tokens
            if seen is not None and self._seen is not None:
                self._seen[slots, tokens] = True
        assert tokens is not None
        reported = report(logits, tokens, sequences)
        held = [] if likeliest is None else [row.held for row in rows]
        self._launches.append(Launch(rows, held, *_to_host(tokens), reported))
        for row in rows:
            row.made += 1

    def _seen_by(self, rows: list[Row], logits: Tensor) -> Tensor | None:
        """Which tokens each row has, where one has a repetition penalty. [B, V] bool."""
        sequences = [row.sequence for row in rows]
        if not penalises(sequences):
            return None
        if self._seen is None:
            self._seen = logits.new_zeros(len(self._forward.tokens), logits.shape[1], dtype=torch.bool)
        slots = upload([row.slot for row in rows], self._forward.device)
        if fresh := [i for i, row in enumerate(rows) if row.made == len(row.sequence.token_ids)]:
            self._seen[slots[fresh]] = seen_tokens([sequences[i] for i in fresh], logits[fresh])
        return self._seen[slots]

    def _read(self, scheduler: Scheduler, finished: list[Completion], ahead: int) -> None:
        """Read launched tokens, all but those of the newest `ahead` launches; retire the rows that are done."""
        while len(self._launches) > ahead:
            launch = self._launches.popleft()
            if launch.ready is not None:
                launch.ready.synchronize()
            chosen: list[int] = launch.tokens.tolist()
            if launch.report is not None:
                record(launch.report, chosen, [row.sequence for row in launch.rows])
            if launch.held:
                live = zip(launch.held, launch.rows, strict=True)
                self.stats.count_launch([held for held, row in live if not row.done])
            for row, token in zip(launch.rows, chosen, strict=True):
                reason = None if row.done else self._append(row.sequence, token)
                if reason:
                    self._retire(row)
                    scheduler.retire(row.sequence)
                    made = _completions(row.sequence, reason)
                    self.stats.completion_tokens += sum(len(c.token_ids) for c in made)
                    finished += made

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        sequence.token_ids.append(token)
        if params.stop and self._decode and _has_stop(sequence, self._decode):
            return "stop"
        return None if sequence.remaining_tokens > 0 else "length"

    def _retire(self, row: Row) -> None:
        """Give a row's slot and pages to others: what is launched for them comes after its last step."""
        row.done = True
        self._rows.remove(row)
        self._slots.append(row.slot)
        self._forward.pages.release(row.pages)

    def _recover(self, scheduler: Scheduler, finished: list[Completion]) -> None:
        """After running out of memory: put every row back with its tokens, and go on with half as many."""
        self._read(scheduler, finished, ahead=0)
        rows = [row.sequence for row in self._rows]
        count = self._forward.pages.count
        self._rows, self._open = [], False
        self._queue.clear()
        self._forward.close()
        self._seen = None
        gc.collect()
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        scheduler.put_back(rows)
        alone = len(rows) == 1 or not rows and count * PAGE <= reserved_tokens(scheduler.waiting[-1])
        scheduler.shrink(max(1, len(rows)), count * PAGE)
        if alone:
            sequence = scheduler.admit(0, 0)[0]
            scheduler.retire(sequence)
            why = "out of memory even alone; use a smaller model or quantization"
            finished += _completions(sequence, None, why)
            return
        log.warning("Out of memory with %d rows; going on with at most %d.", len(rows), scheduler.max_rows)


def new_engine(forward: Forward | PagedForward, *arguments: Any, **settings: Any) -> Engine | PagedEngine:
    """The engine for a way through the model. Arguments as for `Engine`."""
    if isinstance(forward, PagedForward):
        return PagedEngine(forward, *arguments, **settings)
    return Engine(forward, *arguments, **settings)


def reserved_tokens(sequence: Sequence) -> int:
    """Columns of the pages that a sequence takes at its longest; its last token is never fed."""
    return pages_for(sequence.length + sequence.remaining_tokens - 1) * PAGE


def _is_plain(sequence: Sequence) -> bool:
    """Whether the next token is the most probable one."""
    params = sequence.request.params
    return params.greedy and params.repetition_penalty == 1


def _to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, there once the event has come."""
    if tokens.device.type != "cuda":
        return tokens.clone(), None
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copy, ready
