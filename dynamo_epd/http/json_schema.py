# SPDX-License-Identifier: Apache-2.0
"""Bounds on a JSON schema that a client sends, before a grammar compiler sees it."""

from __future__ import annotations

import graphlib
import json
import re
from typing import Any
from urllib.parse import unquote

from dynamo_epd.errors import InvalidRequest, UnsupportedParameter

MAX_DEPTH = 64
MAX_BYTES = 64 * 1024
MAX_COUNT = 4096
"""Highest minLength, maxItems and their like: a grammar spells repetitions out."""
MAX_REFERENCES = 512
MAX_PATTERN = 256
MAX_REPETITION = 64
MAX_INTEGER = 2**63 - 1
"""What crosses processes as an integer."""

_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_ELSEWHERE = frozenset({"$dynamicRef", "$recursiveRef"})
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
"""RFC 6901's, which has one spelling for each place."""
_Pointer = tuple[str, ...]


def check_schema(schema: Any, param: str) -> dict[str, Any]:
    """``schema`` itself, if it is an object within the bounds. Raises `InvalidRequest` that blames ``param``.

    References must point into the schema and must not lead back to themselves.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' must be an object", param=param)
    _check_depth(schema, param)
    if len(json.dumps(schema)) > MAX_BYTES:
        raise InvalidRequest(f"'{param}' is longer than {MAX_BYTES} bytes", param=param)
    if any(isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER for value in _scalars(schema)):
        raise InvalidRequest(f"a number in '{param}' has more than 64 bits", param=param)
    for node in _objects(schema):
        for key, value in node.items():
            if key == "pattern" and isinstance(value, str):
                _check_pattern(value, param)
            elif key == "patternProperties" and isinstance(value, dict):
                for pattern in value:
                    _check_pattern(pattern, param)
            elif key in _COUNTS and isinstance(value, (int, float)) and value > MAX_COUNT:
                raise InvalidRequest(f"'{key}' in '{param}' is above {MAX_COUNT}", param=param)
            elif key in _ELSEWHERE and isinstance(value, str):
                raise UnsupportedParameter(f"'{key}' in '{param}' is not supported", param=param)
            elif key == "$defs" and node is schema and not isinstance(value, dict):  # vLLM looks into it
                raise InvalidRequest(f"'$defs' in '{param}' must be an object", param=param)
    _check_references(schema, param)
    return schema


def _check_depth(schema: dict[str, Any], param: str) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise InvalidRequest(f"'{param}' is nested more than {MAX_DEPTH} deep", param=param)


def _check_pattern(pattern: str, param: str) -> None:
    """A regular expression without the forms that make automata or backtracking explode."""
    refusal = InvalidRequest(f"a pattern in '{param}' is too long or too complex", param=param)
    if len(pattern) > MAX_PATTERN or re.search(r"\\[1-9]|\\k<", pattern):
        raise refusal
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    if re.search(r"\)\s*[*+{]|\(\?(?!:)", plain):  # a repeated group; lookaround, recursion, flags
        raise refusal
    counts = re.findall(r"\{(\d*)(?:,(\d*))?\}", plain)
    if any(len(count) > 4 or int(count or 0) > MAX_REPETITION for pair in counts for count in pair):
        raise refusal


def _check_references(schema: dict[str, Any], param: str) -> None:
    found = [(place, _pointer(text, param)) for place, text in _references(schema)]
    if len(found) > MAX_REFERENCES:
        raise InvalidRequest(f"'{param}' has more than {MAX_REFERENCES} references", param=param)
    for pointer in {target for _, target in found}:
        _check_target(schema, pointer, param)
    # What a target uses are the references at and below it: no subtree is walked again.
    graph = {
        pointer: {target for place, target in found if place[: len(pointer)] == pointer}
        for pointer in {(), *(target for _, target in found)}
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise InvalidRequest(f"a reference in '{param}' leads back to itself", param=param) from error


def _references(schema: dict[str, Any]) -> list[tuple[_Pointer, str]]:
    """Every reference with the place of the object that holds it."""
    found: list[tuple[_Pointer, str]] = []
    waiting: list[tuple[_Pointer, Any]] = [((), schema)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(item.get("$ref"), str):
                found.append((place, item["$ref"]))
            waiting.extend(((*place, key), value) for key, value in item.items())
        elif isinstance(item, list):
            waiting.extend(((*place, str(index)), value) for index, value in enumerate(item))
    return found


def _pointer(reference: str, param: str) -> _Pointer:
    """RFC 6901 in its URI form: ``#`` or ``#/a/b``."""
    if reference != "#" and not reference.startswith("#/"):
        raise InvalidRequest(f"a reference in '{param}' does not point into it", param=param)
    return tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])


def _check_target(schema: dict[str, Any], pointer: _Pointer, param: str) -> None:
    node: Any = schema
    for step in pointer:
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and _INDEX.fullmatch(step) and int(step) < len(node):
            node = node[int(step)]
        else:
            raise InvalidRequest(f"a reference in '{param}' points to nothing", param=param)


def _scalars(node: Any) -> list[Any]:
    """Every value below ``node`` that is neither an object nor an array."""
    found: list[Any] = []
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        else:
            found.append(item)
    return found


def _objects(node: Any) -> list[dict[str, Any]]:
    """Every object at or below ``node``."""
    found: list[dict[str, Any]] = []
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            found.append(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return found
