# SPDX-License-Identifier: Apache-2.0
"""The frames that an endpoint sends, and what a caller makes of them, without a runtime between the two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.sdk import wire
from dynamo_epd.sdk.client import ServiceClient
from dynamo_epd.sdk.endpoints import Mark
from dynamo_epd.sdk.handler import EndpointHandler, InFlight
from tests.toys.relay import Back

Endpoint = Callable[[], AsyncIterator[str]]


class ContextDouble:
    """A caller that never leaves."""

    async def async_killed_or_stopped(self) -> None:
        await asyncio.Event().wait()

    def is_stopped(self) -> bool:
        return False


async def one() -> AsyncIterator[str]:
    yield "a"


async def two() -> AsyncIterator[str]:
    yield "a"
    yield "b"


async def two_apart() -> AsyncIterator[str]:
    yield "a"
    await asyncio.sleep(0.01)
    yield "b"
    await asyncio.sleep(0.01)


async def none() -> AsyncIterator[str]:
    for nothing in "":
        yield nothing


async def one_and_an_error() -> AsyncIterator[str]:
    yield "a"
    raise InvalidRequest("no more")


def frames_of(endpoint: Endpoint, request: Any = b"\xc0") -> list[Any]:
    async def main() -> list[Any]:
        handler = EndpointHandler(endpoint, Mark("endpoint", "said", 8, addressed=False), InFlight())
        return [frame async for frame in handler.handle(request, ContextDouble())]

    return asyncio.run(main())


A, B = wire.encode("a"), wire.encode("b")


@pytest.mark.parametrize(
    ("endpoint", "frames"),
    [
        (one, [wire.LAST + A]),
        (two, [A, wire.LAST + B]),
        (two_apart, [A, B, wire.END]),
        (none, [wire.END]),
        (one_and_an_error, [A, InvalidRequest("no more").to_wire()]),
    ],
)
def test_an_end_that_is_known_travels_with_the_last_item(endpoint: Endpoint, frames: list[Any]) -> None:
    assert frames_of(endpoint) == frames


async def slow() -> AsyncIterator[str]:
    await asyncio.sleep(0.4)
    yield "a"


def test_beats_come_while_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BEAT_SECONDS", 0.05)
    *beats, last = frames_of(slow)
    assert last == wire.LAST + A
    assert len(beats) > 1
    assert all(beat is wire.BEAT for beat in beats)


def test_beats_do_not_gather_before_a_reader_that_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BEAT_SECONDS", 0.02)

    async def main() -> list[Any]:
        ready = asyncio.Event()

        async def when_ready() -> AsyncIterator[str]:
            await ready.wait()
            yield "a"

        handler = EndpointHandler(when_ready, Mark("endpoint", "said", 8, addressed=False), InFlight())
        frames = handler.handle(b"\xc0", ContextDouble())
        assert await anext(frames) is wire.BEAT
        await asyncio.sleep(0.3)
        ready.set()
        return [frame async for frame in frames]

    *beats, last = asyncio.run(main())
    assert last == wire.LAST + A
    assert beats == [wire.BEAT]  # of some fifteen that were due


def test_callers_of_other_sdks_get_plain_items() -> None:
    assert frames_of(two, {}) == ["a", "b"]


class RemoteDouble:
    """The runtime's client: replies with what an endpoint's handler says, and nothing after it."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint

    def instance_ids(self) -> list[int]:
        return [7]

    async def direct(self, payload: bytes, instance: int, **_: object) -> AsyncIterator[Any]:
        handler = EndpointHandler(self._endpoint, Mark("endpoint", "said", 8, addressed=False), InFlight())
        return handler.handle(payload, ContextDouble())


@pytest.mark.parametrize(("endpoint", "items"), [(one, ["a"]), (two, ["a", "b"]), (two_apart, ["a", "b"]), (none, [])])
def test_a_caller_hears_every_item_and_then_the_end(endpoint: Endpoint, items: list[str]) -> None:
    async def main() -> None:
        service = ServiceClient("Back", ("dynamo", "Back"), Back)
        service.endpoints["answer"].remote = RemoteDouble(endpoint)
        service.endpoints["answer"].decode = wire.Decoder(str)
        call = service.endpoints["answer"](None)
        assert [item async for item in call] == items
        assert service._in_flight == {}
        with pytest.raises(StopAsyncIteration):
            await anext(call)

    asyncio.run(main())
