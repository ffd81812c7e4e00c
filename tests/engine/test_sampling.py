"""Sampling: filters are transformers' own, draws follow the probabilities and depend on nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.sampling import HEAD, filtered_probabilities, next_tokens, uniform
from pipeline.engine.scheduler import Sample

SETTINGS: list[dict[str, float]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100_000},  # more than there are
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 3000, "top_p": 0.999},
    {"top_p": 0.99, "min_p": 0.0001},
]


def sample(id: str = "a", index: int = 0, prompt: tuple[int, ...] = (0,), **params: Any) -> Sample:
    return Sample(Request(id, prompt, GenerationParams(max_new_tokens=1 << 20, **params)), index)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def by_transformers(logits: Tensor, settings: dict[str, float]) -> Tensor:
    """[1, V] → the probabilities that `generate` would draw from."""
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    if "top_k" in settings:
        logits = TopKLogitsWarper(int(settings["top_k"]))(nothing, logits)
    if "top_p" in settings:
        logits = TopPLogitsWarper(settings["top_p"])(nothing, logits)
    if "min_p" in settings:
        logits = MinPLogitsWarper(settings["min_p"])(nothing, logits)
    return logits.softmax(-1)


def by_us(logits: Tensor, settings: list[dict[str, float]]) -> Tensor:
    probabilities, ids = filtered_probabilities(
        logits,
        column(*(s.get("top_k", 0) for s in settings)),
        column(*(s.get("top_p", 1) for s in settings)),
        column(*(s.get("min_p", 0) for s in settings)),
    )
    assert (probabilities.diff(dim=-1) <= 0).all(), "falling"
    whole = torch.zeros_like(logits).scatter(1, ids, probabilities)
    return whole / whole.sum(-1, keepdim=True)


@pytest.mark.parametrize("vocabulary", [5, 300, HEAD, HEAD + 1, 5000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0], ids=["flat", "normal", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_transformers(vocabulary, spread, settings):
    torch.manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary) * spread
    ours, theirs = by_us(logits, [settings]), by_transformers(logits, settings)
    # Sums in another order can move the token at top-p's edge to its other side, at most; what rounding
    # leaves of a probability is no difference.
    differ = (ours > 1e-6) & (theirs == 0) | (theirs > 1e-6) & (ours == 0)
    assert differ.sum() <= (1 if "top_p" in settings else 0)
    torch.testing.assert_close(ours, theirs, atol=1e-4 if "top_p" in settings else 1e-6, rtol=1e-3)


def test_a_filter_that_reaches_beyond_the_head_keeps_all_it_must():
    logits = torch.zeros(1, 3 * HEAD) + torch.arange(3 * HEAD) * 1e-6
    ours = by_us(logits, [{"top_p": 0.8}])
    assert abs(int((ours > 0).sum()) - 0.8 * 3 * HEAD) <= 2
    assert int((by_us(logits, [{"min_p": 0.5}]) > 0).sum()) == 3 * HEAD
    assert int((by_us(logits, [{"top_k": 2000}]) > 0).sum()) == 2000


def test_each_row_has_its_own_filters():
    torch.manual_seed(0)
    logits = torch.randn(len(SETTINGS), 3000) * 3
    together = by_us(logits, SETTINGS)
    for row, settings in enumerate(SETTINGS):
        torch.testing.assert_close(together[row : row + 1], by_us(logits[row : row + 1], [settings]))


def draws(logits: Tensor, count: int, prompt: tuple[int, ...] = (0,), **params: Any) -> list[int]:
    """This many draws from one row of logits, a row for each."""
    rows = [sample(f"{i}", prompt=prompt, **params) for i in range(count)]
    return next_tokens(logits.expand(count, -1), rows)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(params):
    """Chi-square over 4,000 fixed draws, at 1 in 10,000."""
    torch.manual_seed(3)
    count, prompt = 4000, (1, 5)
    logits = torch.randn(1, 12) * 1.5
    whole = {"temperature": 1.0, **params}
    scores = logits
    if penalty := whole.get("repetition_penalty"):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), scores.clone())
    scores = TemperatureLogitsWarper(float(whole["temperature"]))(torch.zeros(1, 1), scores)  # type: ignore[arg-type]
    expected = by_transformers(scores, whole)[0] * count
    observed = torch.bincount(torch.tensor(draws(logits, count, prompt, **whole)), minlength=12)
    assert (observed[expected == 0] == 0).all(), "what is filtered out is never drawn"
    kept = expected > 0
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum().item()
    critical = {
        1: 15.1,
        2: 18.4,
        3: 21.1,
        4: 23.5,
        5: 25.7,
        6: 27.9,
        7: 29.9,
        8: 31.8,
        9: 33.7,
        10: 35.6,
        11: 37.4,
    }
    assert statistic < critical[int(kept.sum()) - 1]


def test_draws_follow_the_probabilities_beyond_the_head():
    torch.manual_seed(4)
    logits = torch.randn(1, 4 * HEAD) * 0.1
    made = torch.tensor(draws(logits, 4000, temperature=1.0, top_p=0.9))
    kept = by_transformers(logits, {"top_p": 0.9})[0] > 0
    assert kept[made].float().mean() == 1
    ranks = logits[0].argsort(descending=True).argsort()[made]
    assert 0.6 < (ranks >= HEAD).float().mean() < 0.8


def test_uniform_is_uniform_and_depends_on_each_of_its_arguments():
    numbers = np.array([uniform(1, "a", 0, step) for step in range(20_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50.8  # chi-square, 19 degrees, 1 in 10,000
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    near = [
        uniform(*key)
        for key in ((1, "a", 0, 0), (2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1))
    ]
    assert len(set(near)) == 5


def test_uniform_never_changes_between_versions():
    """The text of a seed is a promise to users who repeat a job."""
    assert uniform(0, "a", 0, 0) == 0.6736922539024837


def test_greedy_is_the_most_probable_token_whatever_else_is_asked():
    torch.manual_seed(5)
    logits = torch.randn(3, 50)
    rows = [sample(), sample(top_k=2, top_p=0.1, seed=9), sample(logprobs=3)]
    assert next_tokens(logits, rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [1.2, 3.0, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch.manual_seed(6)
    logits = torch.randn(2, 50) * 4
    row = sample(prompt=(3, 3, 7), repetition_penalty=penalty)
    row.token_ids += [int(logits[0].argmax()), int(logits[0].argmin())]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([row.all_token_ids]), logits[:1].clone()
    )
    before = logits.clone()
    chosen = next_tokens(logits, [row, sample()])
    assert chosen == [int(expected.argmax()), int(logits[1].argmax())]
    assert torch.equal(logits, before), "the model's logits stay as they are"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_log_softmax_of_the_models_logits(dtype):
    torch.manual_seed(7)
    logits = (torch.randn(4, 200) * 3).to(dtype)
    asked = (0, 5, None)
    rows = [
        sample(f"{i}", logprobs=count, temperature=t, top_k=k, repetition_penalty=p)
        for i, (count, t, k, p) in enumerate(
            zip(asked, (0.0, 0.7, 1.0), (0, 3, 0), (1.0, 1.0, 1.5), strict=True)
        )
    ]
    rows.append(sample("3", logprobs=100, repetition_penalty=1.5))
    chosen = next_tokens(logits, rows)
    expected = logits.float().log_softmax(-1)
    assert rows[2].logprobs == []
    for row, count in ((0, 0), (1, 5), (3, 100)):
        (item,) = rows[row].logprobs
        assert item.token_id == chosen[row]
        assert item.logprob == pytest.approx(expected[row, chosen[row]].item(), abs=1e-5)
        values, ids = expected[row].topk(count)
        assert [p for _, p in item.top] == pytest.approx(values.tolist(), abs=1e-5)
        if dtype is torch.float32:  # without ties
            assert [i for i, _ in item.top] == ids.tolist()


def test_more_logprobs_than_tokens_are_all_there_are():
    row = sample(logprobs=100)
    next_tokens(torch.randn(1, 7), [row])
    assert len(row.logprobs[0].top) == 7


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-60, 100.0])
def test_an_extreme_temperature_still_draws_a_token(temperature):
    torch.manual_seed(8)
    logits = torch.randn(1, 300) * 20
    made = draws(logits, 200, temperature=temperature)
    assert all(0 <= token < 300 for token in made)
    if temperature < 1:
        assert set(made) == {int(logits.argmax())}
    else:
        assert len(set(made)) > 50


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 1500] = 1.0
    logits[0, 2999] = 0.0
    for params in ({}, {"top_p": 0.999}, {"top_k": 50}):
        assert set(draws(logits, 300, temperature=1.0, **params)) == {1500, 2999}
