"""Read a command's own arguments, KEY=VALUE and paths, and write what json= asks for."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.common.errors import ConfigError
from pipeline.common.suggestions import nearest

FREE_TEXTS = ("text", "messages", "system")  # may tell of addresses
_SECRET = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+@|[?&](access_)?token=", re.IGNORECASE)


def take_own(
    arguments: list[str], examples: Mapping[str, str], job_keys: Collection[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """Take a command's own KEY=VALUE arguments out.

    Args:
        examples: the command's own keys, each with a value to show in an error.
        job_keys: the keys of a job, where the command takes those too.

    Returns:
        the values of each key that was given, in order; all other arguments.

    Raises:
        ConfigError: one has no value, or is a misspelt one of them.
    """
    own: dict[str, list[str]] = {}
    others: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in examples and equals:
            if not value:
                raise ConfigError(f"{argument}: needs a value", f"As {key}={examples[key]}.")
            own.setdefault(key, []).append(value)
            continue
        near = nearest(key, [*examples, *job_keys]) if equals and key not in job_keys else None
        if near is not None and near in examples and not Path(argument).exists():
            raise ConfigError(f"{key}: no such key", f"Did you mean {near}={examples[near]}?")
        others.append(argument)
    return own, others


def refuse_secrets(arguments: Collection[str]) -> None:
    """Refuse an address with a user's name or token in it, which would be written down with the command.

    Raises:
        ConfigError: there is one; it is not shown.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in FREE_TEXTS and _SECRET.search(argument):
            raise ConfigError(
                f"{'an argument' if '://' in key else key}: an address with a password or token in it",
                "Take it out: log in with `hf auth login`, or set HF_TOKEN; whoever could read it may use it",
            )


def take_paths(arguments: list[str], examples: Mapping[str, str]) -> tuple[list[Path], dict[str, str]]:
    """Take paths and a command's own KEY=VALUE arguments apart; a key's last value wins.

    Raises:
        ConfigError: a key that is not the command's, or one without a value.
    """
    own, words = take_own(arguments, examples)
    for word in words:
        if ("=" in word or word.startswith("-")) and not Path(word).exists():
            key = word.partition("=")[0].lstrip("-")
            keys = ", ".join(f"{name}={value}" for name, value in examples.items())
            there_are = f"There are: {keys}." if keys else "Pass nothing but the folder."
            near = nearest(key, examples)
            fix = f"Did you mean {near}={examples[near]}?" if near else there_are
            raise ConfigError(f"{word}: no such key or path", fix)
    return [Path(word) for word in words], {key: values[-1] for key, values in own.items()}


def whole_number(value: str, key: str, example: str, least: int | None = None) -> int:
    """Read a whole number.

    Raises:
        ConfigError: it is none, or too small.
    """
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(f"{key}={value}: not a whole number", f"As {key}={example}.") from None
    if least is not None and number < least:
        raise ConfigError(f"{key}={value}: at least {least}", f"As {key}={example}.")
    return number


def write_json(data: dict[str, Any], path: str) -> None:
    """Write data to a file, or with - to standard output.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        found = f"json={path}: cannot be written ({error.strerror or error})"
        raise ConfigError(found, "Name a file in a folder that is there, or - for the screen.") from error
