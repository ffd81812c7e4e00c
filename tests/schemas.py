"""Two hundred JSON schemas over what people use, made from a few tables."""

from itertools import product
from typing import Any

Schema = dict[str, Any]

TEXTS: list[Schema] = [
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 12},
    {"type": "string", "maxLength": 5},
    {"type": "string", "pattern": "^[a-z]{2,8}$"},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": r"^\d{1,3}(\.\d{1,3}){3}$"},
    {"type": "string", "enum": ["red", "green", "blue"]},
    {"type": "string", "enum": ["빨강", "초록", "파랑"]},
    {"type": "string", "enum": ["naïve", "café \"au\" lait", "a\\b", "😀"]},
    {"const": "yes"},
    {"const": "학교"},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "email", "uuid", "ipv4")),
]  # fmt: skip
NUMBERS: list[Schema] = [
    {"type": "integer"},
    {"type": "integer", "minimum": 0, "maximum": 100},
    {"type": "integer", "minimum": -5},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "minimum": -1.5, "maximum": 2.5},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 99.9},
    {"enum": [1, 2, 3]},
    {"const": 42},
    {"enum": [0.5, 1.5]},
]
OTHERS: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 6},
    {"type": ["integer", "boolean"]},
    {"enum": ["a", 1, None, True]},
    {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
    {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "number", "minimum": 0, "maximum": 9}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 7}]},
    {"const": None},
    {"const": {"a": [1, 2]}},
]
SCALARS = TEXTS + NUMBERS + OTHERS


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    needed = list(properties) if required is None else required
    return {
        "type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more,
    }  # fmt: skip


def _lists() -> list[Schema]:
    bounds: list[Schema] = [{"maxItems": 2}, {"minItems": 1, "maxItems": 3}, {"minItems": 2, "maxItems": 2}]
    short = [TEXTS[2], TEXTS[6], NUMBERS[1], NUMBERS[9], OTHERS[0], OTHERS[5]]
    made = [{"type": "array", "items": item, **bound} for item, bound in product(short, bounds)]
    made += [{"type": "array", "items": item, "minItems": 1, "maxItems": 1} for item in TEXTS]
    made += [
        {"type": "array", "prefixItems": [NUMBERS[1], TEXTS[6]], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [TEXTS[6], OTHERS[0]], "items": NUMBERS[9], "minItems": 2, "maxItems": 3},
        {"type": "array", "items": {"type": "array", "items": NUMBERS[9], "maxItems": 2}, "maxItems": 2},
    ]  # fmt: skip
    return made


def _objects() -> list[Schema]:
    names = ["name", "a b", "나이", "x-1", 'quote"d', "__proto__"]
    made = [_object({name: item}) for name, item in zip(names * 9, SCALARS, strict=False)]
    made += [_object({"first": a, "second": b}) for a, b in zip(TEXTS, NUMBERS, strict=False)]
    made += [_object({"must": a, "may": b}, ["must"]) for a, b in zip(NUMBERS, TEXTS[6:], strict=False)]
    made += [_object({"may": a, "might": b}, []) for a, b in zip(OTHERS[:8], TEXTS[6:], strict=False)]
    threes = zip(TEXTS[::-1], NUMBERS * 2, OTHERS * 2, strict=False)
    made += [_object({"a": a, "b": b, "c": c}, ["a", "c"], title="three") for a, b, c in threes]
    made += [
        {"type": "object", "additionalProperties": item, "maxProperties": 2} for item in (NUMBERS[1], OTHERS[0])
    ]  # fmt: skip
    made += [{"type": "object", "properties": {"a": NUMBERS[9]}, "required": ["a"]}, {"type": "object"}]
    made += [
        {"type": "object", "patternProperties": {"^k[0-9]$": OTHERS[0]}, "additionalProperties": False},
        {"type": "object", "properties": {"b": OTHERS[0]}, "additionalProperties": NUMBERS[9], "required": ["b"]},
    ]  # fmt: skip
    return made


def _nested() -> list[Schema]:
    inner = [_object({"id": NUMBERS[1], "tag": item}) for item in (TEXTS[2], TEXTS[6], OTHERS[0], OTHERS[5])]
    made = [_object({"outer": item, "ok": OTHERS[0]}) for item in inner]
    made += [_object({"items": {"type": "array", "items": item, "maxItems": 2}}) for item in inner]
    made += [{"type": "array", "items": item, "minItems": 1, "maxItems": 2} for item in inner]
    deep: Schema = NUMBERS[9]
    for name in ("e", "d", "c", "b", "a"):
        deep = _object({name: deep})
        made.append(deep)
    return made


def _references() -> list[Schema]:
    defs = {"color": TEXTS[6], "point": _object({"x": NUMBERS[1], "y": NUMBERS[1]})}
    color, point = {"$ref": "#/$defs/color"}, {"$ref": "#/$defs/point"}
    made = [
        {**_object({"color": color}), "$defs": defs},
        {**_object({"from": point, "to": point}), "$defs": defs},
        {"type": "array", "items": color, "maxItems": 3, "$defs": defs},
        {"type": "object", "properties": {"c": {"$ref": "#/definitions/c"}}, "required": ["c"],
         "additionalProperties": False, "definitions": {"c": OTHERS[0]}},
        {"anyOf": [point, color], "$defs": defs},
    ]  # fmt: skip
    tree = _object({"value": NUMBERS[9], "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})
    made.append({"$ref": "#/$defs/node", "$defs": {"node": tree}})
    kinds = [
        _object({"kind": {"const": kind}, "value": item})
        for kind, item in (("n", NUMBERS[1]), ("t", TEXTS[2]))
    ]
    made.append(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": "#/$defs/color", "$defs": defs}
    )
    made.append({"allOf": [point, {"description": "where"}], "$defs": defs})
    made += [{"anyOf": kinds}, {"oneOf": kinds}, _object({"shape": {"anyOf": kinds}})]
    return made


SCHEMAS: list[Schema] = [*SCALARS, *_lists(), *_objects(), *_nested(), *_references()]
