# SPDX-License-Identifier: Apache-2.0
"""Bounds on what no ASGI middleware sees: connections, heads before they are complete, replies that nobody takes.

uvicorn waits for request lines and headers without limit of time or size, and for a client that reads nothing of its
reply without end; either would hold a connection, and what its request holds, for ever.
``uvicorn.Config(http=BoundedConnection)`` ends that, `TlsConnection` in its place the same over TLS.
"""

from __future__ import annotations

import asyncio
import fcntl
import resource
import socket
import ssl
import struct
import termios
from asyncio.sslproto import SSLProtocol
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dynamo_epd.errors import (
    EpdError,
    HeadersTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    RequestTimeout,
    UrlTooLong,
)
from dynamo_epd.http.errors import error_response
from dynamo_epd.http.limits import request_id_of, request_log

MAX_CONNECTIONS = 16384
"""Of one process, however many descriptors it has: each takes some ten kilobytes."""


def most_connections() -> int:
    """Three quarters of the descriptors that this process may open; the rest are NATS', discovery's and files'."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if descriptors == resource.RLIM_INFINITY else min(descriptors * 3 // 4, MAX_CONNECTIONS)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with bounds, and OpenAI's body for what is over them or cannot be read."""

    max_connections = most_connections()
    """Open at once. One more closes the one that has been idle for longest, or is refused where none is."""
    head_seconds = 10.0
    """From the connection's start, or from a request's first byte, to the end of its headers. A TLS handshake has as
    long before that."""
    head_bytes = 256 * 1024
    """Above what `RequestLimits` takes, so that its reply is the usual one; this one stops what never ends."""
    url_bytes = 32 * 1024
    """Above what `RequestLimits` takes, as `head_bytes`; uvicorn decodes a whole path, a megabyte a second."""
    trailer_bytes = 16 * 1024
    """Between two pieces of a chunked body, and behind the last: chunk extensions and trailers, which nobody reads."""
    unread_seconds = 30.0
    """In which a client takes `unread_bytes` of a reply that waits for it. A phone changes cells within less, and what
    the request holds (a place, leases) is wanted by others."""
    unread_bytes = 16 * 1024
    """Half a kilobyte a second, which any link carries."""

    most_pipelined = 32
    """Requests that may wait behind the one that is being answered. Few clients send any; more close the connection,
    or one could fill the memory with heads."""
    ahead_bytes = 64 * 1024
    """Of such requests, beyond the piece that the one being answered came in. They are taken from the socket, for else
    nobody would see the client leave, and read by nobody before that answer is out; more close the connection."""
    leaving_seconds = 0.5
    """Between a server's last connection and the end of those on which nothing is being answered: a request that is on
    its way there still is. What reaches a closed connection is reset, and nobody knows whether it was done."""

    _patience: asyncio.TimerHandle | None = None
    _received = 0
    _beside_body = 0
    _reading: asyncio.TimerHandle | None = None
    _untaken = 0
    _running: RequestResponseCycle | None = None
    _ahead = b""

    def counts(self, transport: asyncio.Transport) -> bool:
        """Counts this connection from now on, before `connection_made`. False where there is no room for it.

        ``transport``: what `shutdown` closes meanwhile.
        """
        self.transport = transport
        self.connections.add(self)
        return self._has_room()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counted = self in self.connections
        super().connection_made(transport)
        if counted or self._has_room():
            self._wait_for_head()
        else:
            self._refuse(Overloaded(f"{self.max_connections} connections are open; try again later"))

    def shutdown(self) -> None:
        """Called once the server takes no connections any more: this one ends after what is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
        else:
            self.loop.call_later(self.leaving_seconds, super().shutdown)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._stop_waiting()
        self._stop_watching()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the newest request alone, which may only wait behind this one.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # after the last answer, or a refusal: what was sent ahead of that is not taken
        if self._answering:
            self._ahead += data
            if len(self._ahead) > self.ahead_bytes:
                self.transport.abort()
            return
        self._idle.pop(self, None)
        self._unset_keepalive_if_required()
        self._beside_body += len(data)
        self._parse(data)
        if self._in_head:
            self._received += len(data)
            if self._received > self.head_bytes:
                self._refuse(HeadersTooLarge(f"the headers have more than {self.head_bytes} bytes"))
        elif self.cycle is not None and self.cycle.more_body and self._beside_body > self.trailer_bytes:
            self._refuse(HeadersTooLarge(f"the trailers have more than {self.trailer_bytes} bytes"))
        elif self._rests and self.timeout_keep_alive_task is None:
            self._wait_for_head()  # an empty line, which no callback tells of, has ended uvicorn's patience

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self.most_pipelined:
            raise ValueError("too many requests ahead of their answers")  # httptools makes it an HttpParserError
        super().on_message_begin()
        self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # uvicorn would make a header of a trailer, after all checks of them (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise MethodNotAllowed("this server is no proxy: it does not take CONNECT")
        if len(self.url) > self.url_bytes:
            raise UrlTooLong(f"the path and the query have more than {self.url_bytes} bytes")
        if self.parser.should_upgrade():
            return  # `_parse` has it read again
        self._stop_waiting()
        self._beside_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.cycle.response_complete:  # else nothing is left to pause for, and the rest is still unread
            self._stop_watching()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            self.data_received(ahead)
        if self.timeout_keep_alive_task is not None:
            self._idle[self] = None
        if self._rests and not self._in_head:
            self.scope = None  # type: ignore[assignment]  # a refusal of what comes next is not this request's
        if self.transport.get_write_buffer_size():  # too little of it to pause for, perhaps
            self._watch_reader()

    def _parse(self, data: bytes) -> None:
        """Feeds the parser, which stops at a request to change the protocol and would take its body for the new one's.

        No other protocol is spoken here, WebSocket neither. Java's HttpClient asks for h2c with each of its first
        requests: that is read again as the plain request that it is as well (RFC 9110, 7.8).
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stop:
                (end,) = stop.args
                data = self._head_without_upgrade() + data[end:]
                # The old one is at its end where the connection is to close after this request.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError as error:
                self.logger.warning("Invalid HTTP request received.")
                raised = error.__context__  # by a callback
                self._refuse(
                    raised if isinstance(raised, EpdError) else InvalidRequest("the request is not valid HTTP")
                )
                return
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        first = b" ".join((self.parser.get_method(), self.url, f"HTTP/{self.parser.get_http_version()}".encode()))
        others = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join((first, *others, b"", b""))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _in_head(self) -> bool:
        return self._patience is not None

    @property
    def _answering(self) -> bool:
        """A request has come whole and its answer is not out: what comes now is ahead of that."""
        running = self._running
        return running is not None and not (running.more_body or running.response_complete)

    @property
    def _rests(self) -> bool:
        """Between two requests: all are answered, and their bodies have come, which `RequestLimits` sees to."""
        answered = self.cycle is not None and self.cycle.response_complete and not self.pipeline
        return answered and not self.transport.is_closing()

    def _wait_for_head(self) -> None:
        if self._patience is None:
            self._received = 0
            self._patience = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _has_room(self) -> bool:
        return len(self.connections) <= self.max_connections or self._close_an_idle_one()

    def _close_an_idle_one(self) -> bool:
        """Whether there was one: between two requests, that is."""
        while self._idle:
            longest = next(iter(self._idle))
            del self._idle[longest]
            if not longest.transport.is_closing():
                longest.timeout_keep_alive_handler()
                return True
        return False

    @property
    def _idle(self) -> dict[BoundedConnection, None]:
        """Of this server, the longest idle first: where connections are many nobody can look through all of them."""
        found: dict[BoundedConnection, None] = vars(self.server_state).setdefault("idle", {})
        return found

    def _watch_reader(self) -> None:
        """Anew from now on: what is unsent now is the present reply's, and no longer an earlier one's."""
        self._stop_watching()
        self._untaken = self._unsent()
        self._reading = self.loop.call_later(self.unread_seconds, self._judge_reader)

    def _stop_watching(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _judge_reader(self) -> None:
        self._reading = None
        if not self.transport.get_write_buffer_size():
            return
        if self._untaken - self._unsent() < self.unread_bytes:
            # A reset: to close would wait for the client to read, here or in the kernel.
            self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self._watch_reader()

    def _unsent(self) -> int:
        """Bytes that wait here and, until the client's machine acknowledges them, in the kernel (``man 7 tcp``), which
        takes from here a megabyte at a time: by the first alone a slow reader looks like one that does not read."""
        held = fcntl.ioctl(self._socket().fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int(struct.unpack("i", held)[0])

    def _socket(self) -> socket.socket:
        found: socket.socket = self.transport.get_extra_info("socket")
        return found

    def _too_slow(self) -> None:
        if self._answering:  # it began ahead of that answer, and its rest is not read before
            self._patience = self.loop.call_later(self.head_seconds, self._too_slow)
        else:
            self._refuse(RequestTimeout("the request did not arrive in time"))

    def _refuse(self, error: EpdError) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not (cycle.response_started or self.pipeline):
            # Its body turned into nonsense: the route shall take the client for gone, and not answer too.
            cycle.disconnected = True
            cycle.message_event.set()
            cycle = None  # type: ignore[assignment]
        if cycle is None or cycle.response_complete:  # else bytes of a reply are on their way
            reply = error_response(error)
            request_id = request_id_of(dict(self.scope) if self.scope else None)
            request_log.info("%s %d %s", request_id, error.status, error.code)
            headers = [*reply.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
            head = f"HTTP/1.1 {error.status} {error.code}\r\n".encode()
            head += b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(head + b"\r\n" + bytes(reply.body))
        self.transport.close()


class TlsConnection(SSLProtocol):
    """TLS before a `BoundedConnection`, which is counted from its first byte on and has `head_seconds` to shake hands.

    asyncio's own (``ssl=`` of a server) says nothing of a connection before it has, and waits a minute for that.
    ``uvicorn.Config(http=partial(TlsConnection, context))``.
    """

    def __init__(self, context: ssl.SSLContext, **of_uvicorn: Any):
        self._http = BoundedConnection(**of_uvicorn)
        seconds = self._http.head_seconds
        super().__init__(self._http.loop, self._http, context, None, server_side=True, ssl_handshake_timeout=seconds)  # type: ignore[arg-type]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._http.counts(transport):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._http.connections.discard(self._http)  # which learns of it only after a handshake
        super().connection_lost(exc)
