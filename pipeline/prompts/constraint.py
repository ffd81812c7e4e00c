"""Write what a completion is held to (a JSON schema, a regex, choices, a grammar) as one grammar for the engine."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.common.errors import ConfigError
from pipeline.common.request import GenerationParams
from pipeline.common.units import MIB
from pipeline.config.schema import Config

MAX_FILE_BYTES = MIB
# The 29th of February of leap years alone, and every other day: llguidance takes it in any year.
LEAP_DAY = (
    "^(?:[0-9]{4}-(?:0[13-9]|1[0-2])|[0-9]{4}-02-(?:[01]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
# What holds schemas in a JSON schema: one, a list of them, or some by name.
_SCHEMAS = ("items", "prefixItems", "additionalProperties", "allOf", "anyOf", "oneOf")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def job_params(config: Config) -> GenerationParams:
    """Give the parameters of every row that does not say otherwise; the file of a schema or grammar is read.

    Raises:
        ConfigError: its constraint cannot be kept.
    """
    params = config.generation.params()
    try:
        params = read_files(params)
        grammar_of(params)
    except ValueError as error:
        raise ConfigError(found=f"generation.{error}", fix="Change it, or leave it out") from None
    return params


def read_files(params: GenerationParams) -> GenerationParams:
    """Put a schema or a grammar in the place of the path of its file.

    Raises:
        ValueError: it cannot be read; the message names the key.
    """
    if isinstance(path := params.json_schema, str):
        try:
            schema = json.loads(_read(path))
        except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8
            raise ValueError(f"json_schema={path}: {_words(error)}") from None
        if not isinstance(schema, dict):
            raise ValueError(f"json_schema={path}: holds no JSON object")
        return replace(params, json_schema=schema)
    if params.grammar is not None and _is_path(params.grammar):
        try:
            return replace(params, grammar=_read(params.grammar))
        except (OSError, ValueError) as error:
            raise ValueError(f"grammar={params.grammar}: {_words(error)}") from None
    return params


def grammar_of(params: GenerationParams) -> str | None:
    """Write the constraint of these parameters as llguidance reads it; None where there is none.

    Raises:
        ValueError: it is none that llguidance can keep; the message names the key.
    """
    for name in params.constraints:
        value = getattr(params, name)
        return _grammar(name, value if isinstance(value, str) else json.dumps(value))
    return None


@lru_cache(256)  # almost all rows have the job's own
def _grammar(name: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from

    if name == "json_schema":
        grammar = _schema_grammar(text)
    elif name == "grammar":
        grammar = LLMatcher.grammar_from_lark(text)
    else:
        grammar = grammar_from("regex" if name == "regex" else "choice", text)
    if said := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"{name}: llguidance cannot keep to it: {' '.join(said.split())[:300]}")
    return grammar


def _schema_grammar(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.dumps(_with_leap_years(json.loads(text)))
        # A schema's own x-guidance must not let keywords be passed over.
        grammar: str = LLMatcher.grammar_from_json_schema(
            schema, overrides={"lenient": False, "coerce_one_of": False}
        )
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise ValueError(f"json_schema: {error}") from None
    return grammar


def _with_leap_years(schema: Any) -> Any:
    """Have dates in a schema, and in those within it, keep to the calendar."""
    if isinstance(schema, list):
        return [_with_leap_years(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _with_leap_years(value) if key in _SCHEMAS else value for key, value in schema.items()}
    for key in _NAMED_SCHEMAS:
        if isinstance(named := schema.get(key), dict):
            made[key] = {name: _with_leap_years(each) for name, each in named.items()}
    others = made.get("allOf", [])
    if schema.get("format") in ("date", "date-time") and isinstance(others, list):
        made["allOf"] = [*others, {"pattern": LEAP_DAY}]
    return made


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(0, "no such file")
    looks = Path(path).stat()
    if looks.st_size > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    return _contents(path, looks.st_size, looks.st_mtime_ns)


@lru_cache(64)
def _contents(path: str, size: int, mtime_ns: int) -> str:
    """Read a file that looks like this: many rows may name the same."""
    return Path(path).read_text(encoding="utf-8")


def _is_path(grammar: str) -> bool:
    """Say whether it is the path of a grammar and not the grammar: each of those has a rule, with a colon."""
    return ":" not in grammar or grammar.endswith(".lark")


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, line {error.lineno})"
    return str(getattr(error, "strerror", None) or error)
