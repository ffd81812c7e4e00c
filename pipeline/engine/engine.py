"""Continuous batching over any causal language model: admit, prefill, decode, retire."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered

import torch

from pipeline.engine.forward import Forward, rope_switch
from pipeline.engine.kv_cache import Rectangle, regroup
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.sampling import next_tokens
from pipeline.engine.scheduler import Scheduler, Sequence, partition, prefill_groups, shared_prefix
from pipeline.engine.stats import EngineStats
from pipeline.request import Completion, FinishReason, GenerationParams, Request

log = logging.getLogger(__name__)

SPARE_RECTANGLES = 3  # more than the best partition has: time to regroup them all


class Engine:
    """Runs requests through a model.

    Args:
        forward: the model, behind the way its attention is computed.
        eos_token_ids: tokens that end a completion.
        decode: token ids to text; needed only for requests with stop strings.
        max_rows: rows in flight.
        max_tokens: tokens in flight, prompt and completion.
        prefill_tokens: prompt tokens in one forward pass.
        window: sequences read ahead.
        share_prefix: compute once what all prompts of the first window share.
    """

    def __init__(
        self,
        forward: Forward,
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
        self._overhead = forward.limits.rectangle_overhead
        self._share_prefix = share_prefix and forward.can_share_prefix
        self._rope_switch = rope_switch(forward.config)
        self._rectangles: list[Rectangle] = []
        self._groups: list[list[Sequence]] = []  # admitted, not yet prefilled
        self._prefix: tuple[tuple[int, ...], Rectangle] | None = None

    @property
    def live(self) -> list[Sequence]:
        """The rows of the running batch."""
        return [s for rectangle in self._rectangles for s in rectangle.rows]

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order."""
        for finished in self.steps(requests):
            yield from finished

    @torch.inference_mode()
    def steps(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The same, step by step: yields after each prefill and each decode step, often an empty list."""
        scheduler = Scheduler(requests, *self._limits)
        scheduler.read_ahead()
        if self._share_prefix:
            self._compute_prefix(shared_prefix(scheduler.waiting))
        while self._groups or self._rectangles or scheduler.waiting:
            if not self._groups:
                self._admit(scheduler)
            finished: list[Completion] = []
            recover = False
            try:
                if self._groups:
                    self._prefill(scheduler, finished)
                else:
                    self._decode_step(scheduler, finished)
                scheduler.grow()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                recover = is_out_of_memory(error)
                if not recover:
                    raise
            # Outside the handler, whose traceback would keep the failed step's tensors alive.
            yield finished + self._recover(scheduler) if recover else finished
            scheduler.read_ahead()
        self._prefix = None

    def _admit(self, scheduler: Scheduler) -> None:
        live = self.live
        admitted = scheduler.admit(len(live), sum(s.length for s in live))
        prefixed = [s for s in admitted if self._has_prefix(s)]
        rest = [s for s in admitted if not self._has_prefix(s)]
        shared = len(self._prefix[0]) if self._prefix else 0
        equal = self._forward.equal_lengths
        self._groups = prefill_groups(prefixed, shared, self._prefill_tokens, equal)
        for long in (True, False):
            same = [s for s in rest if self._is_long(s) == long]
            self._groups += prefill_groups(same, 0, self._prefill_tokens, equal)

    def _prefill(self, scheduler: Scheduler, finished: list[Completion]) -> None:
        """Run one admitted group; it joins the batch as a rectangle of its own."""
        started = time.perf_counter()
        group = self._groups[0]
        copies: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in group:
            copies.setdefault(sequence.all_token_ids, []).append(sequence)
        prefix = self._prefix[1] if self._prefix and self._has_prefix(group[0]) else None
        # Under longrope a pass's largest position decides for all of it: long rows are never cut.
        budget = self._prefill_tokens if not self._is_long(group[0]) else 1 << 62
        rectangle, logits = self._forward.prefill([c[0] for c in copies.values()], prefix, budget)
        self.stats.count_prefill(rectangle, prefix)
        if len(group) > len(copies):
            rectangle.repeat(list(copies.values()))
            logits = logits[[i for i, c in enumerate(copies.values()) for _ in c]]
        tokens = next_tokens(logits, rectangle.rows)
        del self._groups[0]
        self._rectangles.append(rectangle)
        self.stats.count_rectangles(self._rectangles)
        finished += self._extend([rectangle], tokens, scheduler)
        self.stats.prefill_sec += time.perf_counter() - started

    def _decode_step(self, scheduler: Scheduler, finished: list[Completion]) -> None:
        """One token for every row. Its second pass can fail when rows of the first have finished."""
        started = time.perf_counter()
        self._put_back_crossing(scheduler)
        self._regroup()
        for long in (True, False):
            rectangles = [r for r in self._rectangles if self._is_long(r.rows[0]) == long]
            if rectangles:
                logits = self._forward.decode(rectangles)
                tokens = next_tokens(logits, [s for r in rectangles for s in r.rows])
                self.stats.count_step(rectangles)
                for rectangle in rectangles:
                    rectangle.head += 1
                finished += self._extend(rectangles, tokens, scheduler)
        self.stats.decode_sec += time.perf_counter() - started

    def _extend(
        self, rectangles: list[Rectangle], tokens: list[int], scheduler: Scheduler
    ) -> list[Completion]:
        """Give every row its token; retire the rows that are done."""
        finished: list[Completion] = []
        end = len(tokens)
        for rectangle in reversed(rectangles):
            end -= len(rectangle.rows)
            for row in reversed(range(len(rectangle.rows))):  # a retired row is replaced by one seen before
                sequence = rectangle.rows[row]
                reason = self._append(sequence, tokens[end + row])
                if reason:
                    rectangle.retire(row)
                    scheduler.retire(sequence)
                    finished += _completions(sequence, reason)
        self._rectangles = [r for r in self._rectangles if r.rows]
        self.stats.completion_tokens += sum(len(c.token_ids) for c in finished)
        return finished

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        sequence.token_ids.append(token)
        if params.stop and self._decode and _has_stop(sequence, self._decode):
            return "stop"
        return None if sequence.remaining_tokens > 0 else "length"

    def _regroup(self) -> None:
        """Copy rectangles that are full, and thin ones beside them, into the best partition of their rows."""
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
        self.stats.count_rectangles(kept)

    def _by_regime(self, rectangles: list[Rectangle]) -> list[list[Rectangle]]:
        """Rows under long and short rotary factors never share a pass."""
        parts = ([r for r in rectangles if self._is_long(r.rows[0]) == long] for long in (True, False))
        return [part for part in parts if part]

    def _partition(self, rectangles: list[Rectangle]) -> list[list[Sequence]]:
        rows = sorted((s for r in rectangles for s in r.rows), key=lambda s: s.length, reverse=True)
        if self._forward.equal_lengths:
            lengths = sorted({s.length for s in rows})
            return [[s for s in rows if s.length == length] for length in lengths]
        return [rows[part] for part in partition([s.length for s in rows], self._overhead)]

    def _put_back_crossing(self, scheduler: Scheduler) -> None:
        """Rows that grow past longrope's switch are prefilled again, as `generate` does."""
        if self._rope_switch is None:
            return
        for rectangle in self._rectangles:
            for row in reversed(range(len(rectangle.rows))):
                held = rectangle.head - rectangle.starts[row]
                if held <= self._rope_switch < rectangle.rows[row].length:
                    scheduler.put_back([rectangle.rows[row]])
                    rectangle.retire(row)
        self._rectangles = [r for r in self._rectangles if r.rows]

    def _recover(self, scheduler: Scheduler) -> list[Completion]:
        """After running out of memory: put every row back with its tokens, and go on with half as many."""
        rows = [*self.live, *(s for group in self._groups for s in group)]
        self._rectangles, self._groups = [], []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        if len(rows) == 1:
            scheduler.retire(rows[0])
            return _completions(
                rows[0], None, "out of memory even alone; use a smaller model or quantization"
            )
        scheduler.shrink(len(rows), sum(s.length for s in rows))
        log.warning("Out of memory with %d rows; going on with at most %d.", len(rows), scheduler.max_rows)
        scheduler.put_back(rows)
        return []

    def _compute_prefix(self, ids: tuple[int, ...]) -> None:
        self._prefix = None
        if ids and not (self._rope_switch and len(ids) > self._rope_switch):
            row = Sequence(Request("", ids, GenerationParams()), 0)
            try:
                rectangle, _ = self._forward.prefill([row], None, self._prefill_tokens)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return
            self.stats.count_prefill(rectangle, None)
            self._prefix = ids, rectangle

    def _has_prefix(self, sequence: Sequence) -> bool:
        if self._prefix is None or self._is_long(sequence):
            return False
        ids = self._prefix[0]
        return sequence.length > len(ids) and sequence.request.prompt_token_ids[: len(ids)] == ids

    def _is_long(self, sequence: Sequence) -> bool:
        return self._rope_switch is not None and sequence.length > self._rope_switch


def _completions(
    sequence: Sequence, reason: FinishReason | None, error: str | None = None
) -> list[Completion]:
    """A finished sequence's completion, and those of the requests that share its tokens."""
    tokens, logprobs = tuple(sequence.token_ids), tuple(sequence.logprobs) or None
    samples: dict[str, int] = {sequence.request.id: sequence.sample}
    done = [Completion(sequence.request.id, sequence.sample, tokens, reason, logprobs, error)]
    for request in sequence.duplicates:
        sample = samples[request.id] = samples.get(request.id, -1) + 1
        done.append(Completion(request.id, sample, tokens, reason, logprobs, error))
    return done


def _has_stop(sequence: Sequence, decode: Callable[[Ordered[int]], str]) -> bool:
    """Whether a stop string has just appeared: a token is at least a byte, a character at most four."""
    longest = max(len(text) for text in sequence.request.params.stop)
    text = decode(sequence.token_ids[-4 * longest - 4 :])
    return any(stop in text for stop in sequence.request.params.stop)
