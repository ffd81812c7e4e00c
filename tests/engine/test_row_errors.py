"""A row that the model cannot compute is that row's error, and no other's."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_runs import EOS, alone, mixed_requests, run, run_engine, shuffled, tokens

from pipeline.common.errors import JobError
from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.paged.forward import PagedForward
from pipeline.engine.rectangles.forward import FlatForward, PaddedForward
from pipeline.engine.sampling import NONE, argmax, choose
from pipeline.engine.scheduler import Sample

WAYS = [FlatForward, PaddedForward, PagedForward]
Build = Callable[[Any], Any]


def poisoned(model: Any, token: int) -> Any:
    """The same model, in which a row gives no numbers from this token on."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.embed_tokens.weight[token] = float("nan")
    return changed


def meets(model: Any, requests: list[Request]) -> tuple[int, set[str]]:
    """Find a token that some rows make on their way, and which; no prompt has it."""
    prompts = {id for r in requests for id in r.prompt_token_ids}
    made = {r.id: alone(model, r) for r in requests}
    for ids in made.values():
        for token in ids[3:-1]:
            rows = {id for id, ids in made.items() if token in ids[:-1]}
            if token not in prompts and len(rows) < len(made) / 2:
                return token, rows
    raise AssertionError("no such token")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_rows", [3, 16])
def test_a_row_whose_logits_stop_being_numbers_is_an_error_and_the_others_run_on(tiny_model, way, max_rows):
    model, requests = tiny_model("llama"), mixed_requests()
    token, bad = meets(model, requests)
    done = run(way(poisoned(model, token)), shuffled(requests, 1), max_rows=max_rows)
    for request in requests:
        completion, whole = done[request.id, 0], alone(model, request)
        if request.id in bad:
            assert "not finite" in str(completion.error)
            assert completion.finish_reason is None
            assert completion.token_ids == whole[: whole.index(token) + 1]
        else:
            assert (completion.error, completion.token_ids) == (None, whole)
    assert bad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"logprobs": 2},
        {"temperature": 0.7, "n": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logprobs": 1},
        {"repetition_penalty": 1.2},
    ],
)
def test_it_is_an_error_whichever_way_the_token_is_chosen(tiny_model, way, params):
    requests = mixed_requests(params)[:6]
    clean = run(way(copy.deepcopy(tiny_model("llama"))), requests)
    last = requests[3]
    requests[3] = Request(last.id, (*last.prompt_token_ids[:-1], 299), last.params)
    assert not any(299 in r.prompt_token_ids for r in requests if r.id != last.id)
    done = run(way(poisoned(tiny_model("llama"), 299)), requests, max_rows=4)
    assert done.keys() == clean.keys()
    for key, completion in done.items():
        if key[0] == last.id:
            assert ("not finite" in str(completion.error), completion.token_ids) == (True, ())
        elif 299 not in clean[key].token_ids:
            assert (completion.error, completion.token_ids) == (None, clean[key].token_ids)
            assert all(math.isfinite(made.logprob) for made in completion.logprobs or ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [256, 300])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_of_no_number_is_none(dtype, vocabulary, value):
    scores = torch.randn(4, vocabulary).to(dtype)
    scores[1] = value
    scores[2] = float("-inf")
    scores[3, :-1] = float("-inf")  # as a model says that it never makes these
    assert argmax(scores)[[1, 2]].tolist() == [NONE, NONE]
    assert argmax(scores)[[0, 3]].tolist() == scores.float().argmax(-1)[[0, 3]].tolist()
    for params in (
        GenerationParams(),
        GenerationParams(temperature=1.0),
        GenerationParams(temperature=1, top_k=5),
    ):
        samples = [Sample(Request(str(i), (1,), params), 0) for i in range(4)]
        chosen = choose(scores, samples, [0] * 4).tolist()
        assert [token == NONE for token in chosen] == [False, True, True, False]
        assert chosen[3] == vocabulary - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_rows", [1, 4, 32])
def test_an_id_that_the_model_has_no_embedding_of_is_that_row_s_error(tiny_model, way, max_rows):
    model, requests = tiny_model("llama"), mixed_requests()
    assert model.get_input_embeddings().weight.shape[0] == 300
    bad = Request("bad", (*requests[5].prompt_token_ids, 300), GenerationParams(max_new_tokens=5))
    done = run(way(copy.deepcopy(model)), [*requests[:5], bad, *requests[5:]], max_rows=max_rows)
    failed = done.pop(("bad", 0))
    assert failed.error == "the model cannot compute this row: index out of range in self"
    assert (failed.token_ids, failed.finish_reason) == ((), None)
    assert tokens(done) == {(r.id, 0): alone(model, r) for r in requests}


@pytest.mark.parametrize("way", WAYS)
def test_where_no_row_can_be_computed_the_job_stops_and_says_why(tiny_model, way):
    requests = [Request(str(i), (300, *range(60, 80), i), GenerationParams()) for i in range(100, 104)]
    engine = Engine(way(copy.deepcopy(tiny_model("llama"))), EOS)
    with pytest.raises(JobError, match="cannot compute any of the 4 rows in flight: index out of range"):
        run_engine(engine, requests)


class Flaky(FlatForward):
    """A way that fails once, whatever rows there are."""

    failed = False

    def decode(self, rectangles: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise RuntimeError("a failure of nobody's making")
        return super().decode(rectangles)


def test_a_failure_that_is_of_no_row_ends_the_job_as_it_is(tiny_model):
    with pytest.raises(RuntimeError, match="nobody's making"):
        run(Flaky(copy.deepcopy(tiny_model("llama"))), mixed_requests())
