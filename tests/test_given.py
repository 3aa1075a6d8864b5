# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dynamo_epd.given import Given


def test_what_was_given_is_taken_back_once() -> None:
    given: Given[str] = Given()
    assert given.give("a", "lease")
    assert given.give("a", "another")
    assert given.give("b", "third")
    assert given.take_back("a") == ["lease", "another"]
    assert given.take_back("a") == []
    assert given.take_back("b") == ["third"]


def test_a_caller_that_left_is_given_nothing_more() -> None:
    given: Given[str] = Given()
    assert given.take_back("a") == []
    assert given.has_left("a")
    assert not given.has_left("b")
    assert not given.give("a", "lease")
    assert given.take_back("a") == []


def test_the_oldest_are_forgotten() -> None:
    given: Given[int] = Given(most=2)
    assert all(given.give(str(number), number) for number in range(3))
    assert [given.take_back(str(number)) for number in (2, 1)] == [[2], [1]]
    assert given.take_back("0") == []
