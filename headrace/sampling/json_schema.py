"""Which JSON schemas (draft 2020-12) the grammar library keeps to, keyword by keyword.

The library passes over some keywords without an error, or takes them to mean less than they say. Here every schema is
walked first, and what would not be kept is refused by its name and place. What is let through was tried: outputs walked
at random through the grammar validate (tests/constraints/test_keywords.py).

Known to be looser than the schema: names that are free may come twice (readers take the last), a free name may spell a
named one with escapes, and `format` keeps the shape only (a date may be the 31st of February).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.errors import RequestError
from headrace.sampling.patterns import check_pattern

NOTES = frozenset(
    "title description default examples $comment deprecated readOnly writeOnly $schema contentEncoding "
    "contentMediaType $defs definitions".split()
)
"""Keywords that restrict nothing by themselves."""
BY_TYPE: dict[str, frozenset[str]] = {
    "string": frozenset("minLength maxLength pattern format".split()),
    "integer": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()),
    "number": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset("items prefixItems minItems maxItems uniqueItems unevaluatedItems".split()),
    "object": frozenset(
        "properties required additionalProperties patternProperties propertyNames minProperties maxProperties "
        "unevaluatedProperties".split()
    ),
}
"""Keywords that restrict values of one type."""
WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
"""Keywords beside which others are passed over by the library."""
FORMATS = "email date time date-time duration ipv4 ipv6 hostname uuid uri uri-reference uri-template".split()
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def check_schema(schema: Any) -> None:
    """Raises RequestError, naming keyword and place, for what would not be kept, and for what no value can meet."""
    walk = _Walk(schema)
    walk.check(schema, "#")
    walk.check_references()
    if not walk.can_end():
        raise RequestError(
            "json_schema cannot be met: a value would never end (a required part contains the whole again)"
        )


class _Walk:
    def __init__(self, root: Any) -> None:
        self.root = root
        self._seen: set[int] = set()
        """Identities of the schemas that were checked."""
        self._references: dict[str, str] = {}
        """References and the place of one that makes them."""

    def check(self, schema: Any, place: str) -> None:
        """Raises RequestError."""
        if schema is True:
            return
        if schema is False:
            raise RequestError(f"json_schema cannot be met: {place} is false, which allows no value: remove that part")
        if not isinstance(schema, dict):
            raise RequestError(f"json_schema has {_show(schema)} at {place}; a schema is an object, true or false")
        self._seen.add(id(schema))
        self._check_keywords(schema, place)
        for part, where in self._parts(schema, place):
            self.check(part, where)

    def _check_keywords(self, schema: Mapping[str, Any], place: str) -> None:
        types = self._types(schema, place)
        known = frozenset().union(*BY_TYPE.values()) | NOTES | frozenset(WHOLE) | {"type", "$id"}
        for keyword in schema:
            if keyword not in known:
                raise _unsupported(keyword, place)
        if "$id" in schema and place != "#":
            raise _unsupported("$id", place)
        whole = [keyword for keyword in WHOLE if keyword in schema]
        if whole:
            self._check_alone(schema, whole[0], types, place)
            return
        if types is None:
            limited = [k for k in schema if k not in NOTES and k not in ("$id", "type")]
            loose = [k for k in limited if k not in BY_TYPE["object"] | BY_TYPE["array"]]
            if loose:
                raise RequestError(
                    f"json_schema has {loose[0]!r} at {place} without a type, where it is not kept: say the type"
                )
            types = [t for t in ("object", "array") if any(k in BY_TYPE[t] for k in limited)]
            if len(types) > 1:
                raise RequestError(f"json_schema has keywords of objects and of arrays at {place}: say the type")
        for kind in types:
            getattr(self, f"_check_{kind}", lambda *_: None)(schema, place)

    def _types(self, schema: Mapping[str, Any], place: str) -> list[str] | None:
        value = schema.get("type")
        if value is None:
            return None
        types = value if isinstance(value, list) else [value]
        for kind in types:
            if kind not in BY_TYPE:
                raise RequestError(
                    f"json_schema has type {_show(kind)} at {place}; types are {', '.join(BY_TYPE)}, or a list of them"
                )
        if not types:
            raise RequestError(f"json_schema cannot be met: the list of types at {place} is empty")
        return types

    def _check_alone(self, schema: Mapping[str, Any], keyword: str, types: list[str] | None, place: str) -> None:
        beside = [k for k in schema if k != keyword and k not in NOTES and k != "$id"]
        if keyword in ("enum", "const") and beside == ["type"] and types is not None:
            values = schema["enum"] if keyword == "enum" else [schema["const"]]
            beside = [] if isinstance(values, list) and all(_is_of(v, types) for v in values) else beside
        if beside:
            raise RequestError(
                f"json_schema has {beside[0]!r} beside {keyword!r} at {place}, where it is not kept: write it "
                f"into what {keyword!r} names, or leave it out"
            )
        if keyword == "$ref":
            self._target(schema["$ref"], place)
            self._references[schema["$ref"]] = place
        elif keyword == "enum" and not (isinstance(schema["enum"], list) and schema["enum"]):
            raise RequestError(f"json_schema cannot be met: enum at {place} is {_show(schema['enum'])}: list values")
        elif keyword in ("anyOf", "oneOf", "allOf"):
            branches = schema[keyword]
            if not isinstance(branches, list) or not branches:
                raise RequestError(
                    f"json_schema has {keyword} {_show(branches)} at {place}; it must be a list of schemas"
                )
            if keyword == "allOf" and len(branches) > 1:
                raise RequestError(
                    f"json_schema has 'allOf' with {len(branches)} schemas at {place}, which is not kept: merge them"
                )
            if keyword == "oneOf" and not self._apart(branches):
                raise RequestError(
                    f"json_schema has 'oneOf' at {place} whose schemas do not exclude each other by their types or "
                    "constants, which is not kept: use anyOf"
                )

    def _check_string(self, schema: Mapping[str, Any], place: str) -> None:
        lengths = [k for k in ("minLength", "maxLength") if k in schema]
        for first, others in (("pattern", [*lengths, "format"]), ("format", lengths)):
            for other in others:
                if first in schema and other in schema:
                    raise RequestError(
                        f"json_schema has {other!r} beside {first!r} at {place}, where one is not kept: leave one out"
                    )
        if "format" in schema and schema["format"] not in FORMATS:
            raise RequestError(
                f"json_schema has format {_show(schema['format'])} at {place}, which is not kept; formats are "
                f"{', '.join(FORMATS)}"
            )
        if "pattern" in schema:
            check_pattern(schema["pattern"], f"json_schema: pattern at {place}", in_json=True)

    def _check_integer(self, schema: Mapping[str, Any], place: str) -> None:
        if "multipleOf" in schema and any(bound in schema for bound in BOUNDS):
            raise RequestError(
                f"json_schema has 'multipleOf' beside bounds at {place}, where it is not kept: list values in enum"
            )

        factor = schema.get("multipleOf", 1)
        if isinstance(factor, bool) or not isinstance(factor, int):
            raise RequestError(
                f"json_schema has multipleOf {_show(factor)} at {place}, kept only if it is a whole number: "
                "list the values in enum"
            )

    def _check_number(self, schema: Mapping[str, Any], place: str) -> None:
        if "multipleOf" in schema:
            raise RequestError(
                f"json_schema has 'multipleOf' for numbers at {place}, where it is not kept: use type integer"
            )

    def _check_array(self, schema: Mapping[str, Any], place: str) -> None:
        if schema.get("uniqueItems"):
            raise _unsupported("uniqueItems", place)
        if isinstance(schema.get("items"), list):
            raise RequestError(f"json_schema has a list as 'items' at {place}: the keyword is prefixItems now")

    def _check_object(self, schema: Mapping[str, Any], place: str) -> None:
        properties = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        if not isinstance(properties, dict) or not isinstance(patterns, dict):
            raise RequestError(f"json_schema: properties and patternProperties at {place} must be objects")
        for pattern in patterns:
            check_pattern(pattern, f"json_schema: patternProperties at {place}", in_json=True)
        both = [name for name in properties if any(_matches(pattern, name) for pattern in patterns)]
        if len(patterns) > 1 or both:
            raise RequestError(
                f"json_schema has 'patternProperties' at {place} of which several can hold for one name"
                f"{f' ({both[0]!r})' if both else ''}, which is not kept: use one pattern, apart from properties"
            )
        if "propertyNames" in schema and (properties or patterns):
            raise RequestError(
                f"json_schema has 'propertyNames' beside named properties at {place}, where it is not kept: leave "
                "it out"
            )
        # Where nothing is said of other names, the library adds none to named ones.
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", not properties))
        closed = others is False
        if "propertyNames" in schema and closed:
            raise RequestError(
                f"json_schema has 'propertyNames' beside additionalProperties false at {place}, where one is not "
                "kept: leave one out"
            )
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise RequestError(f"json_schema has required {_show(required)} at {place}; it must be a list of names")
        for name in required:
            if name not in properties:
                raise RequestError(
                    f"json_schema requires {_show(name)} at {place}, none of its properties, so that it is not "
                    "kept: add it to properties"
                )

        least = schema.get("minProperties", 0)
        if isinstance(least, int) and least > max(len(set(required)), 1) and (patterns or not closed):
            raise RequestError(
                f"json_schema has minProperties {least} at {place}, where names are free and may come twice, so it "
                "is not kept: require names, or set additionalProperties to false"
            )

    def _parts(self, schema: Mapping[str, Any], place: str) -> Iterator[tuple[Any, str]]:
        """The schemas in a schema."""
        for keyword, value in schema.items():
            if keyword in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
                yield from ((part, f"{place}/{keyword}/{i}") for i, part in enumerate(value))
            elif keyword in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
                yield from ((part, f"{place}/{keyword}/{name}") for name, part in value.items())
            elif keyword in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"):
                if value is not False:
                    yield value, f"{place}/{keyword}"
            elif keyword == "propertyNames":
                yield ({"type": "string", **value} if isinstance(value, dict) else value), f"{place}/{keyword}"

    def _target(self, reference: Any, place: str) -> Any:
        """What a reference names. Raises RequestError."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")) or "~" in reference:
            raise RequestError(
                f"json_schema has $ref {_show(reference)} at {place}; references must be '#' or '#/...' in the schema, "
                "without escapes"
            )
        found = self.root
        for name in reference.split("/")[1:]:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None:
            raise RequestError(f"json_schema has $ref {reference!r} at {place}, and nothing stands there")
        return found

    def _apart(self, branches: list[Any]) -> bool:
        """Whether no value can meet two of the schemas, by their types, constants, or a constant that all require."""
        schemas = [self._resolved(branch) for branch in branches]
        if not all(isinstance(schema, dict) for schema in schemas):
            return False
        kinds = [self._kinds(schema) for schema in schemas]
        if None not in kinds and all(
            not a & b for i, a in enumerate(kinds) for b in kinds[:i] if a is not None and b is not None
        ):
            return True
        names = set.intersection(*(set(schema.get("required") or ()) for schema in schemas))
        for name in names:
            tags = [_constants(self._resolved((schema.get("properties") or {}).get(name))) for schema in schemas]
            if all(tags) and len(set().union(*tags)) == sum(map(len, tags)):
                return True
        values = [_constants(schema) for schema in schemas]
        return all(values) and len(set().union(*values)) == sum(map(len, values))

    def _kinds(self, schema: Mapping[str, Any]) -> set[str] | None:
        value = schema.get("type")
        if value is None:
            return None
        return {"number" if t == "integer" else t for t in (value if isinstance(value, list) else [value])}

    def _resolved(self, schema: Any) -> Any:
        for _ in range(32):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            schema = self._target(schema["$ref"], "#")
        return {}

    def check_references(self) -> None:
        """Raises RequestError for a reference to something that was not checked, as one into an example."""
        for reference, place in self._references.items():
            target = self._target(reference, place)
            if not isinstance(target, bool) and id(target) not in self._seen:
                raise RequestError(
                    f"json_schema has $ref {reference!r} at {place}, where no schema stands: put it into $defs"
                )

    def can_end(self) -> bool:
        """Whether some value of finite size meets the schema, as far as required parts decide it."""
        ending: set[str] = set()  # references that are known to: the least fixed point
        while True:
            found = {r for r in self._references if r not in ending and self._ends(self._target(r, "#"), ending)}
            if not found:
                return self._ends(self.root, ending)
            ending |= found

    def _ends(self, schema: Any, ending: set[str]) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        if "$ref" in schema:
            return schema["$ref"] in ending
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return any(self._ends(part, ending) for part in schema[keyword])
        if "allOf" in schema:
            return all(self._ends(part, ending) for part in schema["allOf"])
        kinds = schema.get("type") or ()
        if {kinds} - {"object", "array"} if isinstance(kinds, str) else set(kinds) - {"object", "array"}:
            return True
        properties = schema.get("properties") or {}
        if not all(self._ends(properties.get(name, True), ending) for name in schema.get("required") or ()):
            return False
        least = schema.get("minItems") or 0
        first = schema.get("prefixItems") or []
        needed = [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
        return all(self._ends(part, ending) for part in needed)


def _constants(schema: Any) -> set[str]:
    """The values that a schema of constants allows, as text; empty: it is none."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {json.dumps(value, sort_keys=True) for value in values} if isinstance(values, list) else set()


def _is_of(value: Any, types: list[str]) -> bool:
    kinds = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "integer": isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer(),
        "number": isinstance(value, (int, float)) and not isinstance(value, bool),
    }
    return any(kinds[kind] for kind in types)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True  # not to be told: better refused


def _unsupported(keyword: str, place: str) -> RequestError:
    return RequestError(
        f"json_schema has {keyword!r} at {place}, which is not supported, so outputs might break it: remove it and "
        "check the outputs yourself"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
