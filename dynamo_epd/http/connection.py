# SPDX-License-Identifier: Apache-2.0
"""Bounds on what no ASGI middleware sees: connections, heads before they are complete, replies that nobody takes.

uvicorn waits for request lines and headers without limit of time or size, and for a client that reads nothing of its
reply without end; either would hold a connection, and what its request holds, for ever.
``uvicorn.Config(http=BoundedConnection)`` ends that.
"""

from __future__ import annotations

import asyncio
import fcntl
import resource
import socket
import struct
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dynamo_epd.errors import EpdError, HeadersTooLarge, InvalidRequest, Overloaded, RequestTimeout
from dynamo_epd.http.errors import error_response

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
    """From the connection's start, or from a request's first byte, to the end of its headers."""
    head_bytes = 256 * 1024
    """Above what `RequestLimits` takes, so that its reply is the usual one; this one stops what never ends."""
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
    leaving_seconds = 0.5
    """Between a server's last connection and the end of those on which nothing is being answered: a request that is on
    its way there still is. What reaches a closed connection is reset, and nobody knows whether it was done."""

    _patience: asyncio.TimerHandle | None = None
    _received = 0
    _beside_body = 0
    _reading: asyncio.TimerHandle | None = None
    _untaken = 0
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not self._close_an_idle_one():
            self._refuse(Overloaded(f"{self.max_connections} connections are open; try again later"))
        else:
            self._wait_for_head()

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
        self._idle.pop(self, None)
        self._beside_body += len(data)
        super().data_received(data)
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
        self._stop_waiting()
        self._beside_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.cycle.response_complete:  # else nothing is left to pause for, and the rest is still unread
            self._stop_watching()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._idle[self] = None
        if self.transport.get_write_buffer_size():  # too little of it to pause for, perhaps
            self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("the request is not valid HTTP"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _in_head(self) -> bool:
        return self._patience is not None

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
            headers = [*reply.raw_headers, (b"connection", b"close")]
            head = f"HTTP/1.1 {error.status} {error.code}\r\n".encode()
            head += b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(head + b"\r\n" + bytes(reply.body))
        self.transport.close()
