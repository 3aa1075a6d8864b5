# SPDX-License-Identifier: Apache-2.0
"""How long a call listens to an end that says nothing, and whose silence that is."""

from __future__ import annotations

import asyncio
import time

import pytest

from dynamo_epd.sdk import hearing, wire
from dynamo_epd.sdk.hearing import Hearing

SILENT = 0.3


@pytest.fixture(autouse=True)
def _sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SILENT_SECONDS", SILENT)
    monkeypatch.setattr(hearing, "LATE_SECONDS", SILENT / 3)


async def never() -> None:
    await asyncio.Event().wait()


async def said(after: float) -> str:
    await asyncio.sleep(after)
    return "a word"


def test_who_says_nothing_counts_as_lost_and_what_was_waited_for_is_cancelled() -> None:
    async def main() -> None:
        one, waited = Hearing("Back"), asyncio.ensure_future(never())
        with pytest.raises(TimeoutError):
            await one.wait(waited)
        assert waited.cancelled()
        one.close()

    asyncio.run(main())


def test_each_word_begins_the_time_anew() -> None:
    async def main() -> None:
        one = Hearing("Back")
        for _ in range(6):  # together far longer than an end may be silent
            assert await one.wait(said(SILENT / 2)) == "a word"
        with pytest.raises(TimeoutError):
            await one.wait(never())
        one.close()

    asyncio.run(main())


def test_time_between_two_waits_is_nobodys_silence() -> None:
    async def main() -> None:
        one = Hearing("Back")
        await one.wait(said(0))
        await asyncio.sleep(1.5 * SILENT)
        assert await one.wait(said(0.7 * SILENT)) == "a word"
        one.close()

    asyncio.run(main())


def test_a_process_that_stood_still_itself_listens_again() -> None:
    async def main() -> None:
        one = Hearing("Back")
        loop = asyncio.get_running_loop()
        word: asyncio.Future[str] = loop.create_future()
        loop.call_soon(time.sleep, 2 * SILENT)
        loop.call_later(2.5 * SILENT, word.set_result, "a word")
        assert await one.wait(word) == "a word"
        one.close()

    asyncio.run(main())


def test_who_is_cancelled_is_not_told_of_a_silence() -> None:
    async def main() -> None:
        one = Hearing("Back")
        caller = asyncio.ensure_future(one.wait(never()))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        with pytest.raises(TimeoutError):  # and a time of the caller's own is told from the end's
            async with asyncio.timeout(SILENT / 3):
                await one.wait(never())
        assert await one.wait(said(0)) == "a word"
        one.close()

    asyncio.run(main())


def test_an_error_is_passed_on_and_no_timer_outlives_the_call() -> None:
    async def fails() -> None:
        raise ConnectionError("torn")

    async def main() -> None:
        one = Hearing("Back")
        with pytest.raises(ConnectionError, match="torn"):
            await one.wait(fails())
        one.close()
        timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        assert not timers

    asyncio.run(main())
