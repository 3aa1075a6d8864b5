# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

import pytest

from dynamo_epd.flights import Flights


class Work:
    """Counts how often it was begun and cancelled; ends when told."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.begun


def test_equal_work_in_flight_is_done_once():
    async def main() -> None:
        flights: Flights[int] = Flights()
        work, other = Work(), Work()
        same = [asyncio.create_task(flights.join("a", work)) for _ in range(5)]
        apart = asyncio.create_task(flights.join("b", other))
        await asyncio.sleep(0)
        work.go.set()
        other.go.set()
        assert await asyncio.gather(*same) == [1] * 5
        assert await apart == 1
        assert (work.begun, other.begun) == (1, 1)
        assert await flights.join("a", work) == 2, "a flight that has landed is not joined"

    asyncio.run(main())


def test_a_flight_goes_on_while_one_caller_waits_and_ends_with_the_last():
    async def main() -> None:
        flights: Flights[int] = Flights()
        work = Work()
        starter, second = (asyncio.create_task(flights.join("a", work)) for _ in range(2))
        await asyncio.sleep(0)
        starter.cancel()
        await asyncio.gather(starter, return_exceptions=True)
        assert work.cancelled == 0
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        third = asyncio.create_task(flights.join("a", work))
        await asyncio.sleep(0.01)
        assert (work.begun, work.cancelled) == (2, 1), "who comes after the last has left starts anew"
        work.go.set()
        assert await third == 2

    asyncio.run(main())


def test_an_exception_reaches_all_who_wait():
    async def broken() -> int:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def main() -> None:
        flights: Flights[int] = Flights()
        results = await asyncio.gather(*(flights.join("a", broken) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError] * 3
        with pytest.raises(ValueError, match="no"):
            await flights.join("a", broken)

    asyncio.run(main())
