"""Make the lines of outputs.jsonl and read them again: one a completion, one a sample of a row that failed.

A new field is an entry of `completion_row`, and of docs/output-format.md.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.common.fingerprint import row_key
from pipeline.common.request import BadRow, Completion, Label, PromptRow, TokenLogprob
from pipeline.config.schema import Config
from pipeline.prompts.answer import (
    THINK,
    Tags,
    cut_at_stop,
    decode,
    decode_with,
    opens_thinking,
    split_thinking,
)

Decode = Callable[[Sequence[int]], str]
KINDS: dict[str, Any] = {  # of the fields of a row, where it has them
    **dict.fromkeys(("id",), str),
    **dict.fromkeys(("prompt", "completion", "finish_reason", "error", "thinking"), str | None),
    **dict.fromkeys(("usage", "metadata"), dict | None),
    "complete": bool,
    "messages": list,
    "token_ids": list,
    "label_logprobs": list,
}


def completion_row(
    row: PromptRow,
    prompt_token_ids: Sequence[int],
    completion: Completion,
    tokenizer: Any,
    config: Config,
    tags: Tags = THINK,
) -> dict[str, Any]:
    """Make what is written for one completion; or for its failure, if the engine gave it up.

    Args:
        tags: around thinking, where the job keeps it apart.
    """
    if completion.error:
        return error_row(row, completion.error, completion.sample)

    def text_of(token_ids: Sequence[int]) -> str:
        return decode(tokenizer, token_ids)

    more = dict[str, Any]()
    thinking = config.generation.thinking
    text = decode_with(tokenizer, completion.token_ids, tags) if thinking else text_of(completion.token_ids)
    text = cut_at_stop(text, row.params.stop)
    if completion.labels is not None:
        text, more["label_logprobs"] = _labels(completion.labels)
    if completion.logprobs is not None:
        more["logprobs"] = _logprobs(completion.logprobs, text_of)
    if thinking:
        opened = opens_thinking(tokenizer, prompt_token_ids, tags)
        more["thinking"], text = split_thinking(text, opened=opened, tags=tags)
    if completion.complete is not None:
        more["complete"] = completion.complete
    if config.token_ids:
        more["token_ids"] = list(completion.token_ids)
    return {
        **_asked(row),
        "sample": completion.sample,
        "completion": text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": len(prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
        },
        "error": None,
        "metadata": row.metadata,
        "key": row_key(row),
        **more,
    }


def error_row(row: PromptRow | BadRow, error: str, sample: int = 0) -> dict[str, Any]:
    """Make what is written for a row that cannot be run: one line for each of its samples."""
    asked = _asked(row) if isinstance(row, PromptRow) else {"id": row.id, "index": row.index, "prompt": None}
    return {
        **asked,
        "sample": sample,
        "completion": None,
        "finish_reason": None,
        "usage": None,
        "error": error,
        "metadata": row.metadata if isinstance(row, PromptRow) else {},
        "key": row_key(row),
    }


def encode_row(row: dict[str, Any]) -> bytes:
    """Write a row as a line."""
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Read a line as `encode_row` writes it; None if it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        key, sample, index = row["key"], row["sample"], row["index"]
        whole = len(key) == 16 and int(key, 16) >= 0 and 0 <= sample < 2**32 and 0 <= index < 2**63
        whole = whole and type(sample) is type(index) is int and ("completion" in row and "error" in row)
        whole = whole and all(isinstance(row[name], kind) for name, kind in KINDS.items() if name in row)
        usage = row.get("usage") or {}
        whole = whole and all(type(count) is int and 0 <= count < 2**63 for count in usage.values())
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if whole else None


def read_rows(path: Path, damaged: Callable[[str], object] = str) -> Iterator[dict[str, Any]]:
    """Read the rows of an outputs.jsonl.

    Args:
        damaged: is told of each line that is left out, as outputs.jsonl:3.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = parse_row(line)
                if row is not None:
                    yield row
                else:
                    damaged(f"{path}:{number}")
    except FileNotFoundError:
        pass
    except OSError as error:
        damaged(f"{path}: {error.strerror or error}")


def is_error(line: bytes) -> bool:
    """Say whether a line is a row that failed, without parsing those that cannot be."""
    if b'"completion":null' not in line:
        return False
    try:
        return bool(json.loads(line)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _asked(row: PromptRow) -> dict[str, Any]:
    asked = {"messages": row.messages} if row.messages is not None else {"prompt": row.prompt}
    return {"id": row.id, "index": row.index, **asked}


def _logprobs(logprobs: Sequence[TokenLogprob], text_of: Decode) -> list[dict[str, Any]]:
    return [
        {
            "token": text_of([item.token_id]),
            "token_id": item.token_id,
            "logprob": _number(item.logprob),
            "top": [{"token": text_of([i]), "token_id": i, "logprob": _number(p)} for i, p in item.top],
        }
        for item in logprobs
    ]


def _labels(labels: Sequence[Label]) -> tuple[str, list[dict[str, Any]]]:
    """Give the most probable choice, and what is written of all."""
    likeliest = max(labels, key=lambda label: label.logprob)
    return likeliest.choice, [asdict(label) | {"logprob": _number(label.logprob)} for label in labels]


def _number(value: float) -> float | None:
    """Write the logprob of a token of probability 0 as null: JSON has no infinity."""
    return value if math.isfinite(value) else None
