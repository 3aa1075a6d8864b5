# SPDX-License-Identifier: Apache-2.0
"""Values that a JSON Schema lets pass: of the words that `dynamo_epd.http.fields` and msgspec write it in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]
WORDS = frozenset(
    {
        "$ref", "additionalProperties", "anyOf", "const", "contentEncoding", "contentMediaType", "default",
        "description", "enum", "exclusiveMinimum", "items", "maxItems", "maxLength",
        "maxProperties", "maximum", "minItems", "minLength", "minimum", "pattern", "properties", "propertyNames",
        "required", "title", "type",
    }
)  # fmt: skip
"""All that are understood: another one must be taught here first, or what is drawn is not what it means."""

_PLAIN = st.characters(codec="utf-8", exclude_characters="\0")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(_PLAIN, max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(_PLAIN, max_size=10), inner, max_size=3),
    max_leaves=4,
)
LONGEST = 40
"""Characters and entries of what may be of any length: to be long is another test's."""


def values(schema: Schema, defined: Schema | None = None, optional: bool = True) -> st.SearchStrategy[Any]:
    """What passes ``schema``; references lead into ``defined``, by name. ``optional`` fields come or do not come."""
    if unknown := schema.keys() - WORDS:
        raise ValueError(f"words of a schema that nothing here draws: {sorted(unknown)}")
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return st.deferred(lambda: values((defined or {})[name], defined, optional))
    if "anyOf" in schema:
        return st.one_of([values(one, defined, optional) for one in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    draw = {
        "null": lambda: st.none(),
        "boolean": lambda: st.booleans(),
        "integer": lambda: st.integers(schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)),
        "number": lambda: _numbers(schema),
        "string": lambda: _texts(schema),
        "array": lambda: _lists(schema, defined, optional),
        "object": lambda: _objects(schema, defined, optional),
    }
    return draw[schema["type"]]() if "type" in schema else ANYTHING


def _numbers(schema: Schema) -> st.SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    return st.floats(
        low, schema.get("maximum"), exclude_min="exclusiveMinimum" in schema, allow_nan=False, allow_infinity=False
    )


def _texts(schema: Schema) -> st.SearchStrategy[Any]:
    if "contentEncoding" in schema:
        return st.binary(max_size=LONGEST)
    if schema.get("contentMediaType") == "application/json":
        return st.sampled_from(("", "{}", '{"a": [1, null]}'))
    if "pattern" in schema:
        return st.from_regex(schema["pattern"].removesuffix("$") + r"\Z")
    least = schema.get("minLength", 0)
    return st.text(_PLAIN, min_size=least, max_size=min(schema.get("maxLength", LONGEST), least + LONGEST))


def _lists(schema: Schema, defined: Schema | None, optional: bool) -> st.SearchStrategy[Any]:
    least = schema.get("minItems", 0)
    most = min(schema.get("maxItems", least + 3), least + 3)
    return st.lists(values(schema.get("items", {}), defined, optional), min_size=least, max_size=most)


def _objects(schema: Schema, defined: Schema | None, optional: bool) -> st.SearchStrategy[Any]:
    required = schema.get("required", ())
    own = {name: values(one, defined, optional) for name, one in schema.get("properties", {}).items()}
    more = schema.get("additionalProperties", True)
    if not own and more is True:
        return st.dictionaries(st.text(_PLAIN, max_size=10), ANYTHING, max_size=3)
    if not own and more:
        names = values({"type": "string", **schema.get("propertyNames", {})}, defined)
        return st.dictionaries(names, values(more, defined, optional), max_size=3)
    return st.fixed_dictionaries(
        {name: own[name] for name in required},
        optional={name: one for name, one in own.items() if name not in required} if optional else {},
    )


def objects(schema: Any, at: str = "") -> Iterator[tuple[str, Schema]]:
    """Every object that ``schema`` describes, at any depth, with its place."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("properties"), Mapping):
            yield at, schema
        for word, below in schema.items():
            yield from objects(below, f"{at}/{word}")
    elif isinstance(schema, list):
        for index, below in enumerate(schema):
            yield from objects(below, f"{at}/{index}")
