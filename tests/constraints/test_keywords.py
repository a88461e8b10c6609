"""Every keyword of JSON Schema (draft 2020-12): outputs walked at random keep to it, or it is refused by name."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from walker import constraints, walk

from headrace.errors import RequestError
from headrace.params import SamplingParams
from headrace.sampling.json_schema import check_schema

PART = constraints()
I: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 3}  # noqa: E741
CLOSED = {"type": "object", "properties": {"a": I, "b": I, "c": I}, "additionalProperties": False}
KEPT: dict[str, Any] = {
    "type": {"type": ["string", "null", "boolean"]},
    "no type": {},
    "true": True,
    "enum": {"enum": [1, "a", None, [1, {"a": '\n"'}], 1.5]},
    "enum and type": {"type": "string", "enum": ["a", "b"]},
    "const": {"const": {"a": ["é\u2028\u0001", {"b": None}]}},
    "minimum": {"type": "integer", "minimum": 7},
    "bounds of numbers": {"type": "number", "minimum": -1.25, "maximum": 0.5},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "exclusive bounds of integers": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 2},
    "two lower bounds": {"type": "integer", "minimum": 1, "exclusiveMinimum": 5, "maximum": 7},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "minLength": {"type": "string", "minLength": 2},
    "maxLength": {"type": "string", "maxLength": 2},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[ab]{2}$"},
    "pattern of any letter": {"type": "string", "pattern": "^.[^a][ -~]$"},
    "pattern of spaces": {"type": "string", "pattern": "^a\\sb$"},
    "items": {"type": "array", "items": I},
    "item counts": {"type": "array", "items": I, "minItems": 1, "maxItems": 2},
    "items false": {"type": "array", "items": False},
    "prefixItems": {"type": "array", "prefixItems": [I, {"type": "null"}], "items": {"type": "boolean"}},
    "prefixItems alone": {"type": "array", "prefixItems": [I], "items": False, "minItems": 1},
    "unevaluatedItems": {"type": "array", "prefixItems": [I], "unevaluatedItems": {"type": "null"}},
    "properties": CLOSED,
    "required": {**CLOSED, "required": ["b"]},
    "minProperties": {**CLOSED, "minProperties": 2},
    "minProperties of named ones": {"type": "object", "properties": {"a": I, "b": I, "c": I}, "minProperties": 2},
    "maxProperties": {**CLOSED, "required": ["b"], "maxProperties": 2},
    "additionalProperties": {
        "type": "object",
        "properties": {"a": I, "ab": I},
        "additionalProperties": {"type": "null"},
    },
    "unevaluatedProperties": {"type": "object", "properties": {"a": I}, "unevaluatedProperties": {"type": "null"}},
    "patternProperties": {"type": "object", "patternProperties": {"^a": I}, "additionalProperties": {"type": "null"}},
    "pattern beside property": {"type": "object", "properties": {"b": I}, "patternProperties": {"^a[0-9]$": I}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^[ab]{1,2}$"}, "maxProperties": 2},
    "propertyNames enum": {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": I},
    "anyOf": {"anyOf": [I, {"type": "array", "items": I, "maxItems": 2}]},
    "oneOf": {"oneOf": [I, {"type": "string", "maxLength": 1}]},
    "allOf": {"allOf": [I]},
    "$ref": {"$defs": {"x": I}, "type": "array", "items": {"$ref": "#/$defs/x"}},
    "$ref that recurs": {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    "named like keywords": {
        "type": "object",
        "properties": {"not": I, "$ref": I, "if": I, "uniqueItems": I},
        "required": ["not", "$ref"],
        "additionalProperties": False,
    },
    "notes": {"title": "t", "description": "not", "default": 3, "examples": [{"not": 1}], "$comment": "x", **I},
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    ended = set()
    for seed in range(25):
        output = walk(SamplingParams(json_schema=KEPT[name]), random.Random(seed), part=PART)
        if output is not None:
            jsonschema.Draft202012Validator(KEPT[name]).validate(json.loads(output))
            ended.add(output)
    assert ended


I2 = {"type": "integer"}
REFUSED: list[tuple[str, Any]] = [
    ("not", {"type": "integer", "not": {"const": 3}}),
    ("if", {"type": "integer", "if": {"minimum": 5}, "then": {"minimum": 7}}),
    ("then", {"type": "integer", "then": {"minimum": 7}}),
    ("else", {"type": "integer", "else": {"minimum": 7}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("dependencies", {"type": "object", "dependencies": {"a": ["b"]}}),
    ("contains", {"type": "array", "contains": I2}),
    ("minContains", {"type": "array", "minContains": 1}),
    ("maxContains", {"type": "array", "maxContains": 1}),
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("additionalItems", {"type": "array", "additionalItems": I2}),
    ("items", {"type": "array", "items": [I2]}),
    ("$dynamicRef", {"$dynamicRef": "#x"}),
    ("$dynamicAnchor", {"$dynamicAnchor": "x"}),
    ("$anchor", {"$anchor": "x", "type": "null"}),
    ("$vocabulary", {"$vocabulary": {}, "type": "null"}),
    ("$ref", {"$ref": "https://example.com/schema"}),
    ("$ref", {"$ref": "#/$defs/missing"}),
    ("$ref", {"$ref": "#/examples/x", "examples": {"x": {"type": "string", "not": {"const": "x"}}}}),
    ("contentSchema", {"type": "string", "contentSchema": I2}),
    ("nullable", {"type": "string", "nullable": True}),
    ("minimum", {"$defs": {"x": I2}, "$ref": "#/$defs/x", "minimum": 5}),
    ("minimum", {"anyOf": [I2], "minimum": 5}),
    ("minimum", {"enum": [1, 5], "minimum": 4}),
    ("minimum", {"minimum": 4}),
    ("type", {"const": 5, "type": "string"}),
    ("allOf", {"allOf": [I2, {"type": "integer", "minimum": 3}]}),
    ("oneOf", {"oneOf": [I2, {"type": "number"}]}),
    ("multipleOf", {"type": "number", "multipleOf": 0.5}),
    ("multipleOf", {"type": "integer", "multipleOf": 1.5}),
    ("multipleOf", {"type": "integer", "multipleOf": 7, "maximum": 90}),
    ("pattern", {"type": "string", "pattern": "^a", "maxLength": 3}),
    ("pattern", {"type": "string", "pattern": 'a"b'}),
    ("pattern", {"type": "string", "pattern": "a\\x22b"}),
    ("pattern", {"type": "string", "pattern": "a\\nb"}),
    ("pattern", {"type": "string", "pattern": "(?=a)"}),
    ("format", {"type": "string", "format": "json-pointer"}),
    ("format", {"type": "string", "format": "date", "maxLength": 3}),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": I2, "b$": I2}}),
    ("patternProperties", {"type": "object", "properties": {"ab": I2}, "patternProperties": {"^a": I2}}),
    ("propertyNames", {"type": "object", "properties": {"ab": I2}, "propertyNames": {"maxLength": 1}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 1}, "additionalProperties": False}),
    ("minProperties", {"type": "object", "minProperties": 2}),
    ("requires 'b'", {"type": "object", "properties": {"a": I2}, "required": ["b"]}),
]
PLACES: list[tuple[str, Any]] = [
    ("#", lambda schema: schema),
    ("#/properties/not", lambda schema: {"type": "object", "properties": {"not": schema}}),
    ("#/items", lambda schema: {"type": "array", "items": schema}),
    ("#/prefixItems/1", lambda schema: {"type": "array", "prefixItems": [I2, schema]}),
    ("#/anyOf/1", lambda schema: {"anyOf": [I2, schema]}),
    ("#/$defs/x", lambda schema: {"$defs": {"x": schema}, "type": "null"}),
    ("#/additionalProperties", lambda schema: {"type": "object", "additionalProperties": schema}),
]


@pytest.mark.parametrize(("keyword", "schema"), REFUSED)
def test_refused_by_name_and_place(keyword: str, schema: Any) -> None:
    for place, wrap in PLACES:
        with pytest.raises(RequestError) as refusal:
            PART.prepare(SamplingParams(json_schema=wrap(schema)), [0])
        assert keyword in str(refusal.value)
        assert place in str(refusal.value)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"enum": []},
        {"type": []},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "number", "exclusiveMinimum": 3, "maximum": 3},
        {"type": "string", "minLength": 3, "maxLength": 1},
        {"type": "array", "minItems": 3, "maxItems": 1},
        {"type": "array", "items": False, "minItems": 1},
        {**CLOSED, "minProperties": 4},
        {**CLOSED, "required": ["a", "b"], "maxProperties": 1},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#"},
    ],
)
def test_what_no_value_meets_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="cannot be met"):
        PART.prepare(SamplingParams(json_schema=schema), [0])


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_references_that_double_are_walked_once_each() -> None:
    definitions: dict[str, Any] = {"d0": {"type": "null"}}
    for i in range(1, 40):
        part = {"$ref": f"#/$defs/d{i - 1}"}
        definitions[f"d{i}"] = {"type": "array", "prefixItems": [part, part], "minItems": 2, "items": False}
    check_schema({"$defs": definitions, "$ref": "#/$defs/d39"})


@pytest.mark.parametrize("schema", [_nested(3000), {"type": "string", "maxLength": {1}}, {"const": object()}])
def test_what_cannot_be_walked_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="json_schema"):
        PART.prepare(SamplingParams(json_schema=schema), [0])


@pytest.mark.parametrize(
    "schema", ["3", "[]", {"type": "text"}, {"properties": 3}, {"anyOf": []}, {"type": "string", "pattern": 3}]
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError):
        PART.prepare(SamplingParams(json_schema=schema), [0])
