"""The engine's text is that of each prompt alone, whatever runs beside it: tiny models, float32."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine_runs import EOS, alone, mixed_requests, run, run_engine, shuffled, tokens

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.limits import CPU, PAGE
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles import batch as batch_module
from pipeline.engine.rectangles.forward import FlatForward, Forward, PaddedForward
from pipeline.engine.rectangles.own_cache import CacheForward
from pipeline.engine.rectangles.rectangle import Rectangle, regroup

ROWS = [1, 2, 3, 7, 8, 64]


class Counted:
    """`regroup`, and how often it trimmed, let grow, merged and split."""

    def __init__(self) -> None:
        self.trimmed = self.grown = self.merged = self.split = 0

    def __call__(self, old: list[Rectangle], groups: list[list[Any]]) -> list[Rectangle]:
        columns_before = {id(s): (r, start) for r in old for s, start in zip(r.rows, r.starts, strict=True)}
        self.grown += sum(r.full for r in old)
        homes: dict[int, set[int]] = {}
        new = regroup(old, groups)
        for rectangle in new:
            sources = {id(columns_before[id(s)][0]) for s in rectangle.rows}
            self.merged += len(sources) > 1
            for source in sources:
                homes.setdefault(source, set()).add(id(rectangle))
            for sample, start in zip(rectangle.rows, rectangle.starts, strict=True):
                self.trimmed += start < columns_before[id(sample)][1]
        self.split += sum(len(h) > 1 for h in homes.values())
        return new


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counter = Counted()
    monkeypatch.setattr(batch_module, "regroup", counter)
    return counter


@pytest.fixture(scope="module")
def expected(each_tiny_model) -> dict[str, tuple[int, ...]]:
    """Each of the mixed requests alone."""
    return {r.id: alone(each_tiny_model, r) for r in mixed_requests()}


@pytest.fixture(scope="module", params=[FlatForward, PagedForward], ids=["rectangles", "pages"])
def way(request: pytest.FixtureRequest) -> Any:
    """One after the other, the ways to hold keys and values."""
    return request.param


@pytest.fixture(scope="module")
def flat(way, each_tiny_model) -> Any:
    """A way through each model whose linear layers see no padding."""
    return way(copy.deepcopy(each_tiny_model))


@pytest.fixture(scope="module")
def rectangles(each_tiny_model) -> Forward:
    return FlatForward(copy.deepcopy(each_tiny_model))


@pytest.fixture(scope="module")
def padded(each_tiny_model) -> Forward:
    return PaddedForward(copy.deepcopy(each_tiny_model))


def same(completions: dict[tuple[str, int], Any], expected: dict[str, tuple[int, ...]]) -> None:
    assert tokens(completions) == {(id, 0): ids for id, ids in expected.items()}


def test_the_requests_end_in_both_ways_and_outgrow_a_chunk(expected):
    made = {r.id: r.params.max_new_tokens for r in mixed_requests()}
    at_length = [id for id, ids in expected.items() if len(ids) == made[id]]
    assert 2 < len(at_length) < len(made) - 2
    assert max(len(ids) for ids in expected.values()) > 32


@pytest.mark.parametrize("max_rows", ROWS)
def test_text_is_that_of_each_prompt_alone(flat, expected, max_rows):
    same(run(flat, shuffled(mixed_requests(), seed=max_rows), max_rows=max_rows), expected)


@pytest.mark.parametrize("max_rows", [1, 7, 64])
def test_text_is_the_same_with_prompts_cut_into_chunks(flat, expected, max_rows):
    settings = {"max_rows": max_rows, "prefill_tokens": 11}
    same(run(flat, shuffled(mixed_requests(), seed=max_rows + 100), **settings), expected)


@pytest.mark.parametrize("prefill_tokens", [11, 2048])
def test_text_is_the_same_without_the_shared_prefix(flat, expected, prefill_tokens):
    settings = {"max_rows": 8, "prefill_tokens": prefill_tokens, "share_prefix": False}
    same(run(flat, shuffled(mixed_requests(), seed=1), **settings), expected)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_text_is_the_same_on_the_plain_path(padded, expected, max_rows):
    same(run(padded, shuffled(mixed_requests(), seed=max_rows), max_rows=max_rows), expected)


def test_text_is_the_same_in_batches_of_equal_length(each_tiny_model, expected):
    same(run(CacheForward(copy.deepcopy(each_tiny_model)), mixed_requests(), max_rows=8), expected)


def test_text_is_the_same_when_few_tokens_are_in_flight_and_read_ahead(flat, expected):
    same(run(flat, shuffled(mixed_requests(), seed=3), max_rows=8, max_tokens=150, window=4), expected)


def test_rows_are_trimmed_merged_and_split_without_a_change_of_text(
    rectangles, expected, counted, monkeypatch
):
    # Cheap rectangles, so that a batch of a dozen rows is regrouped as one of a hundred is.
    monkeypatch.setattr(rectangles, "limits", replace(CPU, rectangle_overhead=60))
    monkeypatch.setattr(batch_module, "SPARE_RECTANGLES", 0)
    same(run(rectangles, mixed_requests(), max_rows=9), expected)
    assert min(counted.trimmed, counted.merged, counted.split) > 0, vars(counted)


def test_dense_batches_are_trimmed_and_grow_without_a_change_of_text(
    rectangles, expected, counted, monkeypatch
):
    monkeypatch.setattr(rectangles, "limits", replace(CPU, rectangle_overhead=1 << 30))
    same(run(rectangles, mixed_requests(), max_rows=16), expected)
    assert min(counted.grown, counted.trimmed, counted.merged) > 0, vars(counted)


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_rows_below_across_and_above_the_longrope_switch_keep_their_text(way, tiny_model, max_rows):
    requests = [
        Request(f"{n}", tuple(range(60, 60 + n)), GenerationParams(max_new_tokens=12, ignore_eos=True))
        for n in (8, 51, 52, 53, 54, 58, 62, 63, 64, 65, 66, 90)  # the switch is at 64
    ]
    engine = Engine(way(copy.deepcopy(tiny_model("phi3"))), EOS, max_rows=max_rows, share_prefix=False)
    done = tokens(run_engine(engine, shuffled(requests, max_rows)))
    for request in requests:
        assert done[request.id, 0] == alone(tiny_model("phi3"), request, eos=()), request.id
    crossed = engine.stats.prefill_tokens - sum(len(r.prompt_token_ids) for r in requests)
    assert crossed == 65 * 5, "rows of 54 to 64 tokens are prefilled again at 65"


@pytest.mark.parametrize("prefix_tokens", [12, 40, 64])
def test_a_shared_prefix_is_computed_once(way, tiny_model, prefix_tokens):
    forward = way(copy.deepcopy(tiny_model("llama")))
    requests = mixed_requests(prefix_tokens=prefix_tokens)
    sharing, apart = Engine(forward, EOS), Engine(forward, EOS, share_prefix=False)
    assert tokens(run_engine(sharing, requests)) == tokens(run_engine(apart, requests))
    rows = len(requests) - 2  # two are duplicates
    assert apart.stats.prefill_tokens == sum(len(r.prompt_token_ids) for r in requests[:rows])
    shared = prefix_tokens if way is FlatForward else prefix_tokens // PAGE * PAGE  # whole pages
    assert apart.stats.prefill_tokens - sharing.stats.prefill_tokens == shared * (rows - 1)


def test_a_row_without_the_prefix_of_the_first_window_keeps_its_text(each_tiny_model, flat):
    requests = mixed_requests()[:4]
    other = Request("other", tuple(range(100, 130)), GenerationParams(max_new_tokens=40))
    done = tokens(run(flat, [*requests, other], max_rows=2, window=3))
    assert done["other", 0] == alone(each_tiny_model, other)


def test_duplicates_run_once_and_all_get_the_text(way, tiny_model):
    forward = way(copy.deepcopy(tiny_model("llama")))
    first = mixed_requests()[2]
    params = GenerationParams(max_new_tokens=first.params.max_new_tokens, n=3)
    requests = [Request(f"d{i}", first.prompt_token_ids, params) for i in range(4)]
    engine = Engine(forward, EOS)
    done = tokens(run_engine(engine, requests))
    assert done == {(f"d{i}", s): alone(tiny_model("llama"), first) for i in range(4) for s in range(3)}
    assert engine.stats.peak_rows == 1


def test_samples_of_a_prompt_share_one_prefill(way, tiny_model):
    forward = way(copy.deepcopy(tiny_model("llama")))
    ids = mixed_requests()[4].prompt_token_ids
    params = GenerationParams(max_new_tokens=20, n=5, temperature=1.0, ignore_eos=True)
    engine = Engine(forward, EOS)
    done = tokens(run_engine(engine, [Request("s", ids, params)]))
    assert engine.stats.prefill_tokens == len(ids)
    assert engine.stats.peak_rows == 5
    assert len(set(done.values())) == 5


SAMPLED = {"temperature": 0.9, "n": 2, "seed": 3}
FILTERS = ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3, "top_k": 50})


def sampled_requests() -> list[Request]:
    """The mixed requests, each with its own filters; one in six is greedy."""
    made = []
    for i, request in enumerate(mixed_requests()):
        extra = FILTERS[i % 6] if i % 6 < 5 else {"temperature": 0.0}
        params = GenerationParams(**{"max_new_tokens": request.params.max_new_tokens, **SAMPLED, **extra})
        made.append(Request(request.id, request.prompt_token_ids, params))
    return made


def test_sampled_text_does_not_depend_on_rows_in_flight_order_or_path(flat, padded):
    whole = tokens(run(flat, sampled_requests(), max_rows=64))
    assert len(whole) == 2 * len(mixed_requests())
    for max_rows in (1, 7):
        settings = {"max_rows": max_rows, "prefill_tokens": 30 * max_rows}
        assert tokens(run(flat, shuffled(sampled_requests(), max_rows), **settings)) == whole
    assert tokens(run(padded, shuffled(sampled_requests(), 5), max_rows=5)) == whole


def test_the_seed_decides_a_sample_and_samples_differ(way, tiny_model):
    forward = way(copy.deepcopy(tiny_model("llama")))
    ids = mixed_requests()[0].prompt_token_ids

    def draw(seed: int, id: str = "a") -> dict[tuple[str, int], tuple[int, ...]]:
        params = GenerationParams(max_new_tokens=16, temperature=1.0, n=3, seed=seed, ignore_eos=True)
        return tokens(run(forward, [Request(id, ids, params)]))

    first = draw(1)
    assert draw(1) == first
    assert len(set(first.values())) == 3
    assert not set(draw(2).values()) & set(first.values())
    assert not set(draw(1, "b").values()) & set(first.values())


@pytest.mark.parametrize("max_rows", [1, 8])
def test_repetition_penalty_is_that_of_generate(each_tiny_model, flat, max_rows):
    requests = [
        Request(r.id, r.prompt_token_ids, GenerationParams(max_new_tokens=30, repetition_penalty=1.4))
        for r in mixed_requests()[:6]
    ]
    done = tokens(run(flat, requests, max_rows=max_rows))
    for request in requests:
        assert done[request.id, 0] == alone_with_penalty(each_tiny_model, request, 1.4)


def alone_with_penalty(model: Any, request: Request, penalty: float) -> tuple[int, ...]:
    class Penalised:
        config = model.config

        """`model.generate` with the penalty beside the arguments that `alone` gives."""

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return model.generate(*args, **kwargs, repetition_penalty=penalty)

    return alone(Penalised(), request)


def test_stats_count_what_was_done(flat, expected):
    engine = Engine(flat, EOS, max_rows=8)
    done = run_engine(engine, mixed_requests())
    summary = engine.stats.summary()
    assert engine.stats.completion_tokens == sum(len(c.token_ids) for c in done.values())
    assert 0 <= summary["prefill_padding_fraction"] < 0.1
    assert summary["columns_attended_over_needed"] >= 1
    assert 1 <= summary["mean_rows_in_flight"] <= summary["peak_rows_in_flight"] <= 8
    assert engine.live == []


def test_no_requests_are_no_completions(way, tiny_model: Callable[[str], Any]):
    assert run(way(copy.deepcopy(tiny_model("llama"))), []) == {}
