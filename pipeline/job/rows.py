"""The rows of outputs.jsonl: one for each completion, one for each row that failed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.common.fingerprint import row_key
from pipeline.common.request import BadRow, Completion, PromptRow, TokenLogprob
from pipeline.prompts.chat import opens_thinking, split_thinking

Decode = Callable[[Sequence[int]], str]


def completion_row(
    row: PromptRow, prompt_token_ids: Sequence[int], completion: Completion, decode: Decode
) -> dict[str, Any]:
    """What is written for one completion; or for its failure, if the engine gave it up."""
    if completion.error:
        return error_row(row, completion.error, completion.sample)
    text = cut_at_stop(decode(completion.token_ids), row.params.stop)
    return {
        **_head(row),
        "sample": completion.sample,
        "completion": text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": len(prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
        },
        "error": None,
        "metadata": row.metadata,
        **({} if completion.logprobs is None else {"logprobs": _logprobs(completion.logprobs, decode)}),
        "key": row_key(row),
    }


def part_thinking(written: dict[str, Any], tokenizer: Any, prompt_token_ids: Sequence[int]) -> None:
    """Move a completion's thinking text to a field of its own."""
    if written["completion"] is not None:
        opened = opens_thinking(tokenizer, prompt_token_ids)
        written["thinking"], written["completion"] = split_thinking(written["completion"], opened=opened)


def error_row(row: PromptRow | BadRow, error: str, sample: int = 0) -> dict[str, Any]:
    """What is written for a row that cannot be run: one for each of its samples."""
    head = _head(row) if isinstance(row, PromptRow) else {"id": row.id, "index": row.index, "prompt": None}
    return {
        **head,
        "sample": sample,
        "completion": None,
        "finish_reason": None,
        "usage": None,
        "error": error,
        "metadata": row.metadata if isinstance(row, PromptRow) else {},
        "key": row_key(row),
    }


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(found)] if found else text


def _head(row: PromptRow) -> dict[str, Any]:
    asked = {"messages": row.messages} if row.messages is not None else {"prompt": row.prompt}
    return {"id": row.id, "index": row.index, **asked}


def _logprobs(logprobs: Sequence[TokenLogprob], decode: Decode) -> list[dict[str, Any]]:
    return [
        {
            "token": decode([item.token_id]),
            "token_id": item.token_id,
            "logprob": _number(item.logprob),
            "top": [{"token": decode([i]), "token_id": i, "logprob": _number(p)} for i, p in item.top],
        }
        for item in logprobs
    ]


def _number(value: float) -> float | None:
    """JSON has no infinity: the logprob of a token of probability 0 is null."""
    return value if math.isfinite(value) else None
