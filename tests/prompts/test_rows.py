"""The rows of outputs.jsonl, and where a completion ends: eos, stop strings, max_new_tokens."""

import copy
from typing import Any

import pytest
from conftest import tiny_tokenizer
from engine_runs import alone, mixed_requests, run_engine

from pipeline.common.request import BadRow, Completion, GenerationParams, PromptRow, Request, TokenLogprob
from pipeline.config.schema import Config, GenerationConfig
from pipeline.engine.engine import Engine
from pipeline.engine.rectangles.forward import FlatForward
from pipeline.job.rows import completion_row, error_row
from pipeline.prompts.answer import cut_at_stop, decode

TOKENIZER = tiny_tokenizer()


def text_of(ids: Any) -> str:
    return decode(TOKENIZER, ids)


def row(**changes: Any) -> PromptRow:
    facts: dict[str, Any] = {
        "index": 3, "id": "a", "source": "f:4", "prompt": "Hi", "messages": None, "system": None,
        "params": GenerationParams(), "metadata": {"k": 1},
    }  # fmt: skip
    return PromptRow(**{**facts, **changes})


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def model(tiny_model) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def request_(model) -> tuple[Request, str]:
    """A greedy request of 60 tokens, and its text when nothing ends it."""
    params = GenerationParams(max_new_tokens=60, ignore_eos=True)
    made = Request("a", mixed_requests()[5].prompt_token_ids, params)
    return made, text_of(alone(model, made, eos=()))


def generate(model: Any, prompt: Request, eos: frozenset[int] = frozenset(), **params: Any) -> Completion:
    asked = GenerationParams(**{"max_new_tokens": 60, **params})
    engine = Engine(FlatForward(copy.deepcopy(model)), eos, text_of)
    done = run_engine(engine, [Request(prompt.id, prompt.prompt_token_ids, asked)])
    return done[prompt.id, 0]


def stopped_text(model: Any, prompt: Request, stop: list[str]) -> tuple[Completion, str]:
    done = generate(model, prompt, stop=stop)
    params = GenerationParams(stop=stop)
    return done, completion_row(row(params=params), prompt.prompt_token_ids, done, TOKENIZER, Config())[
        "completion"
    ]


@pytest.mark.parametrize("place", range(2, 40, 3))
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_text_is_cut_exactly_where_a_stop_string_begins(model, request_, place, length):
    """Also where it spans tokens, begins inside one, or is half a token."""
    prompt, whole = request_
    stop = whole[place : place + length]
    done, text = stopped_text(model, prompt, [stop])
    assert text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"
    assert len(done.token_ids) < 60


def test_the_stop_string_that_comes_first_wins(model, request_):
    prompt, whole = request_
    late, early = whole[30:33], whole[10:13]
    assert stopped_text(model, prompt, [late, early])[1] == whole[: min(map(whole.index, (early, late)))]


def test_generation_ends_with_the_token_that_completes_the_stop_string(model, request_):
    prompt, whole = request_
    stop = whole[20:24]
    done, _ = stopped_text(model, prompt, [stop])
    assert stop in text_of(done.token_ids)
    assert stop not in text_of(done.token_ids[:-1])


def test_a_stop_string_that_never_comes_changes_nothing(model, request_):
    prompt, whole = request_
    done, text = stopped_text(model, prompt, ["this is nowhere in it"])
    assert (text, done.finish_reason, len(done.token_ids)) == (whole, "length", 60)


def test_a_stop_string_of_the_prompt_does_not_stop(model, request_):
    prompt, whole = request_
    stop = text_of(prompt.prompt_token_ids)[-4:]
    assert stop not in whole
    assert stopped_text(model, prompt, [stop])[1] == whole


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 60])
def test_max_new_tokens_is_exact(model, request_, count):
    prompt, _ = request_
    done = generate(model, prompt, max_new_tokens=count)
    assert (len(done.token_ids), done.finish_reason) == (count, "length")


def test_each_row_ends_at_its_own_eos_and_keeps_no_eos(model, request_):
    prompt, _ = request_
    whole = alone(model, prompt, eos=())
    for place in (0, 1, 7, 40):
        eos = frozenset({whole[place]})
        done = generate(model, prompt, eos)
        assert done.token_ids == whole[: whole.index(whole[place])]
        assert done.finish_reason == "stop"
        assert generate(model, prompt, eos, ignore_eos=True).token_ids == whole


def test_logprobs_come_only_when_asked_one_for_each_token(model, request_):
    prompt, _ = request_
    assert generate(model, prompt).logprobs is None
    done = generate(model, prompt, logprobs=2)
    assert done.logprobs is not None
    assert [p.token_id for p in done.logprobs] == list(done.token_ids)
    assert all(p.top[0] == (p.token_id, p.logprob) for p in done.logprobs), "greedy is the most probable"
    only_own = generate(model, prompt, logprobs=0).logprobs
    assert only_own is not None
    assert all(p.top == () for p in only_own)


def test_cut_at_stop():
    assert cut_at_stop("abcabc", ["c"]) == "ab"
    assert cut_at_stop("abcabc", ["bca", "ab"]) == ""
    assert cut_at_stop("abcabc", ["d"]) == "abcabc"
    assert cut_at_stop("abc", []) == "abc"


def test_a_completions_row_says_what_was_asked_and_what_came():
    ids = encode("학교")
    written = completion_row(row(), (1, 2, 3), Completion("a", 1, ids, "stop"), TOKENIZER, Config())
    assert written == {
        "id": "a", "index": 3, "prompt": "Hi", "sample": 1, "completion": "학교", "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": len(ids)}, "error": None, "metadata": {"k": 1},
        "key": written["key"],
    }  # fmt: skip
    assert len(written["key"]) == 16


def test_a_row_of_messages_is_written_with_its_messages():
    messages = [{"role": "user", "content": "Hi"}]
    asked = row(prompt=None, messages=messages)
    written = completion_row(asked, (1,), Completion("a", 0, encode("yes"), "length"), TOKENIZER, Config())
    assert written["messages"] == messages
    assert "prompt" not in written


def test_logprobs_are_written_with_their_texts():
    (token,) = encode("a")
    logprobs = (TokenLogprob(token, -0.5, ((token, -0.5), (token + 1, -1.5))),)
    written = completion_row(row(), (1,), Completion("a", 0, (token,), "stop", logprobs), TOKENIZER, Config())
    assert written["logprobs"] == [
        {"token": "a", "token_id": token, "logprob": -0.5, "top": [
            {"token": "a", "token_id": token, "logprob": -0.5},
            {"token": "b", "token_id": token + 1, "logprob": -1.5},
        ]}
    ]  # fmt: skip


def test_a_completion_that_was_given_up_is_an_error_row():
    written = completion_row(
        row(), (1,), Completion("a", 2, (5,), None, error="out of memory"), TOKENIZER, Config()
    )
    assert (written["completion"], written["error"], written["sample"]) == (None, "out of memory", 2)


def test_an_error_row_has_the_fields_of_any_other():
    good = completion_row(row(), (1,), Completion("a", 0, encode("yes"), "length"), TOKENIZER, Config())
    assert set(error_row(row(), "no")) == set(good)
    bad = error_row(BadRow(4, "b", "f:5", "f:5: not JSON"), "f:5: not JSON")
    assert set(bad) == set(good)
    assert (bad["id"], bad["index"], bad["error"], bad["metadata"]) == ("b", 4, "f:5: not JSON", {})


def test_thinking_is_kept_apart_and_an_error_row_has_none():
    def written(prompt: str, text: str, **more: Any) -> dict[str, Any]:
        done = Completion("a", 0, encode(text), "stop", **more)
        return completion_row(
            row(), encode(prompt), done, TOKENIZER, Config(generation=GenerationConfig(thinking=True))
        )

    closed = written("Hi", "<think>\nHm.\n</think>\n\nYes.")
    assert (closed["thinking"], closed["completion"]) == ("Hm.", "Yes.")
    opened = written("assistant\n<think>\n", "Hm. Still at it")
    assert (opened["thinking"], opened["completion"]) == ("Hm. Still at it", "")
    failed = written("Hi", "", error="out of memory")
    assert failed["completion"] is None
    assert "thinking" not in failed


def test_token_ids_are_written_when_asked():
    done = Completion("a", 0, encode("yes"), "stop")
    assert completion_row(row(), (1,), done, TOKENIZER, Config(token_ids=True))["token_ids"] == list(
        encode("yes")
    )
    assert "token_ids" not in completion_row(row(), (1,), done, TOKENIZER, Config())
