"""Check one line of a prompt file, from its bytes to fields. Where something is wrong, raise a BadLine."""

import json
import math
import re
from dataclasses import replace
from typing import Any, NoReturn

from pipeline.common.errors import PromptError
from pipeline.common.request import GenerationParams, PromptRow
from pipeline.common.suggestions import did_you_mean

MAX_DEPTH = 64  # far below what json can write again from any depth of the call stack
ROLES = ("system", "developer", "user", "assistant", "tool")

_OVERRIDES: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "stop": list,
    "n": int,
    "seed": int,
}
_OPENAI_OVERRIDES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"} | {
    key: key for key in ("temperature", "top_p", "stop", "seed", "n")
}
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadLine(PromptError):
    """Say what is wrong with a line, and what to do; whoever catches it knows where the line is."""


def to_row(
    fields: dict[str, Any], index: int, row_id: str, source: str, params: GenerationParams, prompt_field: str
) -> PromptRow:
    """Make a row of any of the three forms; the fields that are left become its metadata.

    Raises:
        BadLine: a field is missing, is of a wrong type, or is outside its range.
    """
    system = _system(fields)
    overrides = _generation(fields)
    prompt = messages = None
    match _form(fields, prompt_field):
        case "prompt":
            prompt = _prompt(fields.pop(prompt_field), prompt_field)
        case "messages":
            messages = _messages(fields.pop("messages"))
        case "openai":
            messages, of_body = _openai(fields)
            overrides = overrides | of_body
    if system is not None and messages and messages[0]["role"] == "system":
        raise BadLine("has both 'system' and a system message", "Keep one of them.")
    return PromptRow(index, row_id, source, prompt, messages, system, _params(params, overrides), fields)


def parse_line(line: bytes) -> dict[str, Any]:
    """Read the JSON object that a line holds.

    Raises:
        BadLine: it holds none that could be written again as JSON in UTF-8.
    """
    if b"\0" in line:
        raise BadLine(
            "holds NUL bytes", "Save the file as UTF-8 text (not UTF-16), or restore it from a copy."
        )
    try:
        text = line.decode()
        value = json.loads(text, parse_constant=_reject_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start + 1}", "Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg}, column {error.pos + 1})", "Write one object a line.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # json leaves the interpreter's own limit on digits to the caller
        raise BadLine("a number has thousands of digits", "Put it in quotes.") from None
    if not isinstance(value, dict):
        raise BadLine(f"is {_kind(value)}, not an object", 'Write {"prompt": …}.')
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if _ESCAPED_SURROGATE.search(text):
        _reject_lone_surrogates(value)
    return value


def _too_deep() -> BadLine:
    return BadLine(
        f"is nested deeper than {MAX_DEPTH} levels", "Flatten it, or put the inner part in quotes."
    )


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
    return depth


def _reject_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):x}"
        raise BadLine(f"{code} is half a character (a lone surrogate)", "Write the whole pair.") from None


def _reject_constant(text: str) -> NoReturn:
    raise BadLine(f"{text} is not a JSON value", "Write a number, or null.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadLine(f"the number {show(text)} is too large", "Write a smaller one, or put it in quotes.")
    return value


def pop_id(fields: dict[str, Any]) -> str | None:
    """Take the id that a row brings out of its fields; None if it brings none."""
    own = fields.pop("id", None)
    if own is None and "body" in fields:
        own = fields.pop("custom_id", None)
    if own is None:
        return None
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise BadLine(f"'id' is {_kind(own)}", "Write text or a whole number.")
    if own == "":
        raise BadLine("'id' is empty", "Give the row an id, or leave the field out.")
    return str(own)


def _form(fields: dict[str, Any], prompt_field: str) -> str:
    """Tell the three row forms apart: "prompt", "messages" or "openai"."""
    if prompt_field in fields:
        if prompt_field == "prompt" and "messages" in fields:
            raise BadLine(
                "has both 'prompt' and 'messages'", "Keep one, or pass prompt_field=<another name>."
            )
        return "prompt"
    if "messages" in fields:
        return "messages"
    if "body" in fields:
        return "openai"
    raise BadLine(
        f"no '{prompt_field}' or 'messages'; this row has {show(sorted(fields))}",
        "Rename the field, or pass prompt_field=<one of these>.",
    )


def _prompt(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text.strip():
        raise BadLine(f"'{where}' is empty", "Write a prompt, or remove the row.")
    return text


def _system(fields: dict[str, Any]) -> str | None:
    value = fields.pop("system", None)
    return None if value is None else _text(value, "system")


def _generation(fields: dict[str, Any]) -> dict[str, Any]:
    value = fields.pop("generation", None)
    return {} if value is None else _object(value, "generation")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise BadLine(f"'messages' is {_kind(value)}", "Write a list of {role, content} objects.")
    if not value:
        raise BadLine("'messages' is empty", "Add a user message, or remove the row.")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    message = _object(value, where)
    role = message.get("role")
    if role not in ROLES:
        near = did_you_mean(str(role), ROLES)
        raise BadLine(f"{where}: unknown role {show(role)}", f"{near} The roles are {', '.join(ROLES)}.")
    if message.get("tool_calls") or message.get("function_call"):
        raise BadLine(f"{where}: tool calls are not supported", "Write the call as text in 'content'.")
    content = _text(message.get("content"), f"{where}.content")
    if role == "user" and not content.strip():
        raise BadLine(f"{where}.content is empty", "Write the user's message, or remove it.")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text(value: Any, where: str) -> str:
    """Read text, or OpenAI's list of content parts, as long as all of them are text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadLine(f"'{where}' is {_kind(value)}, not text", "Write text, in quotes.")
    for i, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise BadLine(
                f'\'{where}[{i}]\' is not {{"type": "text", "text": …}}', "Only text parts can be run."
            )
    return "".join(part["text"] for part in value)


def _openai(fields: dict[str, Any]) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Take messages and overrides out of an OpenAI batch line; what they leave of `body` stays in `fields`."""
    body = _object(fields["body"], "body")
    if "messages" not in body:
        raise BadLine(
            f"'body' has no 'messages', only {show(sorted(body))}", "Write a chat completion request."
        )
    messages = _messages(body.pop("messages"))
    given = [(new, body.pop(old, None)) for old, new in _OPENAI_OVERRIDES.items()]
    if not body:
        del fields["body"]
    return messages, {key: value for key, value in given if value is not None}


def _params(params: GenerationParams, overrides: dict[str, Any]) -> GenerationParams:
    """Lay the row's own parameters over the job's. A null is no override."""
    own = {key: _override(key, value) for key, value in overrides.items() if value is not None}
    if not own:
        return params
    try:
        return replace(params, **own)
    except ValueError as error:
        raise BadLine(f"generation: {_clip(str(error), 300)}", "Change the value, or leave it out.") from None


def _override(key: str, value: Any) -> Any:
    kind = _OVERRIDES.get(key)
    if kind is None:
        near = did_you_mean(key, _OVERRIDES)
        raise BadLine(f"generation: unknown key {show(key)}", f"{near} The keys are {', '.join(_OVERRIDES)}.")
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
        raise BadLine(f"generation.{key} is not a list of texts", 'Write it as ["\\n\\n"].')
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        rule = "a whole number" if kind is int else "a number"
        raise BadLine(f"generation.{key} is {_clip(json.dumps(value), 80)}", f"Write {rule}.")
    try:
        return kind(value)
    except OverflowError:
        raise BadLine(f"generation.{key}={show(value)} is too large", "Write a smaller number.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadLine(f"'{where}' is {_kind(value)}, not an object", "Write it in braces.")
    return value


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def show(value: Any) -> str:
    """Show a value in an error message: escaped, so that it cannot drive a terminal, and short."""
    return _clip(repr(value), 80)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]}…"
