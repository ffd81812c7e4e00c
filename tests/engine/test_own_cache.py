"""Recurrent, hybrid and sparse models, in the cache that they make for themselves: all that the engine promises."""

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from engine.test_every_architecture import build
from engine.test_out_of_memory import OUT_OF_MEMORY, Full, on_calls
from engine_runs import EOS, alone, mixed_requests, run, run_engine, shuffled, tokens

from pipeline.common.request import GenerationParams, Request
from pipeline.engine.engine import Engine
from pipeline.engine.rectangles.own_cache import CacheForward
from pipeline.prompts.constraint import grammar_of

# None of the sparse ones: among scores of random weights there are ties, of which transformers' own `generate` takes
# others with a cache than without.
KINDS = ["bamba", "falcon_mamba", "lfm3", "qwen3_next"]
pytestmark = pytest.mark.filterwarnings("ignore")

model_of = cache(build)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


class Scarce(CacheForward):
    """The real forward pass; memory runs out where `full` says so, before or after the work is done."""

    def __init__(self, model: Any, full: Full, late: bool) -> None:
        super().__init__(model)
        self._full, self._late = full, late
        self.failures = 0

    def prefill(self, rows: Any, prefix: Any, max_tokens: int) -> Any:
        return self._guarded("prefill", rows, lambda: super(Scarce, self).prefill(rows, prefix, max_tokens))

    def decode(self, rectangles: Any) -> Any:
        rows = [sample for group in rectangles for sample in group.rows]
        return self._guarded("decode", rows, lambda: super(Scarce, self).decode(rectangles))

    def _guarded(self, kind: str, rows: Any, work: Any) -> Any:
        full = self._full(kind, rows)
        result = work() if self._late or not full else None
        if full:
            self.failures += 1
            raise OUT_OF_MEMORY
        return result


def pairs() -> list[Request]:
    """Requests of which some are of equal length, so that there are groups of more than one row."""
    made = mixed_requests()[:6]
    return made + [
        Request(f"{r.id}+", (*r.prompt_token_ids[:-1], 61 + i), r.params) for i, r in enumerate(made)
    ]


@pytest.mark.parametrize("late", [False, True], ids=["before the work", "after it"])
def test_running_out_of_memory_loses_no_token(model, late):
    scarce = Scarce(model, on_calls(1, 6, 12), late)
    engine, requests = Engine(scarce, EOS, max_rows=8), pairs()
    done = tokens(run_engine(engine, requests))
    assert scarce.failures == engine.stats.out_of_memory == 3
    assert done == {(r.id, 0): alone(model, r) for r in requests}


def test_a_stop_string_ends_a_row_and_no_other(model):
    decode = tiny_tokenizer().decode
    requests = [r for r in pairs() if len(alone(model, r)) > 4]
    whole = {r.id: decode(alone(model, r)) for r in requests}
    stops = {id: text[2:4] for id, text in whole.items()}
    stopped = [
        Request(
            r.id,
            r.prompt_token_ids,
            GenerationParams(max_new_tokens=r.params.max_new_tokens, stop=[stops[r.id]] if i % 2 else []),
        )
        for i, r in enumerate(requests)
    ]
    done = tokens(run_engine(Engine(CacheForward(model), EOS, decode, max_rows=8), stopped))
    for i, request in enumerate(stopped):
        text = decode(done[request.id, 0])
        if i % 2:
            assert stops[request.id] in text
            assert whole[request.id].startswith(text)
        else:
            assert text == whole[request.id]


def test_logprobs_are_those_of_a_pass_over_the_whole_row(model):
    params = GenerationParams(max_new_tokens=6, logprobs=3, ignore_eos=True)
    requests = [Request(r.id, r.prompt_token_ids, params) for r in pairs()[:4]]
    for (id, _), completion in run(CacheForward(model), requests).items():
        prompt = next(r.prompt_token_ids for r in requests if r.id == id)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
        right = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        assert completion.logprobs is not None
        for step, (token, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            assert (found.token_id, len(found.top)) == (token, 3)
            assert math.isclose(found.logprob, right[step, token], abs_tol=1e-3)


def test_samples_share_one_prefill_and_depend_on_nothing_beside_them(model):
    params = GenerationParams(max_new_tokens=12, temperature=1.0, n=3, seed=4, ignore_eos=True)
    requests = [Request(r.id, r.prompt_token_ids, params) for r in pairs()[:4]]
    engine = Engine(CacheForward(model), EOS)
    whole = tokens(run_engine(engine, requests))
    assert engine.stats.prefill_tokens == sum(len(r.prompt_token_ids) for r in requests)
    assert len({whole["r0", sample] for sample in range(3)}) == 3
    assert tokens(run(CacheForward(model), shuffled(requests, 1), max_rows=2)) == whole


def test_a_constraint_holds(model):
    params = GenerationParams(max_new_tokens=30, regex="[a-z]{6}-[0-9]{3}")
    requests = [Request(r.id, r.prompt_token_ids, params, constraint=grammar_of(params)) for r in pairs()[:4]]
    done = tokens(run_engine(Engine(CacheForward(model), EOS, tokenizer=tiny_tokenizer()), requests))
    for made in done.values():
        assert re.fullmatch(params.regex or "", tiny_tokenizer().decode(made))
