"""A sample whose tokens are given to it has the logprobs that the model gives them, whatever runs beside it."""

import copy
import functools
import random
from typing import Any

import pytest
import torch
from engine_runs import EOS, mixed_requests, run, tokens

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward, PaddedForward
from pipeline.engine.rectangles.own_cache import CacheForward

PLAIN = mixed_requests()


def padded(model: Any) -> Any:
    return PaddedForward(model)


@pytest.fixture(scope="module", params=[FlatForward, PagedForward, padded, CacheForward])
def forward(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    """One after the other, the ways through a model."""
    return request.param(copy.deepcopy(tiny_model("llama")))


def forced_requests() -> list[Request]:
    """Prompts with one to seven given texts of one to nine tokens each, ends of a completion among them."""
    draw = random.Random(3)
    found = []
    for i, request in enumerate(PLAIN):
        given = tuple(
            (*tuple(draw.randrange(300) for _ in range(draw.randrange(1, 9))), min(EOS))
            for _ in range(1 + i % 7)
        )
        params = GenerationParams(max_new_tokens=max(map(len, given)), logprobs=0)
        found.append(Request(f"given {i}", request.prompt_token_ids, params, forced=given))
    return found


@pytest.fixture(scope="module")
def alone(forward: Any) -> dict[tuple[str, int], tuple[int, ...]]:
    """The text of the plain requests with none beside them whose tokens are given."""
    return tokens(run(forward, PLAIN))


@functools.cache
@torch.inference_mode()
def logprobs_alone(model: Any, prompt: tuple[int, ...], given: tuple[int, ...]) -> list[float]:
    """What plain transformers gives each of these tokens after the prompt, in one pass of this row alone."""
    ids = torch.tensor([prompt + given])
    scores = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), -1)
    return scores.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


@pytest.mark.parametrize("max_rows", [1, 5, 64])
def test_given_tokens_have_the_models_own_logprobs(forward, alone, tiny_model, max_rows):
    requests = forced_requests()
    done = run(forward, [*requests, *PLAIN], max_rows=max_rows)
    assert len(done) == len(PLAIN) + sum(len(request.forced) for request in requests)
    for request in requests:
        for sample, given in enumerate(request.forced):
            completion = done[request.id, sample]
            assert (completion.token_ids, completion.finish_reason) == (given, "stop")
            expected = logprobs_alone(tiny_model("llama"), request.prompt_token_ids, given)
            assert [item.logprob for item in completion.logprobs or ()] == pytest.approx(expected, abs=2e-4)
    assert {key: done[key].token_ids for key in alone} == alone  # those beside them are as they were


def test_texts_of_one_prompt_share_its_prefill(forward):
    prompt = tuple(range(60, 110))
    given = tuple((token, 2) for token in range(50, 66))
    params = GenerationParams(max_new_tokens=2, logprobs=0)
    engine = Engine(forward, EOS)
    done = list(engine.generate([Request("a", prompt, params, forced=given)]))
    assert {c.token_ids for c in done} == set(given)
    assert engine.stats.prefill_tokens == len(prompt)


def test_logits_that_are_no_numbers_are_an_error_and_no_given_token(tiny_model):
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[33] = torch.nan
    params = GenerationParams(max_new_tokens=2, logprobs=0)
    requests = [Request(f"{i}", (60, i, 70), params, forced=((80, 81),)) for i in (33, 34)]
    done = run(FlatForward(model), requests)
    assert "not finite" in (done["33", 0].error or "")
    assert done["34", 0].token_ids == (80, 81)
