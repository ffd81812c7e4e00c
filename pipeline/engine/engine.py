"""Run requests through a model in one ever-changing batch: admit, prefill, decode, retire."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from pipeline.common.errors import JobError, PipelineError
from pipeline.common.request import Completion, FinishReason, Request
from pipeline.engine.constraint import Constraints
from pipeline.engine.masks import Masks
from pipeline.engine.out_of_memory import is_out_of_memory
from pipeline.engine.paged.batch import PagedBatch
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.batch import RectangleBatch
from pipeline.engine.rectangles.forward import Forward
from pipeline.engine.sampling import NONE
from pipeline.engine.scheduler import Sample, Scheduler
from pipeline.engine.stats import EngineStats

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite numbers (NaN or infinite), so that no token can be chosen"


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

    def look_ahead(self, scheduler: Scheduler) -> None:
        """Find what waiting prompts begin with alike: more of them have come."""
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
        tokenizer: a fast one of transformers; needed only for requests with a constraint.
        max_rows: rows in flight.
        max_tokens: tokens in flight, prompt and completion.
        prefill_tokens: prompt tokens in one forward pass.
        window: samples read ahead.
        share_prefix: compute once what prompts of a window begin with alike, group by group.
        row_columns: the model pads each row of a prefill to a multiple of it.
    """

    def __init__(
        self,
        forward: Forward | PagedForward,
        eos_token_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        tokenizer: Any = None,
        *,
        max_rows: int = 128,
        max_tokens: int = 1 << 20,
        prefill_tokens: int = 2048,
        window: int = 4096,
        share_prefix: bool = True,
        row_columns: int = 1,
    ) -> None:
        self.stats = EngineStats()
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._limits = (max_rows, max_tokens, window)
        self._finished: list[Completion] = []  # since the last step
        self._scheduler = Scheduler([], *self._limits)
        settings = (
            prefill_tokens,
            share_prefix,
            self.stats,
            self._accept,
            Masks(Constraints(tokenizer, eos_token_ids)),
        )
        self._batch: Batch = (
            PagedBatch(forward, max_rows, *settings)
            if isinstance(forward, PagedForward)
            else RectangleBatch(forward, *settings, row_columns)
        )

    @property
    def live(self) -> list[Sample]:
        """List the rows of the running batch."""
        return self._batch.live

    @property
    def tokens(self) -> int:
        """Count the tokens made so far, those of rows in flight too."""
        return sum(len(sample.token_ids) for sample in self.live) + self.stats.completion_tokens

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
        failure: Exception | None = None
        while self._batch.live or scheduler.waiting:
            try:
                if not begun:
                    self._batch.begin(scheduler)
                    begun = True
                self._batch.step(scheduler)
                scheduler.grow()
            except Exception as error:
                if not is_out_of_memory(error):
                    if not _may_be_of_one_row(error):
                        raise
                    log.info("A pass failed; its rows are tried alone", exc_info=True)
                    failure = error.with_traceback(None)
                begun = False
            if failure is not None:
                self._isolate(scheduler, failure)
                failure = None
            elif not begun:  # outside the handler, whose traceback would keep the failed step's tensors alive
                self._recover(scheduler)
            finished, self._finished = self._finished, []
            yield finished
            if scheduler.read_ahead():
                self._batch.look_ahead(scheduler)
        self._batch.drop()

    def _accept(self, sample: Sample, token: int) -> bool:
        """Give a row its next token; say whether it is done, and then its completions are, too."""
        failed = sample.constraint and sample.constraint.error
        if failed or token == NONE:
            self._give_up(sample, f"its grammar cannot go on: {failed}" if failed else NOT_FINITE)
            return True
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
        if sample.forced:
            sample.token_ids.append(token)
            return "stop" if len(sample.token_ids) == len(sample.forced) else None
        params = sample.request.params
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop"
        if token in sample.request.stop_token_ids:
            return "stop"
        sample.token_ids.append(token)
        if sample.constraint is not None:
            sample.constraint.advance(token)
            if sample.constraint.finished:
                return "stop"
        if params.stop and self._decode and _has_stop(sample, self._decode):
            return "stop"
        return None if sample.remaining_tokens > 0 else "length"

    def _give_up(self, sample: Sample, why: str) -> None:
        """End a row, and those that share its tokens, with an error."""
        self._scheduler.retire(sample)
        self._finished += _completions(sample, None, why)

    def _isolate(self, scheduler: Scheduler, failure: Exception) -> None:
        """Run the rows in flight alone, once, after a pass of theirs has failed; give up those that fail again.

        Raises:
            JobError: all of them fail.
            Exception: the failure, if none does.
        """
        rows = self._batch.drop() or scheduler.take_waiting()  # these, where nothing could begin
        failed: list[tuple[Sample, str]] = []
        for row in rows:
            try:
                scheduler.put_back(self._run_alone(row))
            except Exception as error:
                if not _may_be_of_one_row(error):
                    raise
                failed.append((row, (str(error).strip() or type(error).__name__).splitlines()[0]))
                self._batch.drop()
        if not failed:
            raise failure
        if len(failed) == len(rows) > 1:
            raise JobError(
                found=f"the model cannot compute any of the {len(rows)} rows in flight: {failed[0][1]}",
                fix="Try another model, quantization or version of transformers. The log has the traceback",
            ) from failure
        for row, said in failed:
            self._give_up(row, f"the model cannot compute this row: {said}")

    def _run_alone(self, row: Sample) -> list[Sample]:
        """Give a row its next token in a batch of its own; return it, unless it is done."""
        held = row.length
        alone = Scheduler([], 1, self._limits[1], 1, tokens_of=self._batch.tokens_of)
        alone.put_back([row])
        self._batch.begin(alone)
        while alone.waiting or (self._batch.live and row.length == held):
            self._batch.step(alone)
        return self._batch.drop()

    def _recover(self, scheduler: Scheduler) -> None:
        """Put every row back with its tokens, after running out of memory, and go on with half as many."""
        rows = self._batch.drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.stats.out_of_memory += 1
        if len(rows) == 1:
            self._give_up(rows[0], "out of memory even alone; use a smaller model or quantization")
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


def _may_be_of_one_row(error: Exception) -> bool:
    """Say whether the same model can go on after it: not where a GPU has given up, nor from an error of our own."""
    dead = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return not dead and not isinstance(error, PipelineError)


def _completions(sample: Sample, reason: FinishReason | None, error: str | None = None) -> list[Completion]:
    """Complete a finished sample, and the requests that share its tokens."""
    tokens, logprobs = tuple(sample.token_ids), tuple(sample.logprobs) or None
    complete = None if sample.constraint is None or error else sample.constraint.complete
    numbers: dict[str, int] = {sample.request.id: sample.index}
    done = [Completion(sample.request.id, sample.index, tokens, reason, logprobs, error, complete)]
    for request in sample.duplicates:
        index = numbers[request.id] = numbers.get(request.id, -1) + 1
        done.append(Completion(request.id, index, tokens, reason, logprobs, error, complete))
    return done


def _has_stop(sample: Sample, decode: Callable[[Sequence[int]], str]) -> bool:
    """Say whether a stop string has just appeared."""
    # A token is at least a byte, a character at most four: this tail holds all of the longest stop string.
    longest = max(len(text) for text in sample.request.params.stop)
    text = decode(sample.token_ids[-4 * longest - 4 :])
    return any(stop in text for stop in sample.request.params.stop)
