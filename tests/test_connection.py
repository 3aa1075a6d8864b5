# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from dynamo_epd.http.connection import MAX_CONNECTIONS, BoundedConnection, most_connections
from dynamo_epd.http.limits import guard
from dynamo_epd.http.rates import Rates


class Impatient(BoundedConnection):
    head_seconds = 0.4
    unread_seconds = 0.5


PIECE = 64 * 1024
open_streams = 0
silences: list[str] = []


@contextmanager
def running(protocol: type[BoundedConnection], rates: Rates | None = None) -> Iterator[int]:
    app = FastAPI()
    guard(app, rates=rates)

    @app.get("/")
    async def root() -> str:
        return "here"

    @app.post("/headers")
    async def headers(request: Request) -> list[str]:
        await request.body()
        return sorted(request.headers)

    @app.get("/stream")
    async def stream(pieces: int, pause: float = 0.0) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            global open_streams
            open_streams += 1
            try:
                for _ in range(pieces):
                    yield bytes(PIECE)
                    await asyncio.sleep(pause)
            finally:
                open_streams -= 1

        return StreamingResponse(body())

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.get("/silent")
    async def silent(request: Request) -> None:
        """Until its client leaves, which it is told without asking again and again."""
        silences.append("begun")
        await request.receive()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        silences.append("ended")

    @app.get("/whole")
    async def whole(size: int, pause: float = 0.0) -> Response:
        await asyncio.sleep(pause)
        return Response(bytes(size))

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=protocol, loop="asyncio", log_level="error", timeout_keep_alive=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(Impatient) as port:
        yield port


@pytest.fixture(scope="module")
def patient_port() -> Iterator[int]:
    with running(BoundedConnection) as port:
        yield port


def say(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything that the server answers until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        said = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while got := connection.recv(65536):
                said += got
        except (ConnectionResetError, BrokenPipeError):
            pass
        return said


def answers(connection: socket.socket) -> None:
    """Reads one reply of the route ``/``, which may come in two pieces."""
    said = b""
    while b'"here"' not in said:
        got = connection.recv(65536)
        assert got, said
        said += got


def refused(said: bytes, status: int, code: str) -> None:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert b"connection: close" in head
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head + b"\r\n")
    assert json.loads(body)["error"]["code"] == code


def test_a_refusal_has_an_id_of_its_own_and_a_line_with_it(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also behind an answered request, whose client may be another one behind a proxy."""
    caplog.set_level(logging.INFO, "dynamo_epd.request")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET + b"x-request-id: mine\r\n\r\n")
        answers(connection)
        connection.sendall(b"\r\n")
        said = connection.recv(65536)
    refused(said, 408, "request_timeout")
    (found,) = re.findall(rb"x-request-id: (\S+)", said)
    assert [one.getMessage() for one in caplog.records if one.name == "dynamo_epd.request"] == [
        f"{found.decode()} 408 request_timeout"
    ]


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
LAST = GET + b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("pieces", [[], [b"GET"], [GET], [GET + b"X-A: "]], ids=["nothing", "method", "line", "header"])
def test_a_head_that_stalls_is_408(port: int, pieces: list[bytes]) -> None:
    refused(say(port, *pieces), 408, "request_timeout")
    assert httpx.get(f"http://127.0.0.1:{port}").text == '"here"'


def test_a_head_that_drips_is_408(port: int) -> None:
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET)
        connection.settimeout(0.05)
        deadline = time.monotonic() + 10
        while b"}}" not in said and time.monotonic() < deadline:
            connection.sendall(b"X")
            with suppress(TimeoutError):
                said += connection.recv(65536)
    refused(said, 408, "request_timeout")


def test_the_second_request_of_a_connection_has_the_same_patience(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET + b"\r\n")
        answers(connection)
        time.sleep(1)  # idle between requests is uvicorn's keep-alive, not ours
        connection.sendall(GET + b"\r\n")
        answers(connection)
        connection.sendall(GET)
        refused(connection.recv(65536), 408, "request_timeout")


def test_an_empty_line_between_requests_is_no_way_to_stay(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET + b"\r\n")
        answers(connection)
        connection.sendall(b"\r\n")
        time.sleep(0.1)
        connection.sendall(GET + b"\r\n")  # RFC 9112, 2.2: a server ignores one
        answers(connection)
        time.sleep(1)
        connection.sendall(b"\r\n")
        refused(connection.recv(65536), 408, "request_timeout")


def test_requests_ahead_of_their_answers_are_answered_in_order_up_to_a_bound(patient_port: int) -> None:
    most = BoundedConnection.most_pipelined
    assert say(patient_port, (GET + b"\r\n") * most + LAST).count(b'"here"') == most + 1
    assert say(patient_port, (GET + b"\r\n") * 5000 + LAST).count(b'"here"') < 100
    assert httpx.get(f"http://127.0.0.1:{patient_port}").text == '"here"'


@pytest.mark.parametrize("piece", [b"x", b"X-A: b\r\n"], ids=["one header without end", "headers without end"])
def test_a_head_without_end_is_cut_off(patient_port: int, piece: bytes) -> None:
    said = b""
    with socket.create_connection(("127.0.0.1", patient_port), timeout=10) as connection:
        connection.sendall(GET + b"X-B: ")
        sent = 0
        try:
            while sent < 50_000_000:
                connection.sendall(piece * 4096)
                sent += len(piece) * 4096
        except OSError:
            pass
        assert sent < 50_000_000  # it hung up; its reply may be lost under what was still on the way
        with suppress(OSError):
            said = connection.recv(65536)
    assert said == b"" or said.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        GET + b"bad header\r\n\r\n",
        GET + b"Transfer-Encoding: x\r\n\r\n{}",
        GET + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        GET + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\nno size\r\n",
    ],
)
def test_what_is_not_http_gets_the_usual_body(port: int, head: bytes) -> None:
    refused(say(port, head), 400, "invalid_request")


def test_nonsense_behind_a_whole_request_takes_no_answer_from_it(port: int) -> None:
    said = say(port, GET + b"\r\n", b"nonsense\r\n\r\n", pause=0.2)
    assert b'"here"' in said


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Polls; the bound only keeps a failing test from hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


def reader(port: int, route: str) -> socket.socket:
    """A client with a small window that has asked and not yet read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {route} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


def cut_off(connection: socket.socket) -> bool:
    """Whether the server has reset it; reads nothing."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_a_stream_that_nobody_reads_is_cut_off_and_its_route_ends(port: int) -> None:
    with reader(port, "/stream?pieces=400") as connection:
        eventually(lambda: open_streams == 1, "the stream begins")
        eventually(lambda: cut_off(connection), "it is reset")
        eventually(lambda: open_streams == 0, "what the route held is free")
    assert httpx.get(f"http://127.0.0.1:{port}").text == '"here"'


def test_a_stream_with_a_request_behind_it_still_learns_that_its_client_left(port: int) -> None:
    with reader(port, "/stream?pieces=1000&pause=0.02") as connection:
        eventually(lambda: open_streams == 1, "the stream begins")
        connection.sendall(GET + b"\r\n")
        time.sleep(0.1)
    eventually(lambda: open_streams == 0, "what the route held is free", 5)


@pytest.mark.parametrize("leaves", ["ends", "resets"])
@pytest.mark.parametrize(
    "ahead",
    [
        [GET + b"\r\n"],
        [GET + b"\r\n", GET],
        [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + bytes(1000)],
        [
            GET
            + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n"
        ],
    ],
    ids=["request", "one and a half", "half a body", "WebSocket"],
)
def test_a_route_learns_that_its_client_left_whatever_that_sent_ahead(
    patient_port: int, ahead: list[bytes], leaves: str
) -> None:
    silences.clear()
    with socket.create_connection(("127.0.0.1", patient_port), timeout=20) as connection:
        connection.sendall(GET.replace(b"/", b"/silent", 1) + b"\r\n")
        eventually(lambda: silences == ["begun"], "the route begins")
        for piece in ahead:
            connection.sendall(piece)
            time.sleep(0.1)
        if leaves == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert silences == ["begun"]
    eventually(lambda: silences == ["begun", "ended"], "the route is told", 5)


def test_what_is_sent_in_one_piece_with_a_request_blinds_it_as_little(patient_port: int) -> None:
    silences.clear()
    with socket.create_connection(("127.0.0.1", patient_port), timeout=20) as connection:
        connection.sendall(GET.replace(b"/", b"/silent", 1) + b"\r\n" + GET + b"\r\n")
        eventually(lambda: silences == ["begun"], "the route begins")
        time.sleep(0.1)
    eventually(lambda: silences == ["begun", "ended"], "the route is told", 5)


def test_more_than_a_little_ahead_of_an_answer_is_cut_off(patient_port: int) -> None:
    silences.clear()
    sent = 0
    with socket.create_connection(("127.0.0.1", patient_port), timeout=20) as connection:
        connection.sendall(GET.replace(b"/", b"/silent", 1) + b"\r\n")
        eventually(lambda: silences == ["begun"], "the route begins")
        connection.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
        with suppress(OSError):
            while sent < 50_000_000:
                connection.sendall(bytes(10_000))
                sent += 10_000
        eventually(lambda: silences == ["begun", "ended"], "what the request held is free", 5)
    assert sent < 50_000_000


def test_what_is_sent_ahead_in_pieces_is_answered_in_order(port: int) -> None:
    """The second one's head has begun when the first is taken up, and is not whole within its time: nobody read on."""
    body = bytes(range(200)) * 200
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    first = GET.replace(b"/", b"/stream?pieces=1&pause=1.5", 1) + b"\r\n"
    said = say(port, first + head[:9], head[9:], body[:99], body[99:] + GET + b"\r\n" + LAST, pause=0.25)
    assert said.count(b"HTTP/1.1 200 OK") == 4
    assert bytes(PIECE) in said
    assert body + b"HTTP/1.1 200 OK" in said and said.count(b'"here"') == 2 and said.endswith(b'"here"')


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
"""Of Java's HttpClient, with the first request of each connection."""
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


@pytest.mark.parametrize("wish", [H2C, WEBSOCKET], ids=["h2c", "WebSocket"])
@pytest.mark.parametrize("pause", [None, 0.05], ids=["one piece", "pieces"])
def test_a_wish_for_another_protocol_is_not_heard_and_the_body_is_whole(
    patient_port: int, wish: bytes, pause: float | None
) -> None:
    body = GET + b"\r\n"  # a request, to whoever takes the head for all of the first
    start = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + wish
    whole = start + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    sent = whole + chunked + GET + wish + b"\r\n" + LAST
    pieces = [sent] if pause is None else [sent[at : at + 70] for at in range(0, len(sent), 70)]
    said = say(patient_port, *pieces, pause=pause or 0)
    assert said.count(b"HTTP/1.1 200 OK") == 4
    assert said.count(body) == 2 and said.count(b'"here"') == 2 and said.endswith(b'"here"')


@pytest.mark.parametrize(
    "start",
    [
        b"POST /headers HTTP/1.1\r\nConnection: close, Upgrade\r\n",
        b"POST /headers HTTP/1.0\r\nConnection: Upgrade\r\n",
    ],
)
def test_a_last_request_with_such_a_wish_is_answered_too(patient_port: int, start: bytes) -> None:
    said = say(patient_port, start + b"Host: x\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n", b"{}" + LAST, pause=0.1)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(b'["connection","content-length","host"]')


@pytest.mark.parametrize("target", [b"x:443", b"/", b"/echo"])
def test_connect_is_refused_with_all_that_follows(patient_port: int, target: bytes) -> None:
    follows = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    said = say(patient_port, b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n" + follows)
    refused(said, 405, "method_not_allowed")


def test_an_address_is_not_even_decoded_above_a_bound(patient_port: int) -> None:
    for long in (b"/" + b"%41" * 80_000, b"/live?" + b"a&" * 100_000):
        refused(say(patient_port, GET.replace(b"/", long, 1) + b"\r\n"), 414, "url_too_long")


def test_a_stream_that_nobody_reads_gives_its_place_among_the_tenants_requests_back() -> None:
    with running(Impatient, Rates(None, 1)) as port, reader(port, "/stream?pieces=400"):
        eventually(lambda: open_streams == 1, "the stream begins")
        eventually(lambda: httpx.get(f"http://127.0.0.1:{port}").status_code == 200, "no more 429")


def test_a_whole_reply_that_nobody_reads_is_cut_off(port: int) -> None:
    with reader(port, f"/whole?size={400 * PIECE}") as connection:
        eventually(lambda: cut_off(connection), "it is reset")


def test_a_client_that_reads_slowly_gets_all(port: int) -> None:
    with reader(port, f"/whole?size={96 * PIECE}") as connection:
        got = 0
        while got < 96 * PIECE:
            piece = connection.recv(2 * PIECE)
            assert piece, got
            got += len(piece)
            if got < 30 * PIECE:
                time.sleep(0.01)  # many times `unread_seconds` in all
    assert open_streams == 0


def test_a_second_reply_is_not_judged_by_what_was_unread_of_the_first(port: int) -> None:
    def read(connection: socket.socket, size: int, slowly_until: float) -> None:
        connection.sendall(f"GET /whole?size={size} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        said = connection.recv(PIECE)
        left = size + said.index(b"\r\n\r\n") + 4 - len(said)
        while left:
            piece = connection.recv(min(left, PIECE))
            assert piece, left
            left -= len(piece)
            if time.monotonic() < slowly_until:
                time.sleep(0.01)

    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        read(connection, 8_000_000, slowly_until=0)
        # More than the first is unread when a watch that the first began would end.
        read(connection, 24_000_000, slowly_until=time.monotonic() + 2 * Impatient.unread_seconds)


def test_a_stream_that_has_nothing_to_say_is_not_one_that_nobody_reads(port: int) -> None:
    with httpx.stream("GET", f"http://127.0.0.1:{port}/stream?pieces=3&pause=0.8") as reply:
        assert len(reply.read()) == 3 * PIECE


POST = b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "piece",
    [b"X-A: " + b"b" * 1000 + b"\r\n", b"b" * 1000],
    ids=["trailers without end", "one trailer without end"],
)
def test_trailers_without_end_are_cut_off(patient_port: int, piece: bytes) -> None:
    sent, said = 0, b""
    with socket.create_connection(("127.0.0.1", patient_port), timeout=20) as connection:
        connection.sendall(POST + b"1\r\nx\r\n0\r\nX-B: ")
        with suppress(OSError):
            while sent < 50_000_000:
                connection.sendall(piece * 64)
                sent += len(piece) * 64
        assert sent < 50_000_000
        with suppress(OSError):
            said = connection.recv(65536)
    assert said == b"" or said.startswith(b"HTTP/1.1 431 ")
    refused(say(patient_port, POST + b"0\r\nX-B: ", piece * 17, pause=0.3), 431, "headers_too_large")


def test_a_trailer_is_no_header(patient_port: int) -> None:
    said = say(
        patient_port, POST.replace(b"x\r\n", b"x\r\nConnection: close\r\n", 1) + b"1\r\nx\r\n0\r\nX-A: b\r\n\r\n"
    )
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(b'["connection","host","transfer-encoding"]')


def test_small_chunks_are_not_trailers(patient_port: int) -> None:
    pieces = [b"1;a=b\r\nx\r\n" * 4000] * 3
    said = say(
        patient_port, POST.replace(b"x\r\n", b"x\r\nConnection: close\r\n", 1), *pieces, b"0\r\n\r\n", pause=0.05
    )
    assert said.startswith(b"HTTP/1.1 200 ")


class Few(BoundedConnection):
    max_connections = 3


def test_a_connection_too_many_closes_the_longest_idle_or_is_refused() -> None:
    with running(Few) as port, ExitStack() as held:

        def connected() -> socket.socket:
            return held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))

        def asks(connection: socket.socket) -> None:
            connection.sendall(GET + b"\r\n")
            answers(connection)

        first, second, third = connected(), connected(), connected()
        for one in (second, first, third, second):
            asks(one)
        fourth = connected()
        asks(fourth)
        assert first.recv(1) == b"", "closed: the others were asked later"
        for one in (second, third, fourth):
            asks(one)
            one.sendall(b"GET")  # begun, and not idle any more
        said = connected().recv(65536)
        refused(said, 503, "overloaded")
        assert b"retry-after: 1\r\n" in said
        third.sendall(GET.removeprefix(b"GET") + b"\r\n")
        answers(third)
        asks(connected())
        assert third.recv(1) == b""


@pytest.mark.parametrize(("descriptors", "connections"), [(1024, 768), (10**6, MAX_CONNECTIONS), (-1, MAX_CONNECTIONS)])
def test_connections_leave_descriptors_to_others(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert most_connections() == connections


# At the server's end


class Lingering(BoundedConnection):
    leaving_seconds = 4.0


def test_a_request_on_its_way_to_a_server_that_leaves_is_answered() -> None:
    with ExitStack() as server, ExitStack() as clients:
        port = server.enter_context(running(Lingering))
        used, fresh = (
            clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(2)
        )
        used.sendall(GET + b"\r\n")
        answers(used)
        fresh.sendall(GET)
        ending = threading.Thread(target=server.close)
        ending.start()
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=20).close()
            except ConnectionRefusedError:
                break
            time.sleep(0.01)
        used.sendall(GET + b"\r\n")
        answers(used)
        fresh.sendall(b"\r\n")
        answers(fresh)
        ending.join()


def test_what_was_sent_ahead_of_a_servers_last_answer_is_not_begun() -> None:
    silences.clear()
    with ExitStack() as server:
        port = server.enter_context(running(BoundedConnection))
        with reader(port, f"/whole?size={400 * PIECE}&pause=1.5") as connection:
            time.sleep(0.3)  # what comes in one piece with the first is answered still
            connection.sendall(GET.replace(b"/", b"/silent", 1) + b"\r\n")
            time.sleep(0.3)
            ending = threading.Thread(target=server.close)
            ending.start()
            assert connection.recv(1, socket.MSG_PEEK), "answered, and not yet at its end, for most is unread"
            time.sleep(0.3)
        ending.join()
    assert silences == []
