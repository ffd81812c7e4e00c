"""Running out of memory loses no token: everything goes on in a smaller batch, with the same text."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from engine_runs import EOS, alone, mixed_requests, run, run_engine, tokens
from torch import Tensor

from pipeline.common.errors import JobError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine import scheduler
from pipeline.engine.engine import Engine
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.batch import RectangleBatch
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.rectangles.rectangle import Rectangle
from pipeline.engine.scheduler import Sample, Scheduler
from pipeline.prompts.constraint import grammar_of

Full = Callable[[str, list[Sample]], bool]  # ("prefill" or "decode", rows): whether memory runs out


class Scarce(FlatForward):
    """The real forward pass; memory runs out where `full` says so, before or after the work is done."""

    def __init__(self, model: Any, full: Full, error: BaseException, late: bool = False) -> None:
        super().__init__(copy.deepcopy(model))
        self._full, self._error, self._late = full, error, late
        self.failures = 0

    def prefill(
        self, rows: list[Sample], prefix: Rectangle | None, max_tokens: int
    ) -> tuple[Rectangle, Tensor]:
        return self._guarded("prefill", rows, lambda: super(Scarce, self).prefill(rows, prefix, max_tokens))

    def decode(self, rectangles: Any) -> Tensor:
        rows = [s for r in rectangles for s in r.rows]
        return self._guarded("decode", rows, lambda: super(Scarce, self).decode(rectangles))

    def _guarded(self, kind: str, rows: list[Sample], work: Callable[[], Any]) -> Any:
        full = self._full(kind, rows)
        result = work() if self._late or not full else None
        if full:
            self.failures += 1
            raise self._error
        return result


def on_calls(*numbers: int) -> Full:
    """Memory runs out at these calls, counted from 1; calls with one row alone do not count."""
    calls = 0

    def full(kind: str, rows: list[Sample]) -> bool:
        nonlocal calls
        calls += len(rows) > 1
        return len(rows) > 1 and calls in numbers

    return full


OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory")
ERRORS = [
    OUT_OF_MEMORY,
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("late", [False, True], ids=["before the work", "after it"])
def test_no_token_is_lost(each_tiny_model, late):
    scarce = Scarce(each_tiny_model, on_calls(2, 8, 20), OUT_OF_MEMORY, late)
    requests = mixed_requests()
    done = tokens(run(scarce, requests))
    assert scarce.failures == 3
    assert done == {(r.id, 0): alone(each_tiny_model, r) for r in requests}


@pytest.mark.parametrize("late", [False, True], ids=["before the work", "after it"])
def test_a_row_that_is_put_back_stays_where_it_is_in_its_grammar(tiny_model, late):
    params = [GenerationParams(max_new_tokens=30, regex=f"[a-z]{{9}}-[0-9]{{{n}}}") for n in range(2, 8)]
    requests = [
        replace(request, params=own, constraint=grammar_of(own))
        for request, own in zip(mixed_requests(), params, strict=False)
    ]
    scarce = Scarce(tiny_model("llama"), on_calls(2, 8), OUT_OF_MEMORY, late)
    decode = tiny_tokenizer().decode
    done = tokens(run_engine(Engine(scarce, EOS, tokenizer=tiny_tokenizer()), requests))
    unhurt = FlatForward(copy.deepcopy(tiny_model("llama")))
    assert scarce.failures == 2
    assert done == tokens(run_engine(Engine(unhurt, EOS, tokenizer=tiny_tokenizer()), requests))
    for request, own in zip(requests, params, strict=True):
        assert re.fullmatch(own.regex or "", decode(done[request.id, 0]))


class ScarcePages(PagedForward):
    """The real forward pass in pages; memory runs out at some decode steps."""

    def __init__(self, model: Any, *numbers: int) -> None:
        super().__init__(copy.deepcopy(model))
        self.calls, self._numbers = 0, numbers

    def decode(self, rows: Any, long: bool) -> Any:
        self.calls += 1
        if self.calls in self._numbers:
            raise OUT_OF_MEMORY
        return super().decode(rows, long)


def test_constrained_and_given_rows_that_pages_put_back_go_on_where_they_were(tiny_model):
    requests = []
    for i, request in enumerate(mixed_requests()):
        own = GenerationParams(max_new_tokens=30, regex=f"[a-z]{{9}}-[0-9]{{{i % 5 + 2}}}", temperature=i % 3)
        requests.append(replace(request, params=own, constraint=grammar_of(own)))
        given = tuple(tuple(range(60 + j, 70 + i)) for j in range(3))
        params = GenerationParams(max_new_tokens=9 + i, logprobs=0)
        requests.append(Request(f"given {i}", request.prompt_token_ids, params, forced=given))

    def made(forward: Any) -> dict[tuple[str, int], Any]:
        engine = Engine(forward, EOS, tokenizer=tiny_tokenizer())
        done = run_engine(engine, requests)
        found = {
            key: (c.token_ids, c.complete, [item.logprob for item in c.logprobs or ()])
            for key, c in done.items()
        }
        return {**found, ("halved", 0): engine.stats.out_of_memory}

    hurt, unhurt = (
        made(ScarcePages(tiny_model("llama"), 3, 9)),
        made(PagedForward(copy.deepcopy(tiny_model("llama")))),
    )
    assert (hurt.pop(("halved", 0)), unhurt.pop(("halved", 0))) == (2, 0)
    assert {key: value[:2] for key, value in hurt.items()} == {
        key: value[:2] for key, value in unhurt.items()
    }
    for key, value in hurt.items():
        assert value[2] == pytest.approx(unhurt[key][2], abs=1e-4)


@pytest.mark.parametrize("error", ERRORS, ids=["device", "host", "cpu allocator", "CUDA itself"])
def test_every_way_to_run_out_of_memory_is_known(tiny_model, error):
    engine = Engine(Scarce(tiny_model("llama"), on_calls(2), error), EOS)
    assert not [c.error for c in engine.generate(mixed_requests()[:5]) if c.error]
    assert engine.stats.out_of_memory == 1


@pytest.mark.parametrize("fits", [1, 3])
def test_the_batch_shrinks_to_what_fits(tiny_model, fits):
    scarce = Scarce(tiny_model("llama"), lambda kind, rows: len(rows) > fits, OUT_OF_MEMORY)
    engine = Engine(scarce, EOS)
    requests = mixed_requests()
    done = tokens(run_engine(engine, requests))
    assert done == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}
    assert engine.stats.out_of_memory == scarce.failures > 0


def rows_in_flight(engine: Engine, requests: list[Request]) -> tuple[list[int], dict[tuple[str, int], Any]]:
    """After each step the rows in flight, and the tokens of all completions."""
    rows, done = [], []
    for finished in engine.steps(requests):
        done += finished
        rows.append(len(engine.live))
    return rows, tokens({(c.request_id, c.sample): c for c in done})


def long_requests(count: int) -> list[Request]:
    params = GenerationParams(max_new_tokens=40, ignore_eos=True)
    return [Request(f"{i}", tuple(range(60 + i, 70 + i)), params) for i in range(count)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "CALM_STEPS", 4)


@pytest.mark.usefixtures("impatient")
def test_the_batch_grows_again_when_memory_comes_back(tiny_model):
    def another_takes_it_for_a_while(kind: str, rows: list[Sample]) -> bool:
        nonlocal calls
        calls += 1
        return calls < 40 and len(rows) > 2

    calls = 0
    scarce = Scarce(tiny_model("llama"), another_takes_it_for_a_while, OUT_OF_MEMORY)
    requests = long_requests(48)
    rows, done = rows_in_flight(Engine(scarce, EOS, max_rows=12), requests)
    assert scarce.failures > 1
    assert max(rows[:40]) <= 3
    assert max(rows) == 12
    assert done == {(r.id, 0): alone(tiny_model("llama"), r, eos=()) for r in requests}


@pytest.mark.usefixtures("impatient")
def test_tries_to_hold_more_become_rare_while_memory_stays_scarce(tiny_model):
    scarce = Scarce(tiny_model("llama"), lambda kind, rows: len(rows) > 4, OUT_OF_MEMORY)
    requests = long_requests(48)
    rows, done = rows_in_flight(Engine(scarce, EOS, max_rows=12), requests)
    assert 3 <= scarce.failures <= 2 + math.log2(len(rows) / 4)
    assert done == {(r.id, 0): alone(tiny_model("llama"), r, eos=()) for r in requests}


def test_sampled_text_and_logprobs_are_unchanged(tiny_model):
    params = GenerationParams(max_new_tokens=20, temperature=1.0, n=3, logprobs=2)
    requests = [Request(r.id, r.prompt_token_ids, params) for r in mixed_requests()]
    calm = run(FlatForward(copy.deepcopy(tiny_model("llama"))), requests)
    done = run(Scarce(tiny_model("llama"), on_calls(4, 9, 15), OUT_OF_MEMORY, late=True), requests)
    assert tokens(done) == tokens(calm)
    for key, completion in done.items():
        assert [p.token_id for p in completion.logprobs or ()] == [
            p.token_id for p in calm[key].logprobs or ()
        ]


def test_a_prefix_that_does_not_fit_is_not_shared(tiny_model):
    def first_call(kind: str, rows: list[Sample]) -> bool:
        return rows[0].request.id == ""

    requests = mixed_requests()
    scarce = Scarce(tiny_model("llama"), first_call, OUT_OF_MEMORY)
    done = tokens(run(scarce, requests))
    assert scarce.failures == 1
    assert done == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}


def test_a_completion_of_the_same_step_is_not_lost(tiny_model):
    """Under longrope a step has two passes, and the second can fail after a row of the first has finished."""

    def second_pass_fails(kind: str, rows: list[Sample]) -> bool:
        nonlocal failed
        fails = kind == "decode" and not failed and rows[0].length < 64 and len(rows[0].token_ids) == 4
        failed |= fails
        return fails

    failed = False
    prompt = tuple(range(60, 140))
    requests = [
        Request("long", prompt, GenerationParams(max_new_tokens=5, ignore_eos=True)),
        Request("short", prompt[:10], GenerationParams(max_new_tokens=20, ignore_eos=True)),
        Request("other", prompt[:11], GenerationParams(max_new_tokens=20, ignore_eos=True)),
    ]
    done = tokens(run(Scarce(tiny_model("phi3"), second_pass_fails, OUT_OF_MEMORY), requests))
    assert failed
    assert done == {(r.id, 0): alone(tiny_model("phi3"), r, eos=()) for r in requests}


def test_a_row_that_never_fits_is_given_up_and_the_others_are_not(tiny_model):
    def too_long(kind: str, rows: list[Sample]) -> bool:
        return any(len(r.request.prompt_token_ids) > 95 for r in rows)

    requests = mixed_requests()
    scarce = Scarce(tiny_model("llama"), too_long, OUT_OF_MEMORY)
    huge = [r for r in requests if len(r.prompt_token_ids) > 95]
    huge.append(Request("again", huge[0].prompt_token_ids, huge[0].params))
    done = run(scarce, [*requests, huge[-1]])
    given_up = {r.id for r in huge}
    assert {c.request_id for c in done.values() if c.error} == given_up
    for request in huge:
        completion = done[request.id, 0]
        assert "out of memory" in str(completion.error)
        assert completion.finish_reason is None
    for request in requests:
        if request.id not in given_up:
            assert done[request.id, 0].token_ids == alone(tiny_model("llama"), request)


def test_another_error_is_not_taken_for_a_full_memory(tiny_model):
    scarce = Scarce(tiny_model("llama"), on_calls(3), RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(scarce, mixed_requests())


@pytest.mark.parametrize("fits", [0, 3])
def test_no_memory_to_begin_with_shrinks_the_batch_and_at_last_ends_the_job(tiny_model, monkeypatch, fits):
    def begin(batch: RectangleBatch, scheduler: Scheduler) -> None:
        if scheduler.max_rows > fits:
            raise OUT_OF_MEMORY

    monkeypatch.setattr(RectangleBatch, "begin", begin)
    engine = Engine(FlatForward(copy.deepcopy(tiny_model("llama"))), EOS, max_rows=12, max_tokens=2048)
    requests = mixed_requests()[:4]
    if fits == 0:
        with pytest.raises(JobError, match=r"for a single row\. Use a smaller model"):
            run_engine(engine, requests)
        return
    assert tokens(run_engine(engine, requests)) == {
        (r.id, 0): alone(tiny_model("llama"), r) for r in requests
    }
    assert engine.stats.out_of_memory == 2  # 12, 6, 3
