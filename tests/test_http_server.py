# SPDX-License-Identifier: Apache-2.0
"""The door of a frontend's worker. What comes through it: test_limits.py and test_connection.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dynamo_epd.errors import Overloaded
from dynamo_epd.http.connection import BoundedConnection
from dynamo_epd.sdk import api, service
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.http_server import HttpServer, TlsConfig, app_of
from dynamo_epd.sdk.port import PORT, bound, hold
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


# --- TLS

Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    home = tmp_path_factory.mktemp("tls")
    found = TlsConfig(home / "cert.pem", home / "key.pem")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    name = ("-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", *curve, *name, "-keyout", found.key_file, "-out", found.cert_file)
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return found


class Door:
    """A server in this loop, and clients of it, who trust its certificate."""

    def __init__(self, tls: TlsConfig):
        app = FastAPI()
        app.add_api_route("/", lambda: "here")
        self.server = HttpServer(app, tls)
        self.port = int(self.server.url.rpartition(":")[2])
        self._trust = ssl.create_default_context(cafile=str(tls.cert_file))

    async def connect(self) -> Opened:
        """Without a handshake."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def open(self) -> Opened:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self._trust)

    @staticmethod
    async def ask(opened: Opened) -> None:
        reader, writer = opened
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b'"here"'), 20)).startswith(b"HTTP/1.1 200 ")


async def closed(opened: Opened, seconds: float = 20) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(opened[0].read(1), seconds) == b""
    return True


def at_the_door(
    monkeypatch: pytest.MonkeyPatch, tls: TlsConfig, act: Callable[[Door], Coroutine[None, None, None]]
) -> None:
    monkeypatch.setenv(PORT, "0")

    async def run() -> None:
        door = Door(tls)
        await door.server.start()
        try:
            await act(door)
        finally:
            await asyncio.wait_for(door.server.stop(), 20)

    asyncio.run(run())


def test_a_handshake_has_as_long_as_a_head(monkeypatch: pytest.MonkeyPatch, tls: TlsConfig) -> None:
    monkeypatch.setattr(BoundedConnection, "head_seconds", 0.5)

    async def act(door: Door) -> None:
        silent, half = await door.connect(), await door.connect()
        half[1].write(b"\x16\x03\x01")
        assert await closed(silent) and await closed(half)
        await door.ask(await door.open())

    at_the_door(monkeypatch, tls, act)


def test_connections_count_before_their_handshakes(monkeypatch: pytest.MonkeyPatch, tls: TlsConfig) -> None:
    monkeypatch.setattr(BoundedConnection, "head_seconds", 3.0)
    monkeypatch.setattr(BoundedConnection, "max_connections", 2)

    async def act(door: Door) -> None:
        silent = [await door.connect() for _ in range(2)]
        began = time.monotonic()
        assert await closed(await door.connect()) and time.monotonic() - began < 2
        assert all([await closed(one) for one in silent]), "they had their time"
        first, second = await door.open(), await door.open()
        await door.ask(first)
        await door.ask(second)
        third = await door.open()
        assert await closed(first), "the longest idle"
        await door.ask(third)
        await door.ask(second)

    at_the_door(monkeypatch, tls, act)


def test_a_server_does_not_wait_for_handshakes_to_end(monkeypatch: pytest.MonkeyPatch, tls: TlsConfig) -> None:
    left: list[Opened] = []

    async def act(door: Door) -> None:
        left.append(await door.connect())
        await door.ask(await door.open())
        began = time.monotonic()
        await asyncio.wait_for(door.server.stop(), 20)
        assert time.monotonic() - began < BoundedConnection.head_seconds / 2

    at_the_door(monkeypatch, tls, act)


def test_a_certificate_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, tls: TlsConfig, tmp_path: Path) -> None:
    monkeypatch.setenv(PORT, "0")
    with pytest.raises(ConfigError, match=r"tls: .*no\.pem and .* cannot be used: No such file"):
        HttpServer(FastAPI(), TlsConfig(tmp_path / "no.pem", tls.key_file))
