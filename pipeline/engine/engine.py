"""Run requests through a model in one ever-changing batch: admit, prefill, decode, retire."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from pipeline.common.errors import JobError
from pipeline.common.request import Completion, FinishReason, Request
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.batch import PagedBatch
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.batch import RectangleBatch
from pipeline.engine.rectangles.forward import Forward
from pipeline.engine.scheduler import Sample, Scheduler
from pipeline.engine.stats import EngineStats

log = logging.getLogger(__name__)


class Batch(Protocol):
    """Hold the rows in flight, and their keys and values in a way of its own."""

    @property
    def live(self) -> list[Sample]:
        """List the rows, those included that are admitted and not yet prefilled."""
        ...

    def tokens_of(self, sample: Sample) -> int:
        """Count how many of the tokens in flight a sample takes."""
        ...

    def begin(self, scheduler: Scheduler) -> None:
        """Prepare for what waits: at the start, and after running out of memory."""
        ...

    def step(self, scheduler: Scheduler) -> None:
        """Admit what there is room for, and run a prefill or a decode step."""
        ...

    def drop(self) -> list[Sample]:
        """Give all memory back; return what was in flight, with the tokens that it has."""
        ...


class Engine:
    """Run requests through a model.

    Args:
        forward: the model, behind the way its attention is computed.
        eos_token_ids: tokens that end a completion.
        decode: token ids to text; needed only for requests with stop strings.
        max_rows: rows in flight.
        max_tokens: tokens in flight, prompt and completion.
        prefill_tokens: prompt tokens in one forward pass.
        window: samples read ahead.
        share_prefix: compute once what all prompts of the first window share.
    """

    def __init__(
        self,
        forward: Forward | PagedForward,
        eos_token_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        max_rows: int = 128,
        max_tokens: int = 1 << 20,
        prefill_tokens: int = 2048,
        window: int = 4096,
        share_prefix: bool = True,
    ) -> None:
        self.stats = EngineStats()
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._limits = (max_rows, max_tokens, window)
        self._finished: list[Completion] = []  # since the last step
        self._scheduler = Scheduler([], *self._limits)
        settings = (prefill_tokens, share_prefix, self.stats, self._accept)
        self._batch: Batch = (
            PagedBatch(forward, max_rows, *settings)
            if isinstance(forward, PagedForward)
            else RectangleBatch(forward, *settings)
        )

    @property
    def live(self) -> list[Sample]:
        """List the rows of the running batch."""
        return self._batch.live

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order."""
        for finished in self.steps(requests):
            yield from finished

    @torch.inference_mode()
    def steps(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """Yield what has finished after each prefill and each decode step, often an empty list.

        Raises:
            JobError: there is no memory even for one row to begin.
        """
        scheduler = self._scheduler = Scheduler(requests, *self._limits, tokens_of=self._batch.tokens_of)
        scheduler.read_ahead()
        begun = False
        while self._batch.live or scheduler.waiting:
            try:
                if not begun:
                    self._batch.begin(scheduler)
                    begun = True
                self._batch.step(scheduler)
                scheduler.grow()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                begun = False
            if not begun:  # outside the handler, whose traceback would keep the failed step's tensors alive
                self._recover(scheduler)
            finished, self._finished = self._finished, []
            yield finished
            scheduler.read_ahead()
        self._batch.drop()

    def _accept(self, sample: Sample, token: int) -> bool:
        """Give a row its next token; say whether it is done, and then its completions are, too."""
        reason = self._append(sample, token)
        if reason is None:
            return False
        self._scheduler.retire(sample)
        made = _completions(sample, reason)
        self.stats.completion_tokens += sum(len(c.token_ids) for c in made)
        self._finished += made
        return True

    def _append(self, sample: Sample, token: int) -> FinishReason | None:
        """Append a token that does not end the row by itself; say why the row ends, if it does."""
        params = sample.request.params
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        if token in sample.request.stop_token_ids:
            return "stop"
        sample.token_ids.append(token)
        if params.stop and self._decode and _has_stop(sample, self._decode):
            return "stop"
        return None if sample.remaining_tokens > 0 else "length"

    def _recover(self, scheduler: Scheduler) -> None:
        """Put every row back with its tokens, after running out of memory, and go on with half as many."""
        rows = self._batch.drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        if len(rows) == 1:
            scheduler.retire(rows[0])
            why = "out of memory even alone; use a smaller model or quantization"
            self._finished += _completions(rows[0], None, why)
            return
        if not rows and scheduler.max_rows == scheduler.max_tokens == 1:
            raise JobError(
                found="there is not enough memory beside the model for a single row",
                fix="Use a smaller model or quantization, or end what else uses this memory",
            )
        tokens = sum(map(self._batch.tokens_of, rows))
        scheduler.shrink(len(rows) or scheduler.max_rows, tokens or scheduler.max_tokens)
        log.warning("Out of memory with %d rows; going on with at most %d.", len(rows), scheduler.max_rows)
        scheduler.put_back(rows)


def _completions(sample: Sample, reason: FinishReason | None, error: str | None = None) -> list[Completion]:
    """Complete a finished sample, and the requests that share its tokens."""
    tokens, logprobs = tuple(sample.token_ids), tuple(sample.logprobs) or None
    numbers: dict[str, int] = {sample.request.id: sample.index}
    done = [Completion(sample.request.id, sample.index, tokens, reason, logprobs, error)]
    for request in sample.duplicates:
        index = numbers[request.id] = numbers.get(request.id, -1) + 1
        done.append(Completion(request.id, index, tokens, reason, logprobs, error))
    return done


def _has_stop(sample: Sample, decode: Callable[[Sequence[int]], str]) -> bool:
    """Say whether a stop string has just appeared."""
    # A token is at least a byte, a character at most four: this tail holds all of the longest stop string.
    longest = max(len(text) for text in sample.request.params.stop)
    text = decode(sample.token_ids[-4 * longest - 4 :])
    return any(stop in text for stop in sample.request.params.stop)
