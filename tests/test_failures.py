# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from contextlib import ExitStack, suppress

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.failures import IN_A_ROW, Failures


def fail(failures: Failures, *, at_once: int = 1) -> None:
    with suppress(RuntimeError), ExitStack() as under_way:
        for _ in range(at_once):
            under_way.enter_context(failures.counted())
        raise RuntimeError


def test_what_fails_together_is_one_incident() -> None:
    failures = Failures()
    fail(failures, at_once=8)
    assert not failures.too_many
    for _ in range(IN_A_ROW - 1):
        assert not failures.too_many
        fail(failures, at_once=8)
    assert failures.too_many


def test_what_fails_again_and_again_is_too_much() -> None:
    failures = Failures()
    for _ in range(IN_A_ROW):
        assert not failures.too_many
        fail(failures)
    assert failures.too_many


def test_work_that_was_under_way_before_an_incident_does_not_hide_the_next() -> None:
    failures = Failures()
    with suppress(RuntimeError), failures.counted():
        for _ in range(IN_A_ROW):
            fail(failures)
        raise RuntimeError
    assert failures.too_many


def test_a_success_begins_anew_also_for_what_is_under_way() -> None:
    failures = Failures()
    for _ in range(IN_A_ROW - 1):
        fail(failures)
    with suppress(RuntimeError), failures.counted():
        with failures.counted():
            pass
        raise RuntimeError
    for _ in range(IN_A_ROW - 2):
        fail(failures)
    assert not failures.too_many
    fail(failures)
    assert failures.too_many


def test_refusals_neither_count_nor_show_that_anything_works() -> None:
    failures = Failures()
    for _ in range(IN_A_ROW):
        assert not failures.too_many
        fail(failures)
        with suppress(InvalidRequest), failures.counted():
            raise InvalidRequest("a refusal")
    assert failures.too_many
