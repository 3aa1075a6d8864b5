# SPDX-License-Identifier: Apache-2.0
"""Changing an object that others change too: as ``kubectl apply``, by what was wanted last and what is wanted now.

A list whose items all have a ``name`` is merged by it, as Kubernetes does with components, containers and variables
(``x-kubernetes-list-map-keys: [name]``); mounts by their path, since a volume may have several. An item that is dropped
goes as a whole: what others put into it is of no use, or invalid, without the rest. Any other list is one value, and so
is a variable: it has a ``value`` or a ``valueFrom``, never both.
"""

from __future__ import annotations

import copy
from typing import Any


def three_way(last: Any, wanted: Any, live: Any) -> Any:
    """``live`` with the changes from ``last`` to ``wanted``, and nothing else of the two."""
    if last == wanted:
        return copy.deepcopy(live)
    if isinstance(wanted, dict) and isinstance(live, dict) and not _variable(wanted):
        return _dicts(last if isinstance(last, dict) else {}, wanted, live)
    if _named(wanted) and _named(live):
        before, now, there = (_by_name(one) for one in (last if _named(last) else [], wanted, live))
        kept = {key: item for key, item in there.items() if key in now or key not in before}
        return list(_dicts(before, now, kept).values())
    return copy.deepcopy(wanted)


def _dicts(last: dict[str, Any], wanted: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(live)
    for key, value in wanted.items():
        if key in last and last[key] == value:
            continue
        found[key] = three_way(last.get(key), value, live[key]) if key in live else copy.deepcopy(value)
    for key in (last.keys() - wanted.keys()) & found.keys():
        rest = _without(last[key], found[key])
        if rest is None:
            del found[key]
        else:
            found[key] = rest
    return found


def _without(last: Any, live: Any) -> Any:
    """What others have put beside what was wanted last, or None where that is nothing."""
    if _named(last) and _named(live):
        ours = _by_name(last)
        return [item for key, item in _by_name(live).items() if key not in ours] or None
    if not (isinstance(last, dict) and isinstance(live, dict)):
        return None
    found = {key: value for key, value in live.items() if key not in last}
    found |= {key: rest for key in last.keys() & live.keys() if (rest := _without(last[key], live[key])) is not None}
    return found or None


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def _by_name(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item.get("mountPath", item["name"]): item for item in items}


def _variable(value: dict[str, Any]) -> bool:
    return "name" in value and ("value" in value or "valueFrom" in value)


def change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The JSON Merge Patch (RFC 7386) that makes ``after`` of ``before``; empty when they are the same."""
    patch: dict[str, Any] = {key: None for key in before.keys() - after.keys()}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            inner = change(old, value)
            if inner:
                patch[key] = inner
        elif key not in before or old != value:
            patch[key] = value
    return patch
