# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.json_schema import MAX_BYTES, MAX_COUNT, MAX_DEPTH, MAX_REFERENCES, check_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def chain(length: int, last: str) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"$ref": last}, "end": {}}, "$ref": "#/$defs/d0"}


def spelled(*indices: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "string"}] * 12, "allOf": [{"$ref": f"#/anyOf/{index}"} for index in indices]}


REFUSED: dict[str, Any] = {
    "an index in endless spellings": spelled(*("0" * zeros + "1" for zeros in range(100))),
    "an index with a zero before it": spelled("01"),
    "an index of nine zeros and more": spelled("0000000001"),
    "an index in other digits": spelled("\u0661"),
    "an index behind the list": spelled("12"),
    "an index of a hundred digits": spelled("1" * 100),
    "one reference too many": spelled(*["0"] * (MAX_REFERENCES + 1)),
    "a cycle through a list": {"anyOf": [{}, {"items": {"$ref": "#/anyOf/1"}}]},
    "10^4 deep": nested(10_000),
    "one too deep": nested(MAX_DEPTH + 1),
    "deep in lists": {"enum": json.loads("[" * 90 + "]" * 90)},
    "root within itself": {"properties": {"child": {"$ref": "#"}}},
    "nothing but itself": {"$ref": "#"},
    "two that name each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}},
        "$ref": "#/$defs/a",
    },
    "a cycle that nothing uses": {"$defs": {"a": {"$ref": "#/$defs/a"}}},
    "a part within itself": {"properties": {"a": {"items": {"$ref": "#/properties/a"}}}},
    "a cycle in another spelling": {"$defs": {"a/b": {"$ref": "#/$defs/a~1b"}}, "$ref": "#/%24defs/a~1b"},
    "a long chain that closes": chain(MAX_REFERENCES - 2, "#/$defs/d0"),
    "to another document": {"$ref": "https://schemas.example/a.json"},
    "to a file": {"$ref": "file:///etc/passwd"},
    "to an anchor": {"$ref": "#name"},
    "to nothing": {"$ref": "#/$defs/missing"},
    "to nothing in a list": {"anyOf": [], "items": {"$ref": "#/anyOf/0"}},
    "dynamic": {"$dynamicRef": "#node"},
    "too long": {"enum": ["x" * MAX_BYTES]},
    "catastrophic": {"pattern": "^(a+)+$"},
    "catastrophic, alternation": {"pattern": "(a|aa)*b"},
    "catastrophic, counted": {"pattern": "(x{1,200}){1,200}"},
    "a property called default": {"properties": {"default": {"pattern": "(a+)+"}}},
    "in a key": {"patternProperties": {"^(a+)+$": {}}},
    "back reference": {"pattern": r"(a)\1"},
    "lookahead": {"pattern": "(?=a)b"},
    "long pattern": {"pattern": "a" * 257},
    "large repetition": {"pattern": "a{1,99999999999}"},
    "large count": {"maxLength": 10**9},
    "large count, as a float": {"minItems": 1e12},
    "a number of 65 bits": {"maximum": 2**64},
    "a number without end in a list": {"enum": [{"x": [-(10**300)]}]},
    "definitions in a list": {"$defs": ["a"]},
    "definitions that are a text": {"$defs": "a"},
    "definitions that are a number": {"$defs": 1},
    "definitions that are null": {"$defs": None},
    "not an object": ["a"],
    "a truth value": True,
    "null": None,
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_it_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schema(schema, "where")
    assert caught.value.status == 400 and caught.value.param == "where"
    assert len(caught.value.message) < 200


TAKEN: dict[str, Any] = {
    "empty": {},
    "as deep as allowed": nested(MAX_DEPTH),
    "a definition used twice": {
        "$defs": {"a": {"type": "string"}},
        "properties": {"x": {"$ref": "#/$defs/a"}, "y": {"$ref": "#/$defs/a"}},
    },
    "a long chain that ends": chain(MAX_REFERENCES - 2, "#/$defs/end"),
    "as many references as allowed": spelled(*["0"] * MAX_REFERENCES),
    "places in a list": spelled("0", "1", "11"),
    "a sibling of what it is in": {"properties": {"a": {"items": {"$ref": "#/properties/ab"}}, "ab": {}}},
    "a property called $defs": {"properties": {"$defs": True}, "$defs": {}},
    "a property called $ref": {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
    "a date": {"pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "an optional group": {"pattern": r"^(a|b)?[+*]\)+$"},
    "counts": {"minLength": 0, "maxLength": MAX_COUNT},
}


@pytest.mark.parametrize("schema", TAKEN.values(), ids=TAKEN)
def test_it_is_taken_as_it_is(schema: Any) -> None:
    assert check_schema(schema, "where") is schema


def test_a_schema_is_not_walked_again_for_each_reference() -> None:
    """What lies under 30 targets is looked at as often as under one."""

    class Counting(dict[str, Any]):
        looked = 0

        def items(self) -> Any:
            Counting.looked += 1
            return super().items()

        def values(self) -> Any:
            Counting.looked += 1
            return super().values()

    def looks(targets: int) -> int:
        inner: Any = Counting({"type": "string"})
        for _ in range(30):
            inner = {"not": inner}
        Counting.looked = 0
        check_schema({"x": inner, "anyOf": [{"$ref": "#/x" + "/not" * depth} for depth in range(targets)]}, "where")
        return Counting.looked

    assert looks(30) == looks(1) > 0
