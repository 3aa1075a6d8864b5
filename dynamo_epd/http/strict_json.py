# SPDX-License-Identifier: Apache-2.0
"""JSON as RFC 8259 and I-JSON (RFC 7493) have it, bounded before it is built.

One cheap pass cuts the strings out of the text, so that depth and number of values are known before Python makes an
object of any: the parser then never recurses further than `MAX_DEPTH`. A body of 16 MB with one picture in it takes
about 60 ms on a slow core.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dynamo_epd.errors import InvalidJson

Result = TypeVar("Result")

LARGE_BODY = 256 * 1024
"""Bytes from which a body is parsed in a thread: one of 16 MB would hold everybody else up for 80 ms."""

MAX_DEPTH = 128
MAX_CONTAINERS = 100_000
"""Objects and arrays in one body."""
MAX_VALUES = 500_000
"""Values in one body; also its quotation marks, escaped ones included."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def parsed(raw: bytes, check: Callable[[dict[str, Any]], Result]) -> Result:
    """``check`` of the object in ``raw``: how every route reads its body. A large one keeps nobody else waiting.

    Call it after admission. Raises what `parse_json` and ``check`` raise.
    """
    if len(raw) > LARGE_BODY:
        return await asyncio.to_thread(lambda: check(parse_json(raw)))
    return check(parse_json(raw))


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in ``raw``, UTF-8 without a mark. Raises `InvalidJson`.

    Refused beyond bad grammar: duplicate keys, NUL characters, lone surrogates, numbers outside a double's range,
    and more depth or values than the bounds above.
    """
    _check_shape(raw)
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except InvalidJson:
        raise
    except UnicodeDecodeError as error:
        raise InvalidJson("the body is not UTF-8") from error
    except ValueError as error:
        raise InvalidJson("the body is not valid JSON") from error
    if not isinstance(value, dict):
        raise InvalidJson("the body must be a JSON object")
    if b"\\u" in raw:
        _check_characters(value)
    return value


def _check_shape(raw: bytes) -> None:
    """Bound depth and number of values, without building any."""
    if raw.count(b'"') > MAX_VALUES:
        raise InvalidJson(f"the body has more than {MAX_VALUES} quotation marks")
    outside = []
    at = 0
    while (opening := raw.find(b'"', at)) >= 0:
        outside.append(raw[at:opening])
        at = _end_of_string(raw, opening + 1)
    outside.append(raw[at:])
    skeleton = b"".join(outside)
    # Closing ones too: the loop below takes a step for each bracket, and they need not match.
    if max(skeleton.count(b"[") + skeleton.count(b"{"), skeleton.count(b"]") + skeleton.count(b"}")) > MAX_CONTAINERS:
        raise InvalidJson(f"the body has more than {MAX_CONTAINERS} objects and arrays")
    if skeleton.count(b",") > MAX_VALUES:
        raise InvalidJson(f"the body has more than {MAX_VALUES} values")
    depth = 0
    for bracket in skeleton.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidJson(f"the body is nested more than {MAX_DEPTH} deep")
        if depth < 0:
            raise InvalidJson("the body is not valid JSON")


def _end_of_string(raw: bytes, start: int) -> int:
    """The place after the closing quotation mark, or the end of ``raw``."""
    closing = raw.find(b'"', start)
    while closing >= 0:
        text = raw[start:closing]
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return closing + 1
        # An escaped one. Backslashes cannot run across it, so no stretch is looked at twice.
        start, closing = closing + 1, raw.find(b'"', closing + 1)
    return len(raw)


def _check_characters(value: Any) -> None:
    """No string has a NUL or a lone surrogate. Only escapes can write one: the rest was UTF-8 without controls."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str):
            if "\0" in item:
                raise InvalidJson("the body holds a NUL character")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidJson("the body holds half of a surrogate pair") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidJson("the body holds an object with the same key twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidJson("the body holds a number that is out of range")
    return number


def _integer(text: str) -> int:
    if len(text) > 309:
        raise InvalidJson("the body holds a number that is out of range")
    return int(text)


def _constant(name: str) -> NoReturn:
    raise InvalidJson("the body holds NaN or Infinity")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_constant
)
