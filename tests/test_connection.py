# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from dynamo_epd.http.connection import BoundedConnection
from dynamo_epd.http.limits import guard


class Impatient(BoundedConnection):
    head_seconds = 0.4


@contextmanager
def running(protocol: type[BoundedConnection]) -> Iterator[int]:
    app = FastAPI()
    guard(app)

    @app.get("/")
    async def root() -> str:
        return "here"

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_level="error", timeout_keep_alive=30))
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


def refused(said: bytes, status: int, code: str) -> None:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == code


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


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
        assert b'"here"' in connection.recv(65536)
        time.sleep(1)  # idle between requests is uvicorn's keep-alive, not ours
        connection.sendall(GET + b"\r\n")
        assert b'"here"' in connection.recv(65536)
        connection.sendall(GET)
        refused(connection.recv(65536), 408, "request_timeout")


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
