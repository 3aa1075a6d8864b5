# SPDX-License-Identifier: Apache-2.0
"""The door of a frontend's worker. What comes through it: test_limits.py and test_connection.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from starlette.testclient import TestClient

from dynamo_epd.errors import Overloaded
from dynamo_epd.sdk import api, service
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.http_server import app_of
from dynamo_epd.sdk.port import bound, hold
from dynamo_epd.sdk.service import info_of


def test_a_connection_sends_small_writes_at_once() -> None:
    """A streamed delta that waits for the acknowledgement of the one before comes 40 ms late."""

    async def run() -> int:
        set_on: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            set_on.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bound("127.0.0.1", 0, shared=False)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await asyncio.wait_for(set_on, 10)
            writer.close()
        return found

    assert asyncio.run(run()) == 1


def test_a_port_that_is_taken_is_said() -> None:
    with bound("127.0.0.1", 0, shared=False) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot open http://127\.0\.0\.1:\d+: Address already in use"):
            bound("127.0.0.1", taken.getsockname()[1], shared=False)


def test_a_held_port_is_its_graphs_alone_and_any_number_of_workers_listen_at_it() -> None:
    with hold("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match="Address already in use"):
            hold("127.0.0.1", port)  # another graph's, before any worker of this one listens
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 10)
        workers = [bound("127.0.0.1", port, shared=True) for _ in range(2)]
        for worker in workers:
            worker.listen()
        for taken in (lambda: hold("127.0.0.1", port), lambda: bound("127.0.0.1", port, shared=False)):
            with pytest.raises(ConfigError, match="Address already in use"):
                taken()
        reached = [0, 0]
        clients = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(64)]
        for number, worker in enumerate(workers):
            worker.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    connection, _ = worker.accept()
                    connection.close()  # first, so that TIME_WAIT is on this side
                    reached[number] += 1
        assert sum(reached) == 64 and min(reached) > 0, "the kernel deals connections out by a hash of their ports"
        workers.pop().close()
        clients.append(socket.create_connection(("127.0.0.1", port), 10))  # to the one that stays
        for one in (*clients, *workers):
            one.close()
    hold("127.0.0.1", port).close()  # free again at once


@service
class Full:
    @api
    async def ask(self) -> str:
        raise Overloaded("\N{GRINNING FACE}" * 1500, retry_after=2.2)


def test_a_service_without_an_app_of_its_own_refuses_as_all_do() -> None:
    app = app_of(info_of(Full), Full())
    assert app is not None
    reply = TestClient(app).post("/ask")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")
    assert reply.json()["error"]["code"] == "overloaded"
    assert len(reply.content) <= 2048
