# SPDX-License-Identifier: Apache-2.0
"""The edge in front of a real server, spoken to over raw sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request

from dynamo_epd.http.auth import Callers, Keys, new_key
from dynamo_epd.http.connection import BoundedConnection
from dynamo_epd.http.limits import RequestBounds, guard
from dynamo_epd.http.rates import Rates
from tests.serving import eventually

BOUNDS = RequestBounds(body_bytes=100_000, bodies_bytes=150_000, body_seconds=1.0, idle_seconds=0.4, drain_seconds=1.0)


def application(callers: Callers | None = None, rates: Rates | None = None) -> FastAPI:
    app = FastAPI()
    guard(app, BOUNDS, callers, rates)
    app.state.seen = []

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, object]:
        body = await request.body()
        app.state.seen.append(len(body))
        return {"digest": hashlib.sha256(body).hexdigest(), "id": request.state.request_id}

    @app.post("/wait")
    async def wait(request: Request) -> dict[str, object]:
        await request.body()
        app.state.seen.append("came")
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        app.state.seen.append("left")
        return {}

    @app.post("/defect")
    async def defect() -> None:
        raise RuntimeError("secret")

    @app.get("/")
    async def root() -> dict[str, object]:
        return {}

    return app


class Running:
    def __init__(self, app: FastAPI, port: int):
        self.app = app
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def send(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        """Everything that the server says until it hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            for piece in pieces:
                try:
                    connection.sendall(piece)
                except OSError:
                    break
                time.sleep(pause)
            said = b""
            while got := self._read(connection):
                said += got
            return said

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        try:
            return connection.recv(65536)
        except ConnectionResetError:
            return b""


@contextmanager
def running(kind: str | type[BoundedConnection], app: FastAPI | None = None) -> Iterator[Running]:
    app = app or application()
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=kind, log_level="error", h11_max_incomplete_event_size=1 << 20)  # type: ignore[arg-type]
    )
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(app, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=["httptools", "h11", BoundedConnection])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(request.param) as up:
        yield up


def head(length: int | None, *lines: str) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join(["POST /echo HTTP/1.1", "Host: x", size, *lines]).encode() + b"\r\n\r\n"


def refused(said: bytes, status: int, code: str) -> None:
    top, _, body = said.partition(b"\r\n\r\n")
    assert top.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert re.search(rb"(?im)^x-request-id: [0-9a-f]{32}\r?$", top)
    assert re.search(rb"(?im)^connection: close\r?$", top)
    assert json.loads(body)["error"]["code"] == code and len(body) <= 2048


def alive(server: Running) -> None:
    assert httpx.get(server.url).status_code == 200


def test_a_body_arrives_whole(server: Running) -> None:
    for size in (0, 1, 70_000, BOUNDS.body_bytes):
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        for content in (body, iter([body[:10], body[10:]])):
            reply = httpx.post(f"{server.url}/echo", content=content)
            assert reply.json()["digest"] == hashlib.sha256(body).hexdigest()


def test_a_declared_body_over_the_bound_is_413_at_once(server: Running) -> None:
    seen = list(server.app.state.seen)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head(BOUNDS.body_bytes + 1))
        said = connection.recv(65536)  # nothing of the body was sent
        while b"}}" not in said:
            said += connection.recv(65536)
    refused(said, 413, "payload_too_large")
    refused(server.send(head(10**17)), 413, "payload_too_large")
    assert server.app.state.seen == seen
    alive(server)


def test_a_chunked_body_over_the_bound_is_413(server: Running) -> None:
    seen = list(server.app.state.seen)
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"
    refused(server.send(head(None), chunk * 7), 413, "payload_too_large")
    assert server.app.state.seen == seen
    alive(server)


def test_a_client_that_writes_all_before_it_reads_is_let_to(server: Running) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for whole in (head(20_000_000) + bytes(20_000_000), head(None) + chunk * 300 + b"0\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(whole)  # many clients never read the reply when this fails
            said = connection.recv(65536)
            while b"}}" not in said:
                said += connection.recv(65536)
        refused(said, 413, "payload_too_large")


def test_a_body_that_stalls_is_408(server: Running) -> None:
    refused(server.send(head(1000), b"x" * 10), 408, "request_timeout")
    alive(server)


def test_a_body_that_drips_is_408(server: Running) -> None:
    refused(server.send(head(1000), *[b"x"] * 20, pause=0.1), 408, "request_timeout")
    alive(server)


def test_too_many_headers_are_431(server: Running) -> None:
    lines = [f"X-{i}: y" for i in range(10_000)]
    refused(server.send(head(0, *lines)), 431, "headers_too_large")
    refused(server.send(head(0, *lines[:101])), 431, "headers_too_large")
    alive(server)


def test_large_headers_are_431(server: Running) -> None:
    refused(server.send(head(0, "X-Big: " + "y" * 20_000)), 431, "headers_too_large")
    alive(server)


@pytest.mark.parametrize("long", ["/{}", "/live?{}", "/live?a={}", "/{}?{}"])
def test_a_long_address_is_414(server: Running, long: str) -> None:
    most = RequestBounds.url_bytes
    fits = long.replace("{}", "a&" * 5000) if long.count("{}") == 1 else long.replace("{}", "a&" * 3500)
    assert httpx.get(server.url + fits).status_code == 404
    text = long.replace("{}", "a" * (most // long.count("{}")))
    refused(server.send(f"GET {text} HTTP/1.1\r\nHost: x\r\n\r\n".encode()), 414, "url_too_long")
    alive(server)


def test_the_clients_request_id_is_echoed_where_it_is_harmless(server: Running) -> None:
    for name in ("abc", "A-1_2.3", "z" * 128):
        reply = httpx.post(f"{server.url}/echo", headers={"x-request-id": name})
        assert reply.headers["x-request-id"] == name == reply.json()["id"]
    seen = set()
    for name in ("", "z" * 129, "a b", "a/../b", "\u00e9", "<script>", "a;b"):
        reply = httpx.post(f"{server.url}/echo", headers={b"x-request-id": name.encode()})
        given = reply.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given) and given == reply.json()["id"]
        seen.add(given)
    assert len(seen) == 7


def test_errors_carry_the_id_too(server: Running) -> None:
    for method, path, status in (("POST", "/defect", 500), ("GET", "/nowhere", 404), ("GET", "/echo", 405)):
        reply = httpx.request(method, server.url + path, headers={"x-request-id": "mine"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, "mine")
        assert "secret" not in reply.text and reply.headers.get_list("x-request-id") == ["mine"]


def test_what_is_refused_before_its_route_has_a_line(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynamo_epd.request")
    long = httpx.post(f"{server.url}/echo", content=bytes(200_000), headers={"x-request-id": "mine"})
    assert (long.status_code, long.headers["x-request-id"]) == (413, "mine")
    assert httpx.get(f"{server.url}/nowhere").status_code == 404
    assert [one.getMessage() for one in caplog.records if one.name == "dynamo_epd.request"] == [
        "mine 413 payload_too_large"
    ]


def test_what_many_send_at_once_is_bounded_too(server: Running) -> None:
    body = bytes(80_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as answered_late:
        answered_late.sendall(head(len(body)).replace(b"/echo", b"/wait") + body)
        eventually(lambda: server.send(head(len(body)), body).startswith(b"HTTP/1.1 503 "), "the first is in hand")
        said = server.send(head(len(body)), body)
        refused(said, 503, "overloaded")
        assert re.search(rb"(?im)^retry-after: \d+\r?$", said)
        assert httpx.post(f"{server.url}/echo", content=body[:60_000]).status_code == 200
    eventually(lambda: httpx.post(f"{server.url}/echo", content=body).status_code == 200, "the room is free again")


def test_a_client_that_leaves_while_sending_reaches_no_route(server: Running) -> None:
    seen = list(server.app.state.seen)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(1000) + b"x" * 10)
        time.sleep(0.1)
    alive(server)
    assert server.app.state.seen == seen


def test_a_route_still_notices_that_the_client_left(server: Running) -> None:
    seen = server.app.state.seen
    before = Counter(seen)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(3).replace(b"/echo", b"/wait") + b"abc")
        eventually(lambda: seen.count("came") > before["came"], "the route is entered")
        assert Counter(seen) - before == {"came": 1}
    eventually(lambda: seen.count("left") > before["left"], "the route notices")
    assert Counter(seen) - before == {"came": 1, "left": 1}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """With one key, one request at once, and its header line."""
    path = tmp_path_factory.mktemp("keyed") / "keys.yaml"
    key, line = new_key("ann")
    path.write_text(line)
    with running(BoundedConnection, application(Callers(Keys(path), None), Rates(None, 1))) as up:
        yield up, f"Authorization: Bearer {key}"


def test_a_stranger_is_refused_on_the_head_alone_and_reads_it_though_he_writes_on(keyed: tuple[Running, str]) -> None:
    server, key = keyed
    refused(server.send(head(90_000)), 401, "invalid_api_key")
    refused(server.send(head(90_000), b"x" * 90_000), 401, "invalid_api_key")
    refused(server.send(head(None), b"5\r\nhello\r\n"), 401, "invalid_api_key")
    refused(server.send(head(90_000, "Expect: 100-continue")), 401, "invalid_api_key")
    refused(server.send(head(0).replace(b"/echo", b"/echo?" + b"a" * 20_000)), 414, "url_too_long")
    assert server.app.state.seen == []
    assert server.send(head(2, key, "Connection: close"), b"{}").startswith(b"HTTP/1.1 200 ")


def test_a_place_is_taken_from_the_head_to_the_end_and_given_back_however_that_comes(
    keyed: tuple[Running, str],
) -> None:
    server, key = keyed
    last = (key, "Connection: close")

    def free() -> None:
        end = time.monotonic() + 20
        while not server.send(head(0, *last)).startswith(b"HTTP/1.1 200 "):
            assert time.monotonic() < end

    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(head(10, key) + b"12345")  # the rest never comes: 408
        slow.recv(1, socket.MSG_PEEK)
    free()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as waiting:
        waiting.sendall(head(0, key).replace(b"/echo", b"/wait"))
        end = time.monotonic() + 20
        while not (said := server.send(head(0, *last))).startswith(b"HTTP/1.1 429 "):
            assert time.monotonic() < end
        refused(said, 429, "rate_limit_exceeded")
        assert re.search(rb"(?im)^retry-after: 1\r?$", said)
    free()
    assert server.send(head(0, *last).replace(b"/echo", b"/defect")).startswith(b"HTTP/1.1 500 ")
    free()


def test_a_defect_of_the_edge_itself_is_a_500_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Callers):
        def tenant_of(self, method: str, path: str, query: bytes, authorization: str | None) -> tuple[str, bool]:
            raise ValueError("secret")

    with running(BoundedConnection, application(Broken(None, None))) as up, caplog.at_level(logging.WARNING):
        reply = httpx.get(up.url, headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert [one.message for one in caplog.records] == ["request mine failed"]
