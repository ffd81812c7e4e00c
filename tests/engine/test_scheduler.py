"""Who runs next: order, budgets, duplicates, groups of near-equal length, the cheapest rectangles."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.scheduler import (
    CALM_STEPS,
    Sample,
    Scheduler,
    partition,
    prefill_groups,
)

FAR = 1 << 30


def request(
    id: str, prompt_tokens: int, new_tokens: int = 8, first_token: int = 0, **params: object
) -> Request:
    ids = (first_token, *range(1, prompt_tokens))
    return Request(id, ids, GenerationParams(max_new_tokens=new_tokens, **params))  # type: ignore[arg-type]


def scheduler(requests: list[Request], rows: int = 8, tokens: int = FAR, window: int = 64) -> Scheduler:
    made = Scheduler(requests, rows, tokens, window)
    made.read_ahead()
    return made


def ids(samples: list[Sample]) -> list[str]:
    return [s.request.id for s in samples]


def test_the_longest_expected_work_is_admitted_first():
    made = scheduler([request("a", 5, 10), request("b", 5, 30), request("c", 50, 20), request("d", 5, 20)], 1)
    assert [ids(made.admit(0, 0)) for _ in range(4)] == [["b"], ["c"], ["d"], ["a"]]


def test_what_is_admitted_together_comes_longest_prompt_first():
    made = scheduler([request("a", 5, 30), request("b", 9, 10), request("c", 7, 20)])
    assert ids(made.admit(0, 0)) == ["b", "c", "a"]


def test_work_done_counts_no_more():
    made = scheduler([request("a", 5, 30), request("b", 5, 20)], rows=1)
    (first,) = made.admit(0, 0)
    first.token_ids += range(15)  # 15 of 30 to go: less than b's 20
    made.put_back([first])
    assert ids(made.admit(0, 0)) == ["b"]
    assert made.admit(0, 0)[0].token_ids == list(range(15))


def test_reading_ahead_is_bounded_and_goes_on_at_half():
    read = 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for i in range(100):
            read += 1
            yield request(f"{i}", 5, first_token=i)

    made = Scheduler(requests(), 4, FAR, window=10)
    made.read_ahead()
    assert (len(made.waiting), read) == (10, 10)
    made.admit(0, 0)
    made.read_ahead()
    assert read == 10  # six of ten still wait
    made.admit(0, 0)
    made.read_ahead()
    assert (len(made.waiting), read) == (10, 18)


def test_duplicates_are_read_ahead_in_bounded_numbers_too():
    same = iter([request(str(i), 5) for i in range(1000)])
    made = Scheduler(same, 8, FAR, 64)
    made.read_ahead()
    (leader,) = made.admit(0, 0)
    assert len(leader.duplicates) == 63
    made.retire(leader)
    assert made.read_ahead()
    assert int(next(same).id) == 128


def test_every_request_comes_once_however_small_the_window():
    made = Scheduler([request(f"{i}", 5, i + 1, first_token=i) for i in range(50)], 3, FAR, window=4)
    seen: list[str] = []
    while made.read_ahead() or made.waiting:
        seen += ids(made.admit(0, 0))
    assert sorted(seen, key=int) == [f"{i}" for i in range(50)]


def test_rows_in_flight_are_bounded():
    made = scheduler([request(f"{i}", 5, first_token=i) for i in range(20)], rows=8)
    assert len(made.admit(live_rows=3, live_tokens=0)) == 5
    assert made.admit(live_rows=8, live_tokens=0) == []


def test_tokens_in_flight_are_bounded():
    made = scheduler([request(f"{i}", 10, first_token=i) for i in range(20)], tokens=45)
    assert len(made.admit(0, 0)) == 4
    assert len(made.admit(live_rows=2, live_tokens=20)) == 2
    assert made.admit(live_rows=2, live_tokens=40) == []


def test_an_empty_batch_admits_a_sample_however_long():
    made = scheduler([request("huge", 100, 50), request("small", 5)], tokens=10)
    assert ids(made.admit(0, 0)) == ["huge"]


def test_a_pass_is_not_spent_on_an_eighth_of_what_it_could_hold():
    made = scheduler([request(f"{i}", 5, first_token=i) for i in range(100)], rows=64, window=100)
    assert made.admit(live_rows=57, live_tokens=0) == []
    assert len(made.admit(live_rows=56, live_tokens=0)) == 8


def test_the_last_samples_do_not_wait_for_more():
    made = scheduler([request("a", 5), request("b", 5, first_token=1)], rows=64)
    assert len(made.admit(live_rows=62, live_tokens=0)) == 2


def test_running_out_of_memory_halves_the_budgets_and_never_below_one():
    made = scheduler([request(f"{i}", 10, first_token=i) for i in range(20)], rows=64)
    made.shrink(live_rows=10, live_tokens=100)
    assert (made.max_rows, made.max_tokens) == (5, 50)
    assert len(made.admit(0, 0)) == 5
    for _ in range(5):
        made.shrink(1, 1)
    assert (made.max_rows, made.max_tokens) == (1, 1)
    assert len(made.admit(0, 0)) == 1


def calm_steps_to(made: Scheduler, max_rows: int) -> int:
    """Steps without a failure until this many rows may be in flight."""
    for step in range(1, 10_000):
        made.grow()
        if made.max_rows >= max_rows:
            return step
    raise AssertionError


def test_the_budgets_grow_back_step_by_step_to_what_they_were():
    made = scheduler([], rows=64)
    made.shrink(live_rows=64, live_tokens=FAR)
    assert (made.max_rows, made.max_tokens) == (32, FAR // 2)
    assert calm_steps_to(made, 33) == CALM_STEPS
    assert made.max_rows == 40
    assert calm_steps_to(made, 64) == 3 * CALM_STEPS  # 50, 62, 64
    for _ in range(9 * CALM_STEPS):
        made.grow()
    assert (made.max_rows, made.max_tokens) == (64, FAR)


def test_a_budget_of_one_grows_too():
    made = scheduler([], rows=2)
    made.shrink(live_rows=2, live_tokens=2)
    assert (made.max_rows, made.max_tokens) == (1, 1)
    assert calm_steps_to(made, 2) == CALM_STEPS
    assert made.max_tokens == 2


def test_each_failure_makes_the_next_growth_later():
    made = scheduler([], rows=64)
    waits = []
    for _ in range(4):
        made.shrink(live_rows=40, live_tokens=1000)
        waits.append(calm_steps_to(made, made.max_rows + 1))
    assert waits == [CALM_STEPS * 2**i for i in range(4)]


def test_identical_greedy_requests_are_one_sample():
    made = scheduler([request("a", 5), request("b", 5), request("c", 6), request("d", 5, new_tokens=9)])
    samples = {s.request.id: s for s in made.admit(0, 0)}
    assert set(samples) == {"a", "c", "d"}
    assert [r.id for r in samples["a"].duplicates] == ["b"]


@pytest.mark.parametrize("other", [{"stop": ["x"]}, {"logprobs": 1}, {"repetition_penalty": 1.5}])
def test_requests_that_differ_in_what_they_ask_are_not_duplicates(other):
    made = scheduler([request("a", 5), request("b", 5, **other)])
    assert sorted(ids(made.admit(0, 0))) == ["a", "b"]


def test_a_duplicate_joins_a_sample_that_runs_already_but_not_one_that_has_finished():
    made = Scheduler([request(x, 5) for x in "abcd"], 8, FAR, window=4)
    made.read_ahead()
    (a,) = made.admit(0, 0)
    a.token_ids.append(1)
    made.read_ahead()
    assert [r.id for r in a.duplicates] == ["b", "c", "d"]
    later = Scheduler(itertools.chain([request("a", 5)], _after(lambda: later.retire(first))), 8, FAR, 1)
    later.read_ahead()
    (first,) = later.admit(0, 0)
    later.read_ahead()
    assert first.duplicates == []
    assert ids(later.admit(0, 0)) == ["z"]


def _after(act: object) -> Iterator[Request]:
    act()  # type: ignore[operator]
    yield request("z", 5)


def test_greedy_samples_are_made_once_and_drawn_ones_apart():
    made = scheduler([request("greedy", 5, n=3), request("drawn", 6, n=3, temperature=1.0)])
    samples = made.admit(0, 0)
    assert sorted((s.request.id, s.index) for s in samples) == [
        ("drawn", 0), ("drawn", 1), ("drawn", 2), ("greedy", 0),
    ]  # fmt: skip
    greedy = next(s for s in samples if s.request.id == "greedy")
    assert [r.id for r in greedy.duplicates] == ["greedy", "greedy"]


def test_drawn_requests_with_the_same_prompt_are_never_duplicates():
    made = scheduler([request("a", 5, temperature=1.0), request("b", 5, temperature=1.0)])
    assert len(made.admit(0, 0)) == 2


def samples_of(prompts: list[tuple[int, ...]]) -> list[Sample]:
    return [Sample(Request(f"{i}", p, GenerationParams()), 0) for i, p in enumerate(prompts)]


lengths_and_budget = st.tuples(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 600))


@given(lengths_and_budget, st.integers(0, 30), st.booleans())
def test_prefill_groups_keep_the_budget_and_waste_less_than_a_tenth(drawn, prefix, equal):
    lengths, budget = drawn
    rows = sorted(
        samples_of([(i, *range(prefix + n - 1)) for i, n in enumerate(lengths)]),
        key=lambda s: s.length,
        reverse=True,
    )
    groups = prefill_groups(rows, prefix, budget, equal)
    assert [s for group in groups for s in group] == rows
    for group in groups:
        own = [s.length - prefix for s in group]
        cells = len(group) * max(own)
        assert len(group) == 1 or cells <= budget
        assert cells - sum(own) < 0.1 * cells
        if equal:
            assert len(set(own)) == 1


def test_prefill_groups_join_what_fits():
    rows = samples_of([(i, *range(99)) for i in range(10)])
    assert [len(g) for g in prefill_groups(rows, 0, 400)] == [4, 4, 2]
    assert [len(g) for g in prefill_groups(rows, 60, 400)] == [10]  # 40 tokens of each are its own


def test_a_row_takes_the_columns_that_its_model_pads_it_to():
    rows = samples_of([(i, *range(99)) for i in range(5)] + [(i, *range(20)) for i in range(5)])
    assert [len(g) for g in prefill_groups(rows, 0, 512, True, 256)] == [2, 2, 1, 2, 2, 1]
    assert [len(g) for g in prefill_groups(rows, 0, 512, True)] == [5, 5]


def test_rows_with_the_same_tokens_take_the_place_of_one():
    rows = samples_of([(1,) * 100] * 50 + [(0,) * 100] * 50)
    assert [len(g) for g in prefill_groups(rows, 0, 200)] == [100]


@pytest.mark.parametrize("overhead", [0, 10, 100, 1500, 10**6])
def test_the_partition_is_the_cheapest_there_is(overhead):
    """Against every way to cut the rows where lengths change by 16."""
    draw = random.Random(overhead)
    for _ in range(60):
        lengths = sorted((draw.randrange(1, 400) for _ in range(draw.randrange(1, 10))), reverse=True)

        def cost(slices: list[slice], lengths: list[int] = lengths) -> int:
            return sum(overhead + (s.stop - s.start) * lengths[s.start] for s in slices)

        inner = [i for i in range(1, len(lengths)) if lengths[i - 1] // 16 != lengths[i] // 16]
        ways = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(len(inner) + 1))
        costs = [
            cost([slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(lengths)])]) for cuts in ways
        ]
        found = partition(lengths, overhead)
        assert [i for s in found for i in range(s.start, s.stop)] == list(range(len(lengths)))
        assert cost(found) == min(costs)


def test_a_partition_of_nothing_is_nothing():
    assert partition([], 100) == []


def test_the_scheduler_needs_no_torch():
    code = "import pipeline.engine.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
