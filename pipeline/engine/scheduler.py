"""Decide who runs next: pure bookkeeping on plain numbers, no tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.common.request import CONSTRAINTS, Request, TokenLogprob
from pipeline.engine.constraint import Constraint

CALM_STEPS = 64  # without running out of memory, before the first try to hold more again


@dataclass(slots=True, eq=False)
class Prefix:
    """Hold what prompts of several waiting samples begin with."""

    token_ids: tuple[int, ...]
    waiting: int = 0  # samples
    stored: Any = None  # its keys and values, once they are computed


@dataclass(slots=True, eq=False)
class Sample:
    """Follow one completion in the making: a request has `n` of them."""

    request: Request
    index: int  # among the samples of its request
    token_ids: list[int] = field(default_factory=list)  # generated so far
    logprobs: list[TokenLogprob] = field(default_factory=list)
    duplicates: list[Request] = field(default_factory=list)  # identical greedy requests that get its tokens
    reaches: bool = False  # its filters have reached beyond sampling's HEAD
    constraint: Constraint | None = None  # where its tokens are in the request's grammar, once that has begun
    prefix: Prefix | None = None  # while it waits

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.token_ids)

    @property
    def length(self) -> int:
        """Count the tokens so far, prompt and completion."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    @property
    def forced(self) -> tuple[int, ...]:
        """Give the tokens that it gets in the place of chosen ones; none for most."""
        return self.request.forced[self.index] if self.request.forced else ()

    @property
    def remaining_tokens(self) -> int:
        return self.request.params.max_new_tokens - len(self.token_ids)


class Scheduler:
    """Hold the requests that wait, and say which samples to admit.

    It reads ahead `window` requests or samples at most, so that a prompt file of any size takes bounded memory,
    and admits the longest expected work first, so that no long row is left alone at the end.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        max_rows: int,
        max_tokens: int,
        window: int,
        tokens_of: Callable[[Sample], int] = lambda sample: sample.length,
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self._most = max_rows, max_tokens  # what may be in flight while memory never ran out
        self._calm = 0  # steps since memory ran out, or since the last growth
        self._wait = CALM_STEPS // 2  # steps before the next growth: twice as many after each failure
        self._window = window
        self._tokens_of = tokens_of  # what an admitted sample counts for
        self._requests: Iterator[Request] = iter(requests)
        self._waiting: list[Sample] = []  # least work first: the next to admit is at the end
        self._leaders: dict[tuple[object, ...], Sample] = {}
        self._duplicates = 0  # requests that wait for another one's tokens
        self._exhausted = False

    @property
    def waiting(self) -> Sequence[Sample]:
        return self._waiting

    def read_ahead(self) -> bool:
        """Fill the window once it is half empty; say whether anything came in."""
        if self._exhausted or (len(self._waiting) + self._duplicates) * 2 > self._window:
            return False
        new: list[Sample] = []
        while len(self._waiting) + self._duplicates + len(new) < self._window:
            request = next(self._requests, None)
            if request is None:
                self._exhausted = True
                break
            new.extend(self._samples(request))
        self.put_back(new)
        return bool(new)

    def put_back(self, samples: Iterable[Sample]) -> None:
        """Let samples wait, with the tokens that they have."""
        self._waiting.extend(samples)
        self.sort()

    def sort(self) -> None:
        """Put the longest expected work first; of equal work, what begins alike together."""
        self._waiting.sort(key=lambda s: (s.remaining_tokens, _beginning(s), s.length, s.request.id))

    def take_waiting(self) -> list[Sample]:
        """Take all that waits."""
        taken, self._waiting = self._waiting, []
        return taken

    def admit(self, live_rows: int, live_tokens: int) -> list[Sample]:
        """Take the samples that join the batch now, longest prompt first.

        A small place is left empty until enough rows are free for a prefill that is worth a pass of its
        own, an eighth of the batch. A batch that is empty admits one sample however long it is.
        """
        free = self.max_rows - live_rows
        if live_rows and free < min(len(self._waiting), max(1, self.max_rows // 8)):
            return []
        admitted: list[Sample] = []
        while self._waiting and len(admitted) < free:
            live_tokens += self._tokens_of(self._waiting[-1])
            if live_tokens > self.max_tokens and (live_rows or admitted):
                break
            admitted.append(self._waiting.pop())
        admitted.sort(key=lambda s: (s.length, s.all_token_ids), reverse=True)
        return admitted

    def retire(self, sample: Sample) -> None:
        """Forget a finished sample."""
        if _can_lead(sample.request):
            self._leaders.pop(_text_key(sample.request), None)
            self._duplicates -= len(sample.duplicates)

    def shrink(self, live_rows: int, live_tokens: int) -> None:
        """Halve what may be in flight, after this much ran out of memory."""
        self.max_rows = max(1, min(self.max_rows, live_rows) // 2)
        self.max_tokens = max(1, min(self.max_tokens, live_tokens) // 2)
        self._calm, self._wait = 0, self._wait * 2

    def grow(self) -> None:
        """Allow a quarter more every now and then, up to the first limits, after a step that found its memory.

        What took the memory may have gone. If it has not, each failure makes the next try later.
        """
        self._calm += 1
        if self._calm >= self._wait and (self.max_rows, self.max_tokens) != self._most:
            self._calm = 0
            self.max_rows = min(self._most[0], self.max_rows + max(1, self.max_rows // 4))
            self.max_tokens = min(self._most[1], self.max_tokens + max(1, self.max_tokens // 4))

    def _samples(self, request: Request) -> list[Sample]:
        """Make a request's samples; none where another request is already making the same text."""
        if not _can_lead(request):
            return [Sample(request, index) for index in range(request.samples)]
        leader = self._leaders.setdefault(_text_key(request), Sample(request, 0))
        is_leader = leader.request is request
        copies = request.params.n - is_leader
        leader.duplicates.extend([request] * copies)
        self._duplicates += copies
        return [leader] if is_leader else []


def prefill_groups(
    samples: Sequence[Sample],
    prefix_tokens: int,
    max_tokens: int,
    equal_lengths: bool = False,
    row_columns: int = 1,
) -> list[list[Sample]]:
    """Cut samples, sorted by length, into groups for one prefill each.

    A group's rectangle holds at most `max_tokens` columns beyond the shared prefix, and less than a
    tenth of it is padding. Rows with the same tokens take the place of one.

    Args:
        row_columns: the model pads each row to a multiple of it.
    """
    groups: list[list[Sample]] = []
    width = rows = tokens = 0
    previous: tuple[int, ...] = ()
    for sample in samples:
        own = sample.length - prefix_tokens
        ids = sample.all_token_ids
        if groups and ids == previous:
            groups[-1].append(sample)
            continue
        previous = ids
        least = 1.0 if equal_lengths else 0.92
        fits = (rows + 1) * padded(width, row_columns) <= max_tokens
        if groups and fits and tokens + own >= least * (rows + 1) * width:
            groups[-1].append(sample)
            rows, tokens = rows + 1, tokens + own
        else:
            groups.append([sample])
            width, rows, tokens = own, 1, own
    return groups


def padded(columns: int, row_columns: int) -> int:
    """Round a row's columns up to what a model pads it to."""
    return -(-columns // row_columns) * row_columns


def partition(lengths: Sequence[int], overhead: int) -> list[slice]:
    """Cut rows, sorted by falling length, into rectangles of the least total cost.

    A rectangle costs its rows × its longest row, in columns attended at each step, and `overhead` columns
    for its kernel launches. Exact, by dynamic programming over the places where the length changes by
    16 columns or more.
    """
    if not lengths:
        return []
    cuts = [i for i in range(len(lengths)) if i == 0 or lengths[i - 1] // 16 != lengths[i] // 16]
    cuts.append(len(lengths))
    best: list[tuple[int, int]] = [(0, 0)]  # least cost of the rows before cuts[j], and the cut before it
    for j in range(1, len(cuts)):
        best.append(
            min((best[i][0] + overhead + (cuts[j] - cuts[i]) * lengths[cuts[i]], i) for i in range(j))
        )
    slices: list[slice] = []
    j = len(cuts) - 1
    while j:
        i = best[j][1]
        slices.append(slice(cuts[i], cuts[j]))
        j = i
    return slices[::-1]


def _can_lead(request: Request) -> bool:
    """Say whether all its samples are one text, which others may share."""
    return request.params.greedy and not request.forced


def _beginning(sample: Sample) -> tuple[int, tuple[int, ...]]:
    """Return what sorts samples by their prefix, the longest last."""
    prefix = sample.prefix.token_ids if sample.prefix else ()
    return len(prefix), prefix


def _text_key(request: Request) -> tuple[object, ...]:
    """Return what decides a greedy request's text."""
    asked = tuple(
        tuple(value) if isinstance(value, list) else value
        for name, value in vars(request.params).items()
        if name not in CONSTRAINTS
    )
    return request.prompt_token_ids, request.constraint, *asked
