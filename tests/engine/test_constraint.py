"""A completion with a constraint is the most probable text of its grammar, whatever runs beside it."""

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from engine_runs import alone, mixed_requests, run_engine, tokens
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from pipeline.common.request import Completion, GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward, PaddedForward
from pipeline.prompts.constraint import grammar_of

TOKENIZER = tiny_tokenizer()
EOS = frozenset({TOKENIZER.eos_token_id})
ASKED: list[dict[str, Any]] = [
    {"choice": ["yes", "no", "none"]},
    {"regex": "[0-9]{3}-[a-z]{2,4}"},
    {"json_schema": {"type": "array", "items": {"enum": ["cat", "학교", 1.5]}, "minItems": 2, "maxItems": 4}},
    {
        "json_schema": {
            "type": "object",
            "properties": {"joke": {"type": "string", "maxLength": 4}, "good": {"type": "boolean"}},
            "required": ["joke", "good"],
            "additionalProperties": False,
        }
    },
    {"grammar": 'start: "(" [start] ")"'},
    {},
]


def padded(model: Any) -> Any:
    return PaddedForward(model)


@pytest.fixture(scope="module", params=[FlatForward, PagedForward, padded])
def forward(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    """One after the other, the ways through a model."""
    return request.param(copy.deepcopy(tiny_model("llama")))


def made(forward: Any, requests: list[Request], **settings: Any) -> dict[tuple[str, int], Completion]:
    return run_engine(Engine(forward, EOS, TOKENIZER.decode, TOKENIZER, **settings), requests)


def constrained(count: int = 18, **params: Any) -> list[Request]:
    """Rows of several lengths, each with one constraint of ASKED or none; some have the same prompt."""
    requests = mixed_requests()
    found = []
    for i in range(count):
        asked = GenerationParams(**{"max_new_tokens": 30, **params, **ASKED[i % len(ASKED)]})
        prompt = requests[i // 2 % len(requests)].prompt_token_ids
        found.append(Request(f"{i}", prompt, asked, constraint=grammar_of(asked)))
    return found


@functools.cache
def vocabulary() -> Any:
    return from_tokenizer(TOKENIZER, eos_token=sorted(EOS))


@torch.inference_mode()
def best_alone(model: Any, request: Request) -> tuple[tuple[int, ...], bool | None]:
    """The most probable tokens that the grammar allows, one forward pass of the row alone each; is it whole."""
    if request.constraint is None:
        return alone(model, request, EOS), None
    matcher, ids = LLMatcher(vocabulary(), request.constraint), list(request.prompt_token_ids)
    new: list[int] = []
    while len(new) < request.params.max_new_tokens:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        allowed = torch.from_numpy(np.resize(bits, len(logits))).bool()
        allowed[len(bits) :] = False
        token = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        if token in EOS:
            break
        new.append(token)
        assert matcher.consume_token(token)
    return tuple(new), matcher.is_accepting()


@pytest.mark.parametrize("max_rows", [1, 5, 64])
def test_it_is_the_most_probable_text_of_its_grammar(forward, tiny_model, max_rows):
    requests = constrained()
    done = made(forward, requests, max_rows=max_rows)
    expected = {(r.id, 0): best_alone(tiny_model("llama"), r) for r in requests}
    assert {key: (c.token_ids, c.complete) for key, c in done.items()} == expected
    assert sum(c.complete is True for c in done.values()) >= 9


def test_rows_that_differ_in_their_constraint_alone_are_not_the_same(forward):
    first = mixed_requests()[0]
    requests = []
    for i, choice in enumerate((["yes"], ["no"], ["yes"], None)):
        params = GenerationParams(max_new_tokens=8, choice=choice)
        requests.append(Request(f"{i}", first.prompt_token_ids, params, constraint=grammar_of(params)))
    done = {c.request_id: TOKENIZER.decode(c.token_ids) for c in made(forward, requests).values()}
    assert (done["0"], done["1"], done["2"]) == ("yes", "no", "yes")
    assert done["3"] not in ("yes", "no")


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.5, "n": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "temperature": 2.0, "logprobs": 2, "n": 2},
        {"n": 2, "logprobs": 3},
    ],
    ids=str,
)
def test_every_way_to_sample_keeps_to_the_grammar(forward, params):
    requests = constrained(12, max_new_tokens=24, **params)
    done = made(forward, requests, max_rows=7)
    assert len(done) == 12 * params.get("n", 1)
    for request in requests:
        for sample in range(request.params.n):
            completion = done[request.id, sample]
            assert completion.error is None
            if request.constraint is not None:
                matcher = LLMatcher(vocabulary(), request.constraint)
                assert matcher.consume_tokens(list(completion.token_ids))
                assert matcher.is_accepting() is completion.complete
                assert completion.complete or completion.finish_reason == "length"
            if "logprobs" in params:
                assert completion.logprobs is not None
                ids = [item.token_id for item in completion.logprobs]
                assert tuple(ids[: len(completion.token_ids)]) == completion.token_ids


def test_draws_do_not_depend_on_the_neighbours(forward):
    requests = constrained(12, temperature=1.0)
    together = tokens(made(forward, requests))
    assert together == tokens(made(forward, requests, max_rows=1))


def test_logprobs_are_the_models_own(forward, tiny_model):
    request = constrained(2, logprobs=1)[1]
    (done,) = made(forward, [request]).values()
    assert done.logprobs is not None
    ids = torch.tensor([request.prompt_token_ids])
    with torch.inference_mode():
        own = torch.log_softmax(tiny_model("llama")(ids).logits[0, -1], -1)
    assert done.logprobs[0].logprob == pytest.approx(float(own[done.token_ids[0]]), abs=1e-3)
    assert done.logprobs[0].top[0][0] == int(own.argmax()) != done.token_ids[0]


def test_what_is_cut_is_not_whole_and_what_could_go_on_is(forward):
    base = mixed_requests()[3]
    asked = {"cut": {"regex": "[0-9]{9}"}, "could go on": {"regex": "[0-9]+"}, "stop": {"regex": "a[b-z]{9}"}}
    requests = []
    for name, constraint in asked.items():
        params = GenerationParams(max_new_tokens=4, stop=["a"] if name == "stop" else [], **constraint)
        requests.append(Request(name, base.prompt_token_ids, params, constraint=grammar_of(params)))
    done = {c.request_id: (c.finish_reason, c.complete) for c in made(forward, requests).values()}
    assert done == {"cut": ("length", False), "could go on": ("length", True), "stop": ("stop", False)}


def test_a_grammar_that_outgrows_the_librarys_limits_gives_up_its_own_row(forward):
    params = GenerationParams(max_new_tokens=9, grammar="start: " + " ".join(['["a" ["a"]]'] * 3000))
    request = Request("big", mixed_requests()[0].prompt_token_ids, params, constraint=grammar_of(params))
    others = constrained(6)
    done = made(forward, [request, *others])
    assert (done["big", 0].error or "").startswith("its grammar cannot go on: Parser Error: ")
    alone = made(forward, others)
    assert all(done[key] == completion for key, completion in alone.items())


def test_a_row_without_a_constraint_says_nothing_of_it(forward):
    requests = [replace(r, constraint=None) for r in constrained(3)]
    assert {c.complete for c in made(forward, requests).values()} == {None}
