"""Say in Hydra's words what was typed: dictionaries for keys that hold them, escapes in free text."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString

from pipeline.common.errors import ConfigError
from pipeline.config.base_model import with_base
from pipeline.config.schema import Config

FREE_TEXT = (
    "prompt_template",
    "system",
    "generation.stop",
    "generation.choice",
    "generation.grammar",
    "generation.thinking_tags",
    "model.chat_template",
    "model.chat_template_kwargs",
)
# Texts that need no quotes of Hydra's own.
_PLAIN = {"prompts": ("://", "?"), "prompt_template": ("{{", "{%")}
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\[ntr\\]")


def in_hydras_words(overrides: list[str]) -> list[str]:
    """Rewrite what Hydra would not take as it is meant; called once, where a command line is handed to it.

    Raises:
        ConfigError: an escape is half a character, or an adapter's base model cannot be told.
    """
    return [_rewrite(override) for override in with_base(overrides)]


def dictionary_keys(schema: Any = Config, prefix: str = "") -> Iterator[str]:
    """Name the keys that hold a dictionary, or may."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from dictionary_keys(kind, f"{prefix}{field.name}.")
        elif kind is Any or dict in (get_origin(part) for part in (kind, *getattr(kind, "__args__", ()))):
            yield prefix + field.name


_DICTIONARIES = tuple(dictionary_keys())


def _rewrite(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return override
    name = key.lstrip("+")
    if value[:1] not in ("", "[", "'", '"') and any(mark in value for mark in _PLAIN.get(name, ())):
        value = QuotedString(value, Quote.single).with_quotes()
        override = f"{key}={value}"
    if "\\" in value and _is_of(name, FREE_TEXT):
        override = _unescape(override)
    if key == name and _is_of(name, _DICTIONARIES) and (value.lstrip().startswith("{") or "." in _rest(name)):
        return f"++{override}"  # Hydra's way to say that a dictionary may get keys that it does not have
    return override


def _is_of(name: str, keys: tuple[str, ...]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _rest(name: str) -> str:
    """Return what a name has beyond the dictionary's own key, with its dot."""
    return next(name.removeprefix(key) for key in _DICTIONARIES if _is_of(name, (key,)))


def _unescape(override: str) -> str:
    parsed: Override = OverridesParser.create().parse_override(override)
    value = parsed._value
    if isinstance(value, ChoiceSweep):
        text = ",".join(_written(item) for item in value.list)
    else:
        text = _written(value)
    return f"{override.partition('=')[0]}={text}"


def _written(value: Any) -> str:
    """Write a value in Hydra's grammar, its texts in quotes and with the characters that their escapes mean."""
    match value:
        case QuotedString():
            text = _ESCAPES.sub(_character, value.text)
            return str(QuotedString(text, value.quote).with_quotes())
        case str():
            return _written(QuotedString(value, Quote.double))
        case list():
            return f"[{','.join(map(_written, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
        case None | bool():
            return json.dumps(value)
        case _:
            return str(value)


def _character(match: re.Match[str]) -> str:
    text = str(json.loads(f'"{match[0]}"'))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{match[0]}: half a character (a lone surrogate)", "Write the whole pair.")
    return text
