# SPDX-License-Identifier: Apache-2.0
"""Bounds on the head of a request, which no ASGI middleware sees before it is complete.

uvicorn waits for request lines and headers without limit of time or size; a client that sends one byte a second would
hold its connection for ever. ``uvicorn.Config(http=BoundedConnection)`` ends that.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dynamo_epd.errors import EpdError, HeadersTooLarge, InvalidRequest, RequestTimeout
from dynamo_epd.http.errors import error_body


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a bound on each request's head, and OpenAI's body for what it cannot read."""

    head_seconds = 10.0
    """From the connection's start, or from a request's first byte, to the end of its headers."""
    head_bytes = 256 * 1024
    """Above what `RequestLimits` takes, so that its reply is the usual one; this one stops what never ends."""

    _patience: asyncio.TimerHandle | None = None
    _received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._patience is not None:  # the headers are still not complete
            self._received += len(data)
            if self._received > self.head_bytes:
                self._refuse(HeadersTooLarge(f"the headers have more than {self.head_bytes} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("the request is not valid HTTP"))

    def _wait_for_head(self) -> None:
        if self._patience is None:
            self._received = 0
            self._patience = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

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
            body = error_body(error)
            head = (
                f"HTTP/1.1 {error.status} {error.code}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
