# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import time
from contextlib import ExitStack, suppress

import pytest

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.failures import IN_A_ROW, Failures, Hung
from tests.fake_clock import FakeClock


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


SILENCE = 60.0


def hangs(failures: Failures) -> bool:
    try:
        assert failures.alive()
    except Hung:
        return True
    return False


def test_a_thread_that_does_not_come_back_hangs_and_one_that_did_does_not() -> None:
    go = threading.Event()
    failures = Failures(0.05)

    def work() -> None:
        with failures.under_way():
            assert go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + 60
    while not hangs(failures):
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(Hung, match=r"^nothing has been heard for 0\.05 s of what is computed$"):
        failures.alive()
    go.set()
    thread.join()
    assert not hangs(failures)


def test_work_that_is_heard_of_may_take_any_time_and_rest_too(clock: FakeClock) -> None:
    failures = Failures(SILENCE)
    clock.now += 10 * SILENCE
    assert not hangs(failures)
    with failures.under_way():
        for _ in range(10):
            clock.now += SILENCE
            assert not hangs(failures)
            failures.heard()
        clock.now += SILENCE + 1
        assert hangs(failures)
    clock.now += 10 * SILENCE
    assert not hangs(failures)


def test_neither_a_begin_nor_a_failure_beside_it_is_heard_of_what_hangs(clock: FakeClock) -> None:
    """Pictures could be refused one after the other for as long as one hangs."""
    failures = Failures(SILENCE)
    with failures.under_way():
        for _ in range(4):
            clock.now += SILENCE / 4
            assert not hangs(failures)
            with suppress(InvalidRequest), failures.under_way():
                raise InvalidRequest("a refusal")
        clock.now += 1
        assert hangs(failures)


def test_what_succeeds_beside_it_is_heard(clock: FakeClock) -> None:
    failures = Failures(SILENCE)
    with failures.under_way():
        clock.now += SILENCE
        with failures.under_way():
            pass
        clock.now += SILENCE
        assert not hangs(failures)
        clock.now += 1
        assert hangs(failures)


def test_nothing_hangs_where_no_silence_is_named(clock: FakeClock) -> None:
    failures = Failures()
    with failures.under_way():
        clock.now += 1e9
        assert not hangs(failures)


def test_a_stage_that_fails_again_and_again_is_not_alive() -> None:
    failures = Failures(SILENCE)
    for _ in range(IN_A_ROW):
        assert failures.alive()
        fail(failures)
    assert not failures.alive()
