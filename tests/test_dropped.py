# SPDX-License-Identifier: Apache-2.0
"""What counts as a message that is none, and how an engine's process tells its number to its worker."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo_epd import dropped
from dynamo_epd.sdk import wire
from dynamo_epd.sdk.endpoints import Mark
from dynamo_epd.sdk.handler import EndpointHandler, InFlight

PLACE = "asked"


class Asked(msgspec.Struct):
    number: int


class Context:
    """A caller that stays."""

    async def async_killed_or_stopped(self) -> None:
        await asyncio.Event().wait()

    def is_stopped(self) -> bool:
        return False


async def answer(request: Asked) -> AsyncIterator[int]:
    yield request.number


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\x81\xa1a\x01", b"\x91" * 200_000, "x", "[" * 50_000, None, 7])
def test_what_no_endpoint_can_read_is_counted_and_a_right_request_is_not(raw: Any) -> None:
    handler = EndpointHandler(answer, Mark("endpoint", PLACE), InFlight())

    async def frames(message: Any) -> list[Any]:
        return [frame async for frame in handler.handle(message, Context())]

    before = dropped.counts()[PLACE]
    (refusal,) = asyncio.run(frames(raw))
    assert refusal["class"] == "InvalidRequest"
    assert dropped.counts()[PLACE] == before + 1
    assert asyncio.run(frames(msgspec.msgpack.encode(Asked(7)))) == [wire.LAST + msgspec.msgpack.encode(7)]
    assert dropped.counts()[PLACE] == before + 1


def test_a_child_writes_its_number_where_its_parent_looks() -> None:
    path = dropped.share("a child")
    assert dropped.counts()["a child"] == 0
    script = "import os, sys; from dynamo_epd import dropped; dropped.write(os.open(sys.argv[1], os.O_WRONLY), 1 << 40)"
    subprocess.run([sys.executable, "-c", script, path], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert dropped.counts()["a child"] == 1 << 40
    assert dropped.share("a child") == path
