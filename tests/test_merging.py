# SPDX-License-Identifier: Apache-2.0
"""What an update leaves of others' changes, and that Kubernetes still takes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dynamo_epd.sdk.deployment.merging import three_way

SECRET = {"secretKeyRef": {"name": "tokens", "key": "token"}}
OURS, THEIRS = {"name": "A", "value": "1"}, {"name": "DEBUG", "value": "1"}


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("env", OURS, THEIRS),
        ("volumes", {"name": "temporary", "emptyDir": {}}, {"name": "theirs", "emptyDir": {}}),
        (
            "volumeMounts",
            {"name": "temporary", "mountPath": "/tmp"},
            {"name": "temporary", "mountPath": "/var/tmp", "subPath": "var"},
        ),
    ],
)
def test_a_list_that_is_no_longer_wanted_keeps_what_others_put_there(
    key: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    live = {key: [copy.deepcopy(ours), theirs]}
    assert three_way({key: [ours]}, {}, live) == {key: [theirs]}
    assert three_way({key: [ours]}, {}, {key: [ours]}) == {}
    assert three_way({key: [ours]}, {key: [ours]}, live) == live
    assert three_way({}, {key: [ours]}, {key: [theirs]}) == {key: [theirs, ours]}
    assert live == {key: [ours, theirs]}


def test_what_is_dropped_goes_with_what_others_put_into_it() -> None:
    mount = {"name": "models", "mountPath": "/models"}
    other = {"name": "theirs", "mountPath": "/theirs"}
    live = [mount | {"readOnly": True}, other]
    assert three_way([mount], [other], live) == [other]
    assert three_way({"m": [mount]}, {}, {"m": live}) == {"m": [other]}


@pytest.mark.parametrize(
    ("last", "wanted", "live"),
    [
        (OURS, OURS | {"value": "2"}, {"name": "A", "valueFrom": SECRET}),
        (OURS, {"name": "A", "valueFrom": SECRET}, OURS | {"value": "theirs"}),
        (
            {"name": "A", "valueFrom": SECRET},
            OURS,
            {"name": "A", "valueFrom": {"secretKeyRef": SECRET["secretKeyRef"] | {"optional": True}}},
        ),
        ({"name": "A", "valueFrom": SECRET}, OURS, {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}),
    ],
)
def test_a_variable_is_one_value(last: dict[str, Any], wanted: dict[str, Any], live: dict[str, Any]) -> None:
    """Else it had a ``value`` and a ``valueFrom``, or a reference without a name."""
    assert three_way([last], [wanted], [live, THEIRS]) == [wanted, THEIRS]
    assert three_way([last], [THEIRS], [live, THEIRS]) == [THEIRS]
    assert three_way([last], [last], [live]) == [live]
