"""Dates in a JSON schema: a completion holds only those that a calendar has."""

import json
from typing import Any

import pytest
from conftest import tiny_tokenizer
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from pipeline.common.request import GenerationParams
from pipeline.prompts.constraint import grammar_of

DATE = {"type": "string", "format": "date"}


def takes(schema: dict[str, Any], value: Any) -> bool:
    """Say whether the grammar of a schema takes a value, token by token."""
    tokenizer = tiny_tokenizer()
    grammar = grammar_of(GenerationParams(max_new_tokens=9, json_schema=schema))
    matcher = LLMatcher(from_tokenizer(tokenizer), grammar, log_level=0)
    ids = tokenizer(json.dumps(value), add_special_tokens=False).input_ids
    return all(matcher.consume_token(token) for token in ids) and bool(matcher.is_accepting())


@pytest.mark.parametrize(
    "day", ["2024-02-29", "2000-02-29", "2023-02-28", "2023-02-19", "2023-12-31", "2023-01-30", "2023-10-01"]
)
def test_a_date_of_the_calendar_is_one(day):
    assert takes(DATE, day)
    assert takes({**DATE, "format": "date-time"}, f"{day}T10:00:00Z")


@pytest.mark.parametrize("day", ["2023-02-29", "3041-02-29", "1900-02-29", "2024-02-30"])
def test_a_date_that_no_calendar_has_is_none_wherever_a_schema_asks_for_one(day):
    assert not takes(DATE, day)
    assert not takes({**DATE, "format": "date-time"}, f"{day}T10:00:00Z")
    assert not takes({**DATE, "pattern": "^[0-9]"}, day)
    assert not takes({"anyOf": [DATE, {"type": "null"}]}, day)
    assert not takes({"type": "array", "items": {"$ref": "#/$defs/day"}, "$defs": {"day": DATE}}, [day])
    assert takes({"enum": [day]}, day)
    named = {"type": "object", "properties": {"format": {"const": day}}, "required": ["format"]}
    assert takes({**named, "additionalProperties": False}, {"format": day})


@pytest.mark.parametrize("depth", [300, 600])
def test_a_schema_within_schemas_without_end_is_refused_by_name(depth):
    schema: dict[str, Any] = DATE
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match=r"^json_schema: .*recursion"):
        grammar_of(GenerationParams(max_new_tokens=9, json_schema=schema))
