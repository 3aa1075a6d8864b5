# SPDX-License-Identifier: Apache-2.0
"""Server-sent events that come at once, and those that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from components.processor import replies
from components.protocol import HttpReply
from dynamo_epd.engine.front import Answer
from dynamo_epd.http.events import MOST, grouped

BOUND = 20.0


class Told:
    """Events whose producer waits where it is told None, and fails where it is told an error. ``said``: so far."""

    def __init__(self, *what: str | Exception | None):
        self._what, self.said, self.closed = what, 0, False
        self.go_on = asyncio.Event()

    async def events(self) -> AsyncGenerator[str, None]:
        try:
            for one in self._what:
                if one is None:
                    await self.go_on.wait()
                    self.go_on.clear()
                elif isinstance(one, Exception):
                    raise one
                else:
                    self.said += 1
                    yield one
        finally:
            self.closed = True


def test_events_without_a_wait_in_between_are_one_text() -> None:
    async def main() -> None:
        told = Told("role ", "first ", None, "second ", None, "last ", "usage ", "done")
        groups = grouped(told.events())
        assert await anext(groups) == "role first "
        for expected in ("second ", "last usage done"):
            told.go_on.set()
            assert await anext(groups) == expected
        assert await anext(groups, None) is None
        assert told.closed

    asyncio.run(asyncio.wait_for(main(), BOUND))


def test_an_error_comes_after_what_came_before_it() -> None:
    async def main() -> None:
        groups = grouped(Told("one ", "two ", ValueError("broken")).events())
        assert await anext(groups) == "one two "
        with pytest.raises(ValueError, match="broken"):
            await anext(groups)

    asyncio.run(asyncio.wait_for(main(), BOUND))


def test_who_leaves_closes_the_events() -> None:
    async def main() -> None:
        told = Told("one", None, "never")
        groups = grouped(told.events())
        assert await anext(groups) == "one"
        await groups.aclose()
        assert told.closed and told.said == 1

    asyncio.run(asyncio.wait_for(main(), BOUND))


def test_a_producer_waits_for_who_does_not_take() -> None:
    async def main() -> None:
        told = Told("first", None, *("x" * (3 * MOST)))
        groups = grouped(told.events())
        assert await anext(groups) == "first"
        told.go_on.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert told.said == 1 + MOST
        taken = ""
        async for text in groups:
            assert len(text) <= MOST + 1
            taken += text
        assert taken == "x" * (3 * MOST)

    asyncio.run(asyncio.wait_for(main(), BOUND))


def test_a_streams_status_comes_with_its_first_events() -> None:
    async def main() -> list[HttpReply]:
        told = Told("role ", "first ", None, "done")
        told.go_on.set()
        return [one async for one in replies(Answer(200, None, told.events()))]

    said = asyncio.run(asyncio.wait_for(main(), BOUND))
    assert said[0].status == 200 and said[0].event and said[0].event.startswith("role first ")
    assert all(one.status is None for one in said[1:])
    assert "".join(one.event or "" for one in said) == "role first done"


def test_a_body_is_one_message() -> None:
    async def main() -> list[HttpReply]:
        return [one async for one in replies(Answer(200, "{}", None))]

    assert asyncio.run(main()) == [HttpReply(status=200, body="{}")]
