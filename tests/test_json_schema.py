# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import pytest

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.json_schema import MAX_BYTES, MAX_COUNT, MAX_DEPTH, check_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def chain(length: int, last: str) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"$ref": last}, "end": {}}, "$ref": "#/$defs/d0"}


REFUSED: dict[str, Any] = {
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
    "a long chain that closes": chain(1500, "#/$defs/d0"),
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
    "a long chain that ends": chain(1000, "#/$defs/end"),
    "a property called $ref": {"properties": {"$ref": {"type": "string"}, "pattern": {"type": "string"}}},
    "a date": {"pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "an optional group": {"pattern": r"^(a|b)?[+*]\)+$"},
    "counts": {"minLength": 0, "maxLength": MAX_COUNT},
}


@pytest.mark.parametrize("schema", TAKEN.values(), ids=TAKEN)
def test_it_is_taken_as_it_is(schema: Any) -> None:
    assert check_schema(schema, "where") is schema
