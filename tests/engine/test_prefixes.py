"""What prompts share, group by group: which prefixes are worth it, when they are computed, held and freed."""

import copy
import itertools
import random
from typing import Any

import pytest
from engine_runs import EOS, alone, run_engine, shuffled, tokens
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.limits import PAGE
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.prefixes import LEAST_TOKENS, PASS_TOKENS, Prefixes, Tokens, find_groups
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.engine.scheduler import Scheduler

WAYS = pytest.mark.parametrize("way", [FlatForward, PagedForward])


def most_saved(prompts: list[Tokens], held: list[Tokens], unit: int) -> int:
    """Try every set of prefixes: the most tokens that need no computing."""
    every = {p[:n] for p in prompts for n in range(unit, len(p), unit) if n % 20 in (0, 19)}
    worth = {}
    for prefix in every:
        under = {p for p in prompts if len(p) > len(prefix) and p[: len(prefix)] == prefix}
        saved = (len(under) - (prefix not in held)) * len(prefix) - PASS_TOKENS
        if under and saved > 0 and len(prefix) >= LEAST_TOKENS:
            worth[prefix] = saved

    def best(left: list[Tokens]) -> int:
        if not left:
            return 0
        first, rest = left[0], left[1:]
        apart = [p for p in rest if p[: len(first)] != first and first[: len(p)] != p]
        return max(best(rest), worth[first] + best(apart))

    return best(sorted(worth))


few = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


@given(few, few, st.sampled_from([1, 20]))
def test_the_prefixes_found_save_the_most(drawn, drawn_held, unit):
    # Each number stands for 20 tokens, so that prefixes are worth a pass.
    prompts = sorted({tuple(n for n in p for _ in range(20)) for p in drawn})
    held = sorted({tuple(n for n in p for _ in range(20)) for p in drawn_held})
    groups = find_groups(prompts, held, unit)
    assert sum(g.saved_tokens for g in groups) == most_saved(prompts, held, unit)
    grouped = [p for g in groups for p in g.prompts]
    assert len(grouped) == len(set(grouped))
    for group in groups:
        assert group.prefix
        assert len(group.prefix) % unit == 0
        assert all(
            p[: len(group.prefix)] == group.prefix and len(p) > len(group.prefix) for p in group.prompts
        )
        computed = len(group.prompts) - (group.prefix not in held)
        assert group.saved_tokens == computed * len(group.prefix) - PASS_TOKENS > 0


def test_all_prompts_share_the_longest_prefix_that_leaves_each_a_token():
    prompts = [(*range(50), *range(i, 70)) for i in range(50, 53)] + [tuple(range(40))]
    assert [(g.prefix, len(g.prompts)) for g in find_groups(prompts)] == [(tuple(range(39)), 4)]


def test_one_prompt_shares_nothing():
    assert find_groups([tuple(range(90))]) == []


def test_a_short_prefix_is_not_worth_a_pass():
    assert find_groups([(*range(7), i) for i in range(50)]) == []
    assert find_groups([(*range(8), i) for i in range(8, 13)]) == []
    assert len(find_groups([(*range(8), i) for i in range(8, 14)])) == 1


def test_many_prompts_that_begin_with_each_other_are_no_deep_recursion():
    groups = find_groups([(1,) * n for n in range(1, 3000)])
    assert sum(len(g.prompts) for g in groups) > 1000


SYSTEMS = 4


def grouped_requests(rows: int = 6, prefix_tokens: int = 45, new_tokens: int = 30) -> list[Request]:
    """Prompts with one of several beginnings, which have their own first tokens alike, in mixed order."""
    draw = random.Random(5)
    first = [draw.randrange(60, 300) for _ in range(10)]
    systems = [[*first, *(draw.randrange(60, 300) for _ in range(prefix_tokens))] for _ in range(SYSTEMS)]
    made = [
        Request(
            f"{system}-{row}",
            (*systems[system], *(draw.randrange(60, 300) for _ in range(draw.randrange(1, 30)))),
            GenerationParams(max_new_tokens=draw.randrange(1, new_tokens)),
        )
        for system, row in itertools.product(range(SYSTEMS), range(rows))
    ]
    return shuffled(made, 3)


@WAYS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_rows": 3},
        {"max_rows": 4, "window": 12},  # the window moves on
        {"max_rows": 5, "max_tokens": 500, "prefill_tokens": 50},  # not all prefixes fit
        {"max_tokens": 40},  # none does
    ],
)
def test_rows_that_begin_alike_in_groups_keep_their_text(way, each_tiny_model, settings):
    requests = grouped_requests(rows=4, new_tokens=12)
    engine = Engine(way(copy.deepcopy(each_tiny_model)), EOS, **settings)
    assert tokens(run_engine(engine, requests)) == {(r.id, 0): alone(each_tiny_model, r) for r in requests}


@WAYS
def test_each_group_s_prefix_is_computed_once(way, tiny_model):
    requests = grouped_requests()
    forward = way(copy.deepcopy(tiny_model("llama")))
    prompts = sum(len(r.prompt_token_ids) for r in requests)
    shared = 55 if way is FlatForward else 55 // PAGE * PAGE
    for settings in ({}, {"max_rows": 2}):
        engine = Engine(forward, EOS, **settings)
        run_engine(engine, requests)
        assert prompts - engine.stats.prefill_tokens == shared * (len(requests) - SYSTEMS)
    engine = Engine(forward, EOS, max_rows=2, window=12)  # three of a group on average, and some alone
    run_engine(engine, requests)
    assert prompts - engine.stats.prefill_tokens > shared * len(requests) / 2


@WAYS
def test_a_mixed_file_computes_no_more_than_its_groups_one_after_the_other(way, tiny_model):
    requests = grouped_requests(rows=9)
    forward = way(copy.deepcopy(tiny_model("llama")))
    together = Engine(forward, EOS, max_rows=6)
    run_engine(together, requests)
    apart = 0
    for system in range(SYSTEMS):
        engine = Engine(forward, EOS, max_rows=6)
        run_engine(engine, [r for r in requests if r.id.startswith(f"{system}-")])
        apart += engine.stats.prefill_tokens
    assert together.stats.prefill_tokens <= apart


@WAYS
def test_prefixes_and_rows_stay_within_the_tokens_in_flight(way, tiny_model):
    forward = way(copy.deepcopy(tiny_model("llama")))
    engine = Engine(forward, EOS, max_tokens=700, window=16)
    held: list[int] = []
    for _ in engine.steps(grouped_requests(rows=12)):
        batch: Any = engine._batch
        held.append(len(batch._prefixes.stored))
        if way is PagedForward:
            assert (forward.pages.count - forward.pages.free) * PAGE <= 700
            assert forward.pages.count * PAGE <= 700
        else:
            prefixes = sum(rectangle.head for rectangle in batch._prefixes.stored)
            admitted = sum(len(s.request.prompt_token_ids) for s in engine.live)
            assert prefixes + admitted <= 700
    assert max(held) >= 1
    assert batch._prefixes.stored == [], "what nobody waits for is freed"


def waiting(prompts: list[Tokens], max_tokens: int = 10_000) -> Scheduler:
    requests = [Request(f"{i}", p, GenerationParams()) for i, p in enumerate(prompts)]
    made = Scheduler(requests, 8, max_tokens, 64)
    made.read_ahead()
    return made


def test_those_that_save_most_are_planned_where_not_all_fit():
    few, many = tuple(range(100)), tuple(range(500, 600))
    prompts = [(*few, i) for i in range(3)] + [(*many, i) for i in range(9)]
    planned = Prefixes(lambda ids: ids)
    for max_tokens, expected in ((399, 0), (400, 100), (800, 200)):
        planned.plan(waiting(prompts, max_tokens))
        assert planned.tokens == expected
    made = waiting(prompts, 400)
    planned.plan(made)
    sharing = [s.request.prompt_token_ids[:-1] for s in made.waiting if s.prefix]
    assert sharing == [many] * 9


def test_a_computed_prefix_stays_while_rows_wait_for_it():
    freed: list[Tokens] = []
    planned = Prefixes(lambda ids: ids, freed.append)
    first, second = tuple(range(100)), tuple(range(300, 400))
    made = waiting([(*first, i) for i in range(4)])
    planned.plan(made)
    for sample in made.admit(0, 0)[:3]:
        taken = planned.take(sample)
        assert taken is not None
        assert taken.stored == first
    planned.free_unneeded()
    assert (planned.stored, freed) == ([first], [])
    planned.plan(waiting([(*first, 7)] + [(*second, i) for i in range(4)]))
    assert (planned.stored, freed) == ([first], []), "one row is enough: it costs nothing more"
    planned.plan(waiting([(*second, i) for i in range(4)]))
    assert (planned.stored, freed) == ([], [first])


@WAYS
def test_a_prefix_that_does_not_fit_is_not_shared_and_the_others_are(way, tiny_model):
    class Scarce(way):  # type: ignore[misc, valid-type]
        asked = 0

        def prefill(self, rows: Any, *more: Any) -> Any:
            alone = (
                getattr(rows[0], "last", 0) == 32 or getattr(getattr(rows[0], "request", 0), "id", 0) == ""
            )
            self.asked += alone
            if alone and self.asked == 2:
                raise RuntimeError("CUDA error: out of memory")
            return super().prefill(rows, *more)

    requests = grouped_requests()
    forward = Scarce(copy.deepcopy(tiny_model("llama")))
    engine = Engine(forward, EOS)
    done = tokens(run_engine(engine, requests))
    assert done == {(r.id, 0): alone(tiny_model("llama"), r) for r in requests}
    assert forward.asked == SYSTEMS
    assert engine.stats.out_of_memory == 0
    shared = 55 if way is FlatForward else 32
    prompts = sum(len(r.prompt_token_ids) for r in requests)
    assert prompts - engine.stats.prefill_tokens == shared * 5 * (SYSTEMS - 1)
