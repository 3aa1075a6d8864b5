# SPDX-License-Identifier: Apache-2.0
"""The door of a frontend's worker. What comes through it: test_limits.py and test_connection.py."""

from __future__ import annotations

import asyncio
import socket

import pytest

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.http_server import _listen


def test_a_connection_sends_small_writes_at_once() -> None:
    """A streamed delta that waits for the acknowledgement of the one before comes 40 ms late."""

    async def run() -> int:
        set_on: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            set_on.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = _listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await asyncio.wait_for(set_on, 10)
            writer.close()
        return found

    assert asyncio.run(run()) == 1


def test_a_port_that_is_taken_is_said() -> None:
    with _listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot open http://127\.0\.0\.1:\d+: Address already in use"):
            _listen("127.0.0.1", taken.getsockname()[1])
