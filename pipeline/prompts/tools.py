"""Read what a row says of tools: those that the model may call, and the calls of earlier answers.

They go to the chat template, and what the model answers comes back as text, calls and all.
"""

import json
from typing import Any

from pipeline.prompts.settings import BadLine, show

_CALL = '{"type": "function", "function": {"name": …, "arguments": …}}'


def take_tools(fields: dict[str, Any], where: str) -> list[Any] | None:
    """Take the tools out of a row, or of a request's body; None where there are none, or none may be called.

    Raises:
        BadLine: they are not as OpenAI has them, or one has to be called, which no prompt can promise.
    """
    tools, choice = fields.pop("tools", None), fields.pop("tool_choice", None)
    if choice not in (None, "none", "auto"):
        raise BadLine(
            f"{where}tool_choice is {show(choice)}, and the model is free to call a tool or not",
            'Write "auto" or "none". What the answer must be, json_schema, regex and choice can say.',
        )
    if tools in (None, []):
        if choice == "auto":
            raise BadLine(f"{where}tool_choice without tools", "Add tools, or remove it.")
        return None
    check_tools(tools, f"{where}tools")
    return None if choice == "none" else tools


def check_tools(tools: Any, where: str) -> None:
    """See that they are a list of functions, each with a name.

    Raises:
        BadLine: they are not.
    """
    example = 'Write [{"type": "function", "function": {"name": …, "parameters": {…}}}].'
    if not isinstance(tools, list):
        raise BadLine(f"'{where}' is no list", example)
    for i, tool in enumerate(tools):
        match tool:
            case {"type": "function", "function": {"name": str(name)}} if name.strip():
                continue
        raise BadLine(f"'{where}[{i}]' is no function with a name", example)


def calls_of(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Read the calls of an assistant's message; their arguments become objects, as templates read them.

    Raises:
        BadLine: they are not as OpenAI has them.
    """
    if message.get("function_call"):
        raise BadLine(f"{where}: function_call is not supported", f"Write tool_calls, as [{_CALL}].")
    calls = message.get("tool_calls") or []
    if calls and message["role"] != "assistant":
        raise BadLine(f"{where}: tool_calls of a {message['role']}", "Only an assistant calls tools.")
    if not isinstance(calls, list):
        raise BadLine(f"'{where}.tool_calls' is no list", f"Write [{_CALL}].")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": dict() | str() as arguments} as function} if name:
            kind = call.get("type", "function")
            if kind == "function":
                return {
                    **call,
                    "type": kind,
                    "function": {**function, "arguments": _object(arguments, where)},
                }
    raise BadLine(f"'{where}' is no call of a function", f"Write {_CALL}.")


def _object(arguments: dict[str, Any] | str, where: str) -> Any:
    try:
        value = arguments if isinstance(arguments, dict) else json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadLine(
            f"'{where}.function.arguments' is no JSON object", 'Write it as "{\\"city\\": \\"Seoul\\"}".'
        )
    return value


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the arguments of calls as JSON, for templates that join them to their text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
    }
