"""Random JSON schemas whose values have a bounded length."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["name", "not", "items", "size", "kind", "if", "id", "type", "enum", "é", 'a"b']
"""Some are spelled like keywords."""
PATTERNS = ["^[a-z]{2,5}$", "^(ab|cd){1,3}$", "^[0-9]{2}-[0-9]{2}$", "^x[^y]{0,3}$"]
VALUES: list[Any] = [1, -2.5, "red", "a b", None, True, [1, "x"], {"k": [None]}, "ü", 'say "hi"\n']


def random_schema(rng: random.Random) -> dict[str, Any]:
    """An object schema, some of it behind references."""
    definitions: dict[str, Any] = {}
    schema = _object(rng, rng.choice([1, 1, 2]), definitions)
    return {**schema, "$defs": definitions} if definitions else schema


def _any(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    kinds = [_string, _pattern, _integer, _number, _plain, _enum, _const, _typed_list]
    if depth:
        kinds += [_object, _object, _array, _tuple, _any_of, _one_of, _ref]
    return rng.choice(kinds)(rng, depth - 1, definitions)


def _string(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 4)}


def _pattern(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def _integer(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.randint(-200, 200)
    names = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    return {"type": "integer", names[0]: low, names[1]: low + rng.randint(2, 300)}


def _number(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.randint(-20, 20) / 4
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 30) / 4}


def _plain(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}


def _enum(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"enum": rng.sample(VALUES, rng.randint(1, 4))}


def _const(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"const": rng.choice(VALUES), "description": "fixed"}


def _typed_list(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["string", "null"], "maxLength": rng.randint(0, 3)}


def _object(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 3))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth, definitions) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if rng.random() < 0.3:
        schema["minProperties"] = rng.randint(0, len(names))
    if rng.random() < 0.3:
        schema["maxProperties"] = max(len(schema["required"]), schema.get("minProperties", 0))
    return schema


def _array(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _any(rng, depth, definitions),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _tuple(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "array",
        "prefixItems": [_any(rng, depth, definitions) for _ in range(rng.randint(1, 2))],
        "items": False,
    }


def _any_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth, definitions) for _ in range(rng.randint(1, 3))]}


def _one_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """Told apart by a constant that all require."""
    branches = []
    for tag in ("one", "two"):
        branch = _object(rng, depth, definitions)
        branch["properties"] = {"tag": {"const": tag}, **branch["properties"]}
        branch["required"] = ["tag", *branch["required"]]
        branch.pop("maxProperties", None)
        branches.append(branch)
    return {"oneOf": branches}


def _ref(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    name = f"d{len(definitions)}"
    definitions[name] = {}
    definitions[name] = _any(rng, depth, definitions)
    return {"$ref": f"#/$defs/{name}"}
