# SPDX-License-Identifier: Apache-2.0
"""Checks of a body's fields. Each takes a value and its name in the body and gives the value to pass on, and says in
JSON Schema what passes: what is checked and what ``/openapi.json`` says of it are one table.

A key or a value of the client's never stands in an error message unless it is shortened and harmless: see `shown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_epd.errors import EpdError, InvalidRequest, UnsupportedParameter

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}


@dataclass(frozen=True)
class Check:
    """(value, its name in the body) -> the value to pass on. Raises `InvalidRequest`."""

    run: Callable[[Any, str], Any]
    schema: Schema
    """Of what passes: all of it, and little beside. A rule that JSON Schema has no word for is left out."""

    def __call__(self, value: Any, name: str) -> Any:
        return self.run(value, name)

    def then(self, further: Callable[[Any, str], Any]) -> Check:
        """What passed goes through ``further`` too, which narrows or rewrites it."""
        return Check(lambda value, name: further(self.run(value, name), name), self.schema)


IGNORED = frozenset({"user", "metadata", "store", "service_tier"})
"""Fields of OpenAI's API that clients send and that change no answer."""


@dataclass(frozen=True)
class Fields:
    """The fields of a body: those that have a check, each through it, and no other.

    A field that is null says nothing. ``nullable`` names fields that are not served and may be null; ``needs`` names
    for a field another one without which it means nothing.
    """

    checks: Mapping[str, Check]
    required: Collection[str] = ()
    nullable: Collection[str] = ()
    needs: Mapping[str, str] = field(default_factory=dict)

    def check(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What is given, checked. Raises `UnsupportedParameter` for a field that has no check."""
        # Unknown names first: a field that must not be there is named even where another one is merely out of range.
        for name, value in body.items():
            if name not in self.checks and name not in IGNORED and not (name in self.nullable and value is None):
                raise unsupported(shown(name))
        clean = {name: check(body[name], name) for name, check in self.checks.items() if body.get(name) is not None}
        for name in self.required:
            if name not in clean:
                raise InvalidRequest(f"'{name}' is required", param=name)
        for name, other in self.needs.items():
            if clean.get(name) not in (None, 0) and not clean.get(other):
                raise InvalidRequest(f"'{name}' needs '{other}'", param=name)
        return clean

    @property
    def schema(self) -> Schema:
        """Of the whole body."""
        schema = _object(self.checks, self.required, self.nullable)
        schema["properties"] |= {name: {"description": "accepted and ignored"} for name in sorted(IGNORED)}
        schema["properties"] |= {
            name: schema["properties"][name] | {"description": f"needs '{other}'"} for name, other in self.needs.items()
        }
        return schema


def _object(checks: Mapping[str, Check], required: Collection[str], nullable: Collection[str]) -> Schema:
    properties = {
        name: check.schema if name in required else {"anyOf": [check.schema, NULL]} for name, check in checks.items()
    }
    return {
        "type": "object",
        "properties": properties | {name: NULL for name in sorted(nullable) if name not in checks},
        **({"required": sorted(required)} if required else {}),
        "additionalProperties": False,
    }


def integer(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> int:
        if isinstance(value, float) and value.is_integer():  # 1.0 is an integer in JSON
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(f"'{name}' must be an integer from {low} to {high}", param=name)
        return value

    return Check(check, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A number in [low, high], or in (low, high] with ``above``. NaN is in neither."""

    def check(value: Any, name: str) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not right or (above and value == low):
            least = f"above {low}" if above else f"at least {low}"
            raise InvalidRequest(f"'{name}' must be a number, {least} and at most {high}", param=name)
        return float(value)

    return Check(check, {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high})


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be true or false", param=name)
    return value


boolean = Check(_boolean, {"type": "boolean"})


def only(wanted: Any, otherwise: Callable[[str], EpdError] | None = None) -> Check:
    """For a field of which one value is served; ``otherwise`` makes of its name what any other value raises."""

    def check(value: Any, name: str) -> Any:
        if isinstance(value, bool) is not isinstance(wanted, bool) or value != wanted:  # True is no 1, but 1.0 is
            raise (otherwise or unsupported)(name)
        return wanted

    return Check(check, NULL if wanted is None else {"const": wanted})


def text(least: int, most: int | None) -> Check:
    def check(value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise InvalidRequest(f"'{name}' must be a text", param=name)
        if "\0" in value:  # JSON is refused with one; a query is not
            raise InvalidRequest(f"'{name}' holds a NUL character", param=name)
        if len(value) < least or (most is not None and len(value) > most):
            bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
            raise InvalidRequest(f"'{name}' must have {bounds} characters", param=name)
        return value

    return Check(check, {"type": "string", "minLength": least} | ({} if most is None else {"maxLength": most}))


def one_of(*wanted: str) -> Check:
    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in wanted:
            raise InvalidRequest(f"'{name}' must be {' or '.join(wanted)}", param=name)
        return value

    return Check(check, {"enum": list(wanted)})


def choice(wording: str, kinds: Mapping[type, Check]) -> Check:
    """The check of the value's own type; ``wording`` says what there is."""

    def check(value: Any, name: str) -> Any:
        if type(value) not in kinds:
            raise InvalidRequest(f"'{name}' must be {wording}", param=name)
        return kinds[type(value)](value, name)

    return Check(check, {"anyOf": [kind.schema for kind in kinds.values()]})


def entries(value: Any, name: str, least: int, most: int | None) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'{name}' must be a list", param=name)
    if len(value) < least or (most is not None and len(value) > most):
        bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
        raise InvalidRequest(f"'{name}' must have {bounds} entries", param=name)
    return value


def list_of(each: Check, least: int, most: int | None) -> Check:
    run = each.run  # a prompt may be half a million token ids

    def check(value: Any, name: str) -> list[Any]:
        return [run(item, f"{name}[{i}]") for i, item in enumerate(entries(value, name, least, most))]

    bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return Check(check, {"type": "array", "items": each.schema, **bounds})


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{name}' must be an object", param=name)
    return value


mapping = Check(_mapping, {"type": "object"})


def object_of(checks: Mapping[str, Check], required: Collection[str] = (), nullable: Collection[str] = ()) -> Check:
    """An object with no keys but these; what is null and not required is left out."""

    def check(value: Any, name: str) -> dict[str, Any]:
        given = mapping(value, name)
        for key, item in given.items():
            if key not in checks and not (key in nullable and item is None):
                raise unsupported(f"{name}.{shown(key)}")
        for key in required:
            if given.get(key) is None:
                raise InvalidRequest(f"'{name}.{key}' is required", param=f"{name}.{key}")
        return {key: each(given[key], f"{name}.{key}") for key, each in checks.items() if given.get(key) is not None}

    return Check(check, _object(checks, required, nullable))


def tagged(key: str, kinds: Mapping[str, Check]) -> Check:
    """An object whose ``key`` says which check is its own."""

    def check(value: Any, name: str) -> Any:
        tag = mapping(value, name).get(key)
        if not isinstance(tag, str) or tag not in kinds:
            raise InvalidRequest(f"'{name}.{key}' must be {' or '.join(kinds)}", param=f"{name}.{key}")
        return kinds[tag](value, name)

    # Several tags may share a check.
    return Check(check, {"anyOf": [kind.schema for kind in {id(one): one for one in kinds.values()}.values()]})


def shown(key: str) -> str:
    """A key of the client's as an error message may show it."""
    return re.sub(r"[^\w.-]", "?", key[:64], flags=re.ASCII)


def unsupported(name: str) -> EpdError:
    return UnsupportedParameter(f"'{name}' is not supported", param=name)
