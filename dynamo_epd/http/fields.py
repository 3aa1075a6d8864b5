# SPDX-License-Identifier: Apache-2.0
"""Checks of a body's fields. Each takes a value and its name in the body and gives the value to pass on.

A key or a value of the client's never stands in an error message unless it is shortened and harmless: see `shown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dynamo_epd.errors import EpdError, InvalidRequest, UnsupportedParameter

Check = Callable[[Any, str], Any]
"""(value, its name in the body) -> the value to pass on. Raises `InvalidRequest`."""

IGNORED = frozenset({"user", "metadata", "store", "service_tier"})
"""Fields of OpenAI's API that clients send and that change no answer."""


def checked(body: Mapping[str, Any], checks: Mapping[str, Check], nullable: Collection[str] = ()) -> dict[str, Any]:
    """The fields of ``body`` that have a check, each through it. Raises `UnsupportedParameter` for any other.

    A field that is null says nothing. ``nullable`` names fields that are not served and may be null.
    """
    # Unknown names first: a field that must not be there is named even where another one is merely out of range.
    for name, value in body.items():
        if name not in checks and name not in IGNORED and not (name in nullable and value is None):
            raise unsupported(shown(name))
    return {name: check(body[name], name) for name, check in checks.items() if body.get(name) is not None}


def integer(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> int:
        if isinstance(value, float) and value.is_integer():  # 1.0 is an integer in JSON
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(f"'{name}' must be an integer from {low} to {high}", param=name)
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A number in [low, high], or in (low, high] with ``above``. NaN is in neither."""

    def check(value: Any, name: str) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not right or (above and value == low):
            least = f"above {low}" if above else f"at least {low}"
            raise InvalidRequest(f"'{name}' must be a number, {least} and at most {high}", param=name)
        return float(value)

    return check


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be true or false", param=name)
    return value


def only(wanted: Any) -> Check:
    """For a field of which only the value without effect is served."""

    def check(value: Any, name: str) -> Any:
        if value is not wanted:
            raise unsupported(name)
        return value

    return check


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

    return check


def one_of(value: Any, name: str, *wanted: str) -> str:
    if not isinstance(value, str) or value not in wanted:
        raise InvalidRequest(f"'{name}' must be {' or '.join(wanted)}", param=name)
    return value


def entries(value: Any, name: str, least: int, most: int | None) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'{name}' must be a list", param=name)
    if len(value) < least or (most is not None and len(value) > most):
        bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
        raise InvalidRequest(f"'{name}' must have {bounds} entries", param=name)
    return value


def list_of(check: Check, least: int, most: int | None) -> Check:
    return lambda value, name: [check(item, f"{name}[{i}]") for i, item in enumerate(entries(value, name, least, most))]


def mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"'{name}' must be an object", param=name)
    return value


def known(value: Any, name: str, *keys: str) -> dict[str, Any]:
    """An object with no keys but these."""
    found = mapping(value, name)
    for key in found:
        if key not in keys:
            raise unsupported(f"{name}.{shown(key)}")
    return found


def shown(key: str) -> str:
    """A key of the client's as an error message may show it."""
    return re.sub(r"[^\w.-]", "?", key[:64], flags=re.ASCII)


def unsupported(name: str) -> EpdError:
    return UnsupportedParameter(f"'{name}' is not supported", param=name)
