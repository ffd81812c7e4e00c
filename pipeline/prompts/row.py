"""Check one line of a prompt file, from its bytes to fields. Where something is wrong, raise a BadLine."""

import json
import math
import re
from typing import Any, NoReturn

from pipeline.common.request import GenerationParams, PromptRow
from pipeline.common.suggestions import did_you_mean
from pipeline.prompts.settings import (
    BadLine,
    apply_settings,
    constrain,
    lone_surrogate,
    merge_settings,
    show,
    take_settings,
    true_or_false,
)
from pipeline.prompts.tools import calls_of, check_tools, take_tools

MAX_DEPTH = 64  # far below what json can write again from any depth of the call stack
ROLES = ("system", "developer", "user", "assistant", "tool")

_NOTHING: tuple[Any, ...] = (None, [], {})
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def to_row(
    fields: dict[str, Any], index: int, row_id: str, source: str, params: GenerationParams, prompt_field: str
) -> PromptRow:
    """Make a row of any of the three forms; the fields that are left become its metadata.

    Raises:
        BadLine: a field is missing, is of a wrong type, or is outside its range.
    """
    system = _system(fields)
    prompt = messages = None
    settings = [_optional_object(fields, "generation")]
    switches = [_switches(fields, "")]
    match _form(fields, prompt_field):
        case "prompt":
            prompt = _prompt(fields.pop(prompt_field), prompt_field)
        case "messages":
            messages = _messages(fields.pop("messages"))
        case "openai":
            body = _body(fields)
            messages = _messages(body.pop("messages"))
            switches.append(_switches(body, "body."))
            settings.append(take_settings(body, "body.", openai=True))
            if not body:
                del fields["body"]
    settings.append(take_settings(fields, ""))
    if system is not None and messages and messages[0]["role"] == "system":
        raise BadLine("has both 'system' and a system message", "Keep one of them.")
    own, constraint = constrain(apply_settings(params, merge_settings(*settings)))
    more = merge_settings(*switches)
    return PromptRow(
        index, row_id, source, prompt, messages, system, own, fields, constraint=constraint, **more
    )


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
    if half := lone_surrogate(json.dumps(value, ensure_ascii=False)):
        raise BadLine(f"{half} is half a character (a lone surrogate)", "Write the whole pair.")


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


def _optional_object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.pop(name, None)
    return {} if value is None else _object(value, name)


def _switches(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Take what is said to the chat template."""
    go_on = true_or_false(fields.pop("continue_final_message", None), "continue_final_message")
    if go_on and fields.get("add_generation_prompt") is False:
        del fields["add_generation_prompt"]  # as other tools want it said
    kwargs = _optional_object(fields, "chat_template_kwargs")
    if kwargs.get("tools") is not None:
        check_tools(kwargs["tools"], f"{where}chat_template_kwargs.tools")
    if tools := take_tools(fields, where):
        kwargs = merge_settings(kwargs, {"tools": tools})
    given = {"template_kwargs": kwargs or None, "continue_final_message": go_on}
    return {key: value for key, value in given.items() if value is not None}


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadLine(f"'messages' is {_kind(value)}", "Write a list of {role, content} objects.")
    if not value:
        raise BadLine("'messages' is empty", "Add a user message, or remove the row.")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    message = _object(value, where)
    role = message.get("role")
    if role not in ROLES:
        near = did_you_mean(str(role), ROLES)
        raise BadLine(f"{where}: unknown role {show(role)}", f"{near} The roles are {', '.join(ROLES)}.")
    calls = calls_of(message, where)
    silent = calls and message.get("content") is None
    content = "" if silent else _text(message.get("content"), f"{where}.content")
    if role == "user" and not content.strip():
        raise BadLine(f"{where}.content is empty", "Write the user's message, or remove it.")
    said = {"role": "system" if role == "developer" else role, "content": content}
    return said | _more_of(message, where) | ({"tool_calls": calls} if calls else {})


def _more_of(message: dict[str, Any], where: str) -> dict[str, str]:
    """Read what else a message says as text, for the template: a name, earlier reasoning."""
    more = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", "function_call") and value not in _NOTHING
    }
    for key, value in more.items():
        if not isinstance(value, str):
            raise BadLine(f"{where}.{key} is {_kind(value)}, not text", "Write it as text, or remove it.")
    return more


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


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    """Read an OpenAI batch line's request; what is left of it stays in `fields`."""
    body = _object(fields["body"], "body")
    if "messages" not in body:
        raise BadLine(
            f"'body' has no 'messages', only {show(sorted(body))}", "Write a chat completion request."
        )
    return body


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadLine(f"'{where}' is {_kind(value)}, not an object", "Write it in braces.")
    return value


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
