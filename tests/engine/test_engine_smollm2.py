"""The real SmolLM2 in float32: the engine's greedy text is that of each prompt alone, token for token."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_runs import alone, run_engine, shuffled, tokens

from pipeline.common.request import GenerationParams, PromptRow, Request
from pipeline.config.schema import Config
from pipeline.engine.engine import Engine
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.prompts.answer import decode
from pipeline.prompts.chat import eos_token_ids, prepare_chat, render
from pipeline.prompts.reader import read_prompts

JOBS = Path(__file__).resolve().parents[2] / "jobs"


@pytest.fixture(scope="module")
def eos(smollm2: tuple[Any, Any]) -> frozenset[int]:
    return eos_token_ids(smollm2[0].generation_config, smollm2[1])


@pytest.fixture(scope="module")
def requests(smollm2: tuple[Any, Any]) -> list[Request]:
    """Every prompt of both files through the chat template, 6 to 18 new tokens."""
    chat = prepare_chat(smollm2[1], Config())
    made: list[Request] = []
    for file in ("jokes.jsonl", "multilingual.jsonl"):
        for row in read_prompts(str(JOBS / file), GenerationParams()):
            assert isinstance(row, PromptRow)
            params = GenerationParams(max_new_tokens=6 + 6 * (len(made) % 3))
            made.append(Request(f"{file}:{row.id}", tuple(render(row, chat)), params))
    return made


@pytest.fixture(scope="module")
def expected(
    smollm2: tuple[Any, Any], requests: list[Request], eos: frozenset[int]
) -> dict[str, tuple[int, ...]]:
    return {r.id: alone(smollm2[0], r, eos) for r in requests}


@pytest.fixture(scope="module")
def forward(smollm2: tuple[Any, Any]) -> FlatForward:
    return FlatForward(copy.deepcopy(smollm2[0]))


@pytest.mark.parametrize(("max_rows", "prefill_tokens"), [(3, 2048), (8, 32), (64, 2048)])
def test_text_is_that_of_each_prompt_alone(
    smollm2, forward, requests, expected, eos, max_rows, prefill_tokens
):
    engine = Engine(
        forward, eos, partial(decode, smollm2[1]), max_rows=max_rows, prefill_tokens=prefill_tokens
    )
    done = tokens(run_engine(engine, shuffled(requests, max_rows)))
    assert done == {(id, 0): ids for id, ids in expected.items()}


def test_text_is_the_same_with_the_system_prompt_computed_once(forward, requests, expected, eos):
    starts = Counter(r.prompt_token_ids[:16] for r in requests)
    (start, count), *_ = starts.most_common()
    some = [r for r in requests if r.prompt_token_ids[:16] == start]
    engine = Engine(forward, eos)
    done = tokens(run_engine(engine, some))
    assert done == {(r.id, 0): expected[r.id] for r in some}
    assert engine.stats.prefill_tokens <= sum(len(r.prompt_token_ids) for r in some) - 16 * (count - 1)
    assert count > 8


def test_text_is_that_of_each_prompt_alone_one_by_one(forward, requests, expected, eos):
    some = requests[::4]
    done = tokens(run_engine(Engine(forward, eos, max_rows=1), some))
    assert done == {(r.id, 0): expected[r.id] for r in some}


def test_a_stop_string_ends_the_real_text_where_it_begins(smollm2, forward, requests, expected, eos):
    request = requests[-1]
    whole = decode(smollm2[1], expected[request.id])
    stop = whole[5:9]
    params = GenerationParams(max_new_tokens=request.params.max_new_tokens, stop=[stop])
    engine = Engine(forward, eos, partial(decode, smollm2[1]))
    done = run_engine(engine, [Request("a", request.prompt_token_ids, params)])["a", 0]
    assert done.finish_reason == "stop"
    assert done.token_ids == expected[request.id][: len(done.token_ids)]
    assert stop in decode(smollm2[1], done.token_ids)
