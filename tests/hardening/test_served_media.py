# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md about servers that misbehave. This graph may fetch from this machine, and from nowhere worse.

Names that change, TLS and lists of hosts need a graph that is told of them: `tests/acceptance/test_media_rules.py`.
"""

from __future__ import annotations

import gzip
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from tests.hardening.edge import CHAT, Door, Peaks, Reply, chat_with, refused
from tests.hardening.report import Clock
from tests.picture_server import PictureServer
from tests.questions import Said, ask, chat, difference, picture, user

pytestmark = pytest.mark.usefixtures("open_unharmed")

WITHIN = 5.0
"""Seconds from asking to the refusal. `media.timeout` ships as half a second less: for the way through the stages."""
PACKED_SECONDS = 2.0
"""For what is small on its way: nobody waits for more of it."""
PACKED_BYTES = 128 << 20
"""What the gzip bomb unpacks to."""
LEFT_PACKED_BYTES = PACKED_BYTES // 2
"""Less than that must a process grow that leaves it packed."""
ENDLESS = 64 * 1024 * 1024
"""More than the largest picture that is taken."""

Say = Callable[[socket.socket], None]


class Scripted:
    """A server on this machine that answers every request with what ``say`` writes, and counts connections, and of
    those the ones on which something was asked."""

    def __init__(self, say: Say, tls: ssl.SSLContext | None = None):
        self._say = say
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.asked = 0
        self.url = self.url_of("127.0.0.1")
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        with suppress(OSError), self._secured(connection) as opened:
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = opened.recv(4096)
                if not piece:
                    return
                asked += piece
            self.asked += 1
            self._say(opened)

    def _secured(self, connection: socket.socket) -> socket.socket:
        return connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True)

    def url_of(self, host: str) -> str:
        """Of a picture on it, for those whom ``host`` leads here."""
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}/x.png"

    def close(self) -> None:
        self._listener.close()


def saying(*pieces: bytes) -> Say:
    def say(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return say


def redirect(location: str, status: str = "302 Found") -> Say:
    return saying(f"HTTP/1.1 {status}\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


def ok(body: bytes = b"", *headers: str, length: int | None = None) -> Say:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body) if length is None else length}", *headers]
    return saying("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def forever(head: bytes, piece: bytes, pause: float = 0.0) -> Say:
    def say(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return say


@cache
def packed() -> bytes:
    return gzip.compress(bytes(PACKED_BYTES))


def later(make: Callable[[], Say]) -> Say:
    """One that is made when it is asked: to make it takes time and memory."""
    return lambda connection: make()(connection)


def then_silence(*pieces: bytes) -> Say:
    def say(connection: socket.socket) -> None:
        saying(*pieces)(connection)
        time.sleep(30)

    return say


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNBOUNDED = b"HTTP/1.0 200 OK\r\n\r\n"
SLOW: dict[str, tuple[Say, str]] = {
    "endless body, chunked": (forever(CHUNKED, b"10000\r\n" + bytes(0x10000) + b"\r\n"), "media_too_large"),
    "endless body, until the end": (forever(UNBOUNDED, bytes(0x10000)), "media_too_large"),
    "length above the limit": (ok(length=ENDLESS), "media_too_large"),
    "length of an exabyte": (ok(length=10**18), "media_too_large"),
    "length above every number": (ok(length=10**40), "invalid_image"),
    "length too long by a byte": (ok(picture(1), length=len(picture(1)) + 1), "media_timeout"),
    "length too long, silent": (then_silence(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"), "media_timeout"),
    "chunks that stop": (saying(CHUNKED + b"5\r\nab"), "media_timeout"),
    "length too short": (ok(picture(1), length=20), "invalid_image"),
    "negative length": (ok(picture(1), length=-1), "invalid_image"),
    "two lengths": (ok(picture(1), "Content-Length: 5"), "invalid_image"),
    "one byte a second": (forever(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"x", 1.0), "media_timeout"),
    "one byte of a header a second": (forever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 1.0), "media_timeout"),
    "early hints for ever": (forever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.01), "media_timeout"),
    "endless headers": (forever(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 4000 + b"\r\n"), "invalid_image"),
    "silence": (then_silence(), "media_timeout"),
    "gzip bomb": (later(lambda: ok(packed(), "Content-Encoding: gzip")), "media_too_large"),
    "gzip in gzip": (later(lambda: ok(gzip.compress(packed()), "Content-Encoding: gzip, gzip")), "media_too_large"),
    "unknown encoding": (later(lambda: ok(packed(), "Content-Encoding: br")), "media_too_large"),
    "gzip as a picture": (later(lambda: ok(packed(), "Content-Type: image/png")), "unsupported_media_type"),
    "no HTTP": (saying(b"SSH-2.0-OpenSSH_9.6\r\n"), "invalid_image"),
    "hangs up": (saying(), "invalid_image"),
    "500": (saying(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"), "invalid_image"),
    "404 with a picture": (saying(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"), "invalid_image"),
    "206": (saying(b"HTTP/1.1 206 Part\r\nContent-Length: 0\r\n\r\n"), "invalid_image"),
    "204": (saying(b"HTTP/1.1 204 Nothing\r\n\r\n"), "invalid_image"),
    "101": (saying(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"), "invalid_image"),
    "empty": (ok(b""), "invalid_image"),
}


@dataclass(frozen=True)
class Asked:
    """What a client was told of a picture on such a server."""

    reply: Reply
    connections: int
    late: float
    """Seconds that this machine had no time for this process meanwhile."""


@pytest.fixture(scope="module")
def answers(open_door: Door) -> Iterator[dict[str, Future[Asked]]]:
    """All servers are asked at once, or the slow ones would take a minute one after the other."""
    with Clock() as clock, ThreadPoolExecutor(len(SLOW)) as pool:

        def ask(say: Say) -> Asked:
            server, before = Scripted(say), clock.late()
            try:
                reply = open_door.post(CHAT, chat_with(server.url))
                return Asked(reply, server.connections, clock.late() - before)
            finally:
                server.close()

        yield {name: pool.submit(ask, say) for name, (say, _) in SLOW.items()}


@pytest.mark.usefixtures("open_neighbour")
class TestServers:
    @pytest.mark.parametrize("name", SLOW)
    def test_a_server_that_misbehaves_is_given_up(self, answers: dict[str, Future[Asked]], name: str) -> None:
        asked = answers[name].result()
        code = SLOW[name][1]
        refused(asked.reply, 415 if code == "unsupported_media_type" else 400, code)
        assert asked.connections == 1, "asked again"
        print(f"{name}: {asked.reply.seconds:.2f} s; this process ran {asked.late:.2f} s late")
        assert asked.reply.seconds < WITHIN + asked.late

    @pytest.mark.parametrize("name", ["gzip bomb", "gzip in gzip", "gzip as a picture"])
    def test_a_gzip_bomb_is_not_unpacked(self, open_door: Door, name: str) -> None:
        """A plain picture goes first: what a process needs once."""
        plain, server = Scripted(ok(picture(1))), Scripted(SLOW[name][0])
        assert open_door.post(CHAT, chat_with(plain.url)).status == 200
        peaks = Peaks(open_door)
        with Clock() as clock:
            reply = open_door.post(CHAT, chat_with(server.url))
        grown = peaks.grown()
        plain.close()
        server.close()
        refused(reply, (400, 415))
        assert max(grown.values()) < LEFT_PACKED_BYTES, grown
        assert reply.seconds < PACKED_SECONDS + clock.late()

    def test_neighbours_are_answered_meanwhile(self, open_door: Door) -> None:
        server = Scripted(then_silence())
        with ThreadPoolExecutor(32) as pool:
            waiting = [pool.submit(open_door.post, CHAT, chat_with(server.url)) for _ in range(32)]
            open_door.neighbour.asks()
            assert not all(one.done() for one in waiting), "the neighbour was kept waiting"
            for one in waiting:
                refused(one.result(), 400, "media_timeout")
        server.close()


PLACES = {
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "metadata name": "http://metadata.google.internal/",
    "metadata in decimal": "http://2852039166/",
    "metadata in IPv6": "http://[fd00:ec2::254]/",
    "link-local": "http://169.254.1.1/",
    "link-local IPv6": "http://[fe80::1]/",
    "IPv4 in IPv6": "http://[::ffff:127.0.0.1]:{port}/",
    "NAT64": "http://[64:ff9b::7f00:1]:{port}/",
    "6to4": "http://[2002:7f00:1::]:{port}/",
    "nothing": "http://0.0.0.0:{port}/",
    "nothing IPv6": "http://[::]:{port}/",
    "decimal": "http://2130706433:{port}/",
    "hex": "http://0x7f000001:{port}/",
    "octal": "http://0177.0.0.1:{port}/",
    "multicast": "http://224.0.0.1/",
    "file": "file:///etc/passwd",
    "data": "data:image/png;base64,AAAA",
    "ftp": "ftp://127.0.0.1:{port}/",
    "gopher": "gopher://127.0.0.1:{port}/_x",
    "user name": "http://user@127.0.0.1:{port}/",
    "port 0": "http://127.0.0.1:0/",
    "port 65536": "http://127.0.0.1:65536/",
    "open bracket": "http://[::1/",
    "backslash": "http:\\\\127.0.0.1:{port}\\",
    "tab": "ht\ttp://169.254.169.254/",
    "too long": "/" + "x" * 9000,
}


@pytest.mark.usefixtures("open_neighbour")
class TestRedirects:
    @pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
    @pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
    def test_a_redirect_to_a_forbidden_place_is_refused(self, open_door: Door, place: str, status: str) -> None:
        server = Scripted(redirect(place.replace("{port}", str(open_door.canary.port)), status))
        refused(open_door.post(CHAT, chat_with(server.url)), 400, "url_not_allowed")
        assert server.connections == 1
        server.close()

    @pytest.mark.parametrize("location", ["/x.png", "?", "//127.0.0.1:{port}/y"], ids=["itself", "a query", "a host"])
    def test_a_redirect_loop_ends(self, open_door: Door, location: str) -> None:
        holder: list[Scripted] = []
        turns = itertools.count()

        def say(connection: socket.socket) -> None:
            redirect(location.replace("{port}", str(holder[0].port)) + str(next(turns)))(connection)

        holder.append(Scripted(say))
        refused(open_door.post(CHAT, chat_with(holder[0].url)), 400, "url_not_allowed")
        assert 1 < holder[0].connections <= 6
        holder[0].close()

    def test_a_redirect_to_nowhere_is_refused(self, open_door: Door) -> None:
        server = Scripted(saying(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"))
        refused(open_door.post(CHAT, chat_with(server.url)), 400, "invalid_image")
        server.close()


@pytest.mark.usefixtures("open_neighbour")
class TestContents:
    """What no refusal is due for: each its own answer."""

    def test_one_address_with_new_content_is_a_new_picture(self, open_door: Door) -> None:
        with PictureServer() as server:
            said = [self.of(open_door, server.put("same.png", picture(91_000 + seed % 2))) for seed in range(4)]
        assert difference(said[0], said[2]) is None and difference(said[1], said[3]) is None
        assert difference(said[0], said[1]) is not None

    def test_addresses_that_differ_in_case_are_two(self, open_door: Door) -> None:
        with PictureServer() as server:
            lower, upper = server.put("name.png", picture(91_002)), server.put("NAME.png", picture(91_003))
            assert difference(self.of(open_door, lower), self.of(open_door, upper)) is not None
            assert server.asked == ["name.png", "NAME.png"]

    def test_more_pictures_than_allowed_are_refused_before_any_fetch(self, open_door: Door) -> None:
        with PictureServer() as server:
            urls = [server.put(f"{index}.png", picture(index)) for index in range(9)]
            refused(open_door.post(CHAT, chat_with(*urls)), 400, "too_many_images", "messages")
            assert server.asked == []

    def test_a_bad_part_is_refused_before_any_fetch(self, open_door: Door) -> None:
        with PictureServer() as server:
            url = server.put("x.png", picture(1))
            for other in ("file:///etc/passwd", "data:,", "data:image/png;base64,!"):
                body: Any = chat_with(url, other)
                refused(open_door.post(CHAT, body), 400)
            assert server.asked == []

    @staticmethod
    def of(door: Door, url: str) -> Said:
        return ask(door.graph.url, chat(user("What is in this image?", url)))
