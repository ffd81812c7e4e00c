"""Take a row's own settings: what the engine has is used, what would change the answer and is not there is refused."""

import json
from dataclasses import replace
from typing import Any

from pipeline.common.errors import PromptError
from pipeline.common.request import CONSTRAINTS, GenerationParams
from pipeline.common.suggestions import did_you_mean
from pipeline.prompts.constraint import grammar_of, read_files

OVERRIDES: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "stop": list,
    "n": int,
    "seed": int,
    "logprobs": int,
    "ignore_eos": bool,
    "json_schema": dict,
    "regex": str,
    "choice": list,
    "grammar": str,
    "label_logprobs": bool,
}
# Where a word as "choice" may be the user's own.
_NOT_BESIDE_THE_PROMPT = ("logprobs", "label_logprobs", *CONSTRAINTS)
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_LOGPROBS = ("logprobs", "top_logprobs")  # OpenAI's: whether, and of how many
# What changes an answer and is not there, each with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "best_of": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "typical_p": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "do_sample": (),
    "num_beams": (1,),
    "add_generation_prompt": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
_KNOWN = frozenset((*OVERRIDES, *_OTHER_NAMES, *_LOGPROBS, *_REFUSED, "tools", "tool_choice"))
# What cannot matter to an answer. It stays in the row's metadata.
_NO_MATTER = (
    "model", "user", "stream", "stream_options", "store", "metadata", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "priority", "request_id",
)  # fmt: skip


class BadLine(PromptError):
    """Say what is wrong with a line, and what to do; whoever catches it knows where the line is."""


def is_setting(name: str) -> bool:
    """Say whether a field of a row says how it is continued, and not what."""
    return name in _KNOWN


def take_settings(fields: dict[str, Any], where: str, *, openai: bool = False) -> dict[str, Any]:
    """Take the generation settings out of a row, or of a request's body.

    Args:
        where: they stand, for an error: "" is the row itself.
        openai: it is a body, in which logprobs is true or false and a key without a meaning is refused.

    Raises:
        BadLine: a setting that is not there, or a key of a body that nobody knows.
    """
    if openai:
        known = (*OVERRIDES, *_OTHER_NAMES, "response_format", *_REFUSED, *_NO_MATTER)
        unknown = sorted(fields.keys() - {*known, *_LOGPROBS})
        if unknown:
            near = did_you_mean(unknown[0], known)
            raise BadLine(
                f"{where.rstrip('.')}: unknown key {show(unknown[0])}", f"{near} Correct it, or remove it."
            )
    for key, neutral in _REFUSED.items():
        if fields.get(key) is not None and fields[key] not in neutral:
            raise BadLine(f"{where}{key} is not supported, and would change the answer", "Remove it.")
    found: dict[str, Any] = {}
    for key in (*OVERRIDES, *_OTHER_NAMES):
        if key not in fields or (key in _NOT_BESIDE_THE_PROMPT and not openai):
            continue
        name, value = _OTHER_NAMES.get(key, key), fields.pop(key)
        if value is not None and name in found and found[name] != value:
            raise BadLine(f"{where}{key} says another {name}", "Keep one of them.")
        if value is not None:
            found[name] = value
    if openai:
        _take_logprobs(fields, found, where)
    asked = fields.pop("response_format", None)
    return merge_settings(found, _format(asked, f"{where}response_format"))


def _format(asked: Any, where: str) -> dict[str, Any]:
    """Turn OpenAI's response_format into a schema."""
    match asked:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
    example = '{"type": "json_schema", "json_schema": {"schema": {…}}}'
    raise BadLine(
        f"{where} is {show(asked)}", f'Write {{"type": "text"}}, {{"type": "json_object"}} or {example}.'
    )


def _take_logprobs(fields: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Turn OpenAI's two keys into ours: how many of the most probable tokens."""
    asked, top = found.pop("logprobs", False), fields.pop("top_logprobs", None)
    if not isinstance(asked, bool):
        raise BadLine(f"{where}logprobs is {json.dumps(asked)[:80]}", "Write true or false.")
    if top is not None and not asked:
        raise BadLine(f"{where}top_logprobs without logprobs", 'Add "logprobs": true.')
    if asked:
        found["logprobs"] = top or 0


def merge_settings(*several: dict[str, Any]) -> dict[str, Any]:
    """Join what is said at several places of a row; what two of them say must be the same.

    Raises:
        BadLine: it is not.
    """
    merged: dict[str, Any] = {}
    for settings in several:
        for key, value in settings.items():
            if key in merged and merged[key] != value:
                raise BadLine(
                    f"{key} is said twice, as {show(merged[key])} and {show(value)}", "Keep one of them."
                )
            merged[key] = value
    return merged


def apply_settings(params: GenerationParams, overrides: dict[str, Any]) -> GenerationParams:
    """Lay the row's own parameters over the job's. A null is no override.

    Raises:
        BadLine: no such parameter, or a value of a wrong type or outside its range.
    """
    own = {key: _override(key, value) for key, value in overrides.items() if value is not None}
    if not own:
        return params
    if own.keys() & set(CONSTRAINTS):  # the row's comes in the place of the job's
        own = {**dict.fromkeys(CONSTRAINTS), **own}
    try:
        return replace(params, **own)
    except ValueError as error:
        raise BadLine(f"generation: {clip(str(error), 300)}", "Change the value, or leave it out.") from None


def constrain(params: GenerationParams) -> tuple[GenerationParams, str | None]:
    """Read the file of a row's schema or grammar, and write its constraint for the engine.

    Raises:
        BadLine: it cannot be kept.
    """
    try:
        params = read_files(params)
        return params, grammar_of(params)
    except ValueError as error:
        raise BadLine(f"generation.{clip(str(error), 400)}", "Change it, or leave it out.") from None


def _override(key: str, value: Any) -> Any:
    kind = OVERRIDES.get(key)
    if kind is None:
        near = did_you_mean(key, OVERRIDES)
        raise BadLine(f"generation: unknown key {show(key)}", f"{near} The keys are {', '.join(OVERRIDES)}.")
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
        raise BadLine(f"generation.{key} is not a list of texts", 'Write it as ["\\n\\n"].')
    if kind is dict:
        if isinstance(value, dict | str):
            return value
        raise BadLine(
            f"generation.{key} is {clip(json.dumps(value), 80)}", "Write a schema, or the path of one."
        )
    rules: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"), int: ((int,), "a whole number"), float: ((int, float), "a number"),
        str: ((str,), "text"),
    }  # fmt: skip
    types, rule = rules[kind]
    if type(value) not in types:
        raise BadLine(f"generation.{key} is {clip(json.dumps(value), 80)}", f"Write {rule}.")
    try:
        return kind(value)
    except OverflowError:
        raise BadLine(f"generation.{key}={show(value)} is too large", "Write a smaller number.") from None


def true_or_false(value: Any, where: str) -> bool | None:
    """Read a switch that may be null.

    Raises:
        BadLine: it is neither true nor false.
    """
    if value is None or isinstance(value, bool):
        return value
    raise BadLine(f"'{where}' is {clip(json.dumps(value), 80)}", "Write true or false.")


def show(value: Any) -> str:
    """Show a value in an error message: escaped, so that it cannot drive a terminal, and short."""
    return clip(repr(value), 80)


def clip(text: str, width: int) -> str:
    """Cut a text that is too long for a message."""
    return text if len(text) <= width else f"{text[:width]}…"


def lone_surrogate(text: str) -> str | None:
    """Name the first half of a character in a text, which no tokenizer and no file takes; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):x}"
    return None
