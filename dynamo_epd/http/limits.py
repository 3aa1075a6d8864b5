# SPDX-License-Identifier: Apache-2.0
"""Bounds on a request before any route sees it, its id, and whose it is."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from contextlib import ExitStack
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_epd import tracing
from dynamo_epd.errors import (
    EpdError,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    UrlTooLong,
)
from dynamo_epd.http.auth import Callers
from dynamo_epd.http.errors import answer_errors, error_response
from dynamo_epd.http.rates import Rates
from dynamo_epd.http.traced import Traced

log = logging.getLogger(__name__)
request_log = logging.getLogger("dynamo_epd.request")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True)
class RequestBounds:
    """How much of a request is taken, and how long its body may take to arrive."""

    body_bytes: int = 16 * 1024 * 1024
    bodies_bytes: int = 1024 * 1024 * 1024
    """Of all bodies together, from their first byte until their requests are answered. More is refused for now."""
    body_seconds: float = 30.0
    idle_seconds: float = 10.0
    """Between two pieces of a body."""
    headers: int = 100
    header_bytes: int = 16 * 1024
    url_bytes: int = 16 * 1024
    """Path and query. A query is split for every route, a key or none: some milliseconds for this much."""
    drain_bytes: int = 64 * 1024 * 1024
    """Of a body that was refused: read and dropped, so that a client that is still writing gets to read the reply."""
    drain_seconds: float = 5.0


def guard(
    app: FastAPI, bounds: RequestBounds | None = None, callers: Callers | None = None, rates: Rates | None = None
) -> None:
    """Put the whole edge round ``app``: bounds, keys and request id outside, errors as OpenAI's bodies inside.

    Middleware added later stands outside of it and sees requests of any size, and anyone's.
    """
    answer_errors(app)
    app.add_middleware(RequestLimits, bounds=bounds, callers=callers, rates=rates)
    if tracing.ON:
        app.add_middleware(Traced)


class RequestLimits:
    """ASGI middleware, outside of all but a span: URL 414, headers 431, key 401, rate 429, body 413, slow body 408, too
    much of all bodies together 503, a defect of its own 500, and ``x-request-id`` on every reply. Nothing of a body is
    read before its sender is known.

    The body is read here in full and handed on in one piece, so no route can forget a bound. The id is the client's
    if it is harmless, else a new one; routes find it as ``request.state.request_id``, and whose the request is as
    ``request.state.tenant``.
    """

    def __init__(
        self,
        app: ASGIApp,
        bounds: RequestBounds | None = None,
        callers: Callers | None = None,
        rates: Rates | None = None,
    ):
        self.app = app
        self.bounds = bounds or RequestBounds()
        self.callers = callers or Callers(None, None)
        self.rates = rates or Rates()
        self._bodies_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it, and none of what follows would hold for it
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        told: dict[str, str] = {}

        async def identify(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(told)
            await send(message)

        with ExitStack() as held:
            try:
                self._check_head(scope)
                state["tenant"], counts = self.callers.tenant_of(
                    scope["method"],
                    scope["path"],
                    scope.get("query_string", b""),
                    Headers(scope=scope).get("authorization"),
                )
                if counts:
                    held.enter_context(self.rates.counted(state["tenant"], told))
                body = await self._read(receive, held)
            except Exception as error:  # the process boundary: `ErrorBoundary` is inside
                held.close()
                if not isinstance(error, EpdError):
                    log.exception("request %s failed", request_id)
                    error = InternalError("internal error")
                request_log.info("%s %d %s", request_id, error.status, error.code)
                await self._refuse(error, receive, identify)
                return
            if body is None:  # the client left while sending
                return
            await self.app(scope, _replay(body, receive), identify)

    def _check_head(self, scope: Scope) -> None:
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > self.bounds.url_bytes:
            raise UrlTooLong(f"the path and the query have more than {self.bounds.url_bytes} bytes")
        headers = scope["headers"]
        if len(headers) > self.bounds.headers:
            raise HeadersTooLarge(f"the request has more than {self.bounds.headers} headers")
        if sum(len(name) + len(value) for name, value in headers) > self.bounds.header_bytes:
            raise HeadersTooLarge(f"the headers have more than {self.bounds.header_bytes} bytes")
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit():
                    raise InvalidRequest("the Content-Length is not a number")
                if len(value) > 18 or int(value) > self.bounds.body_bytes:
                    raise self._too_large()

    async def _read(self, receive: Receive, held: ExitStack) -> bytes | None:
        """The body, whose bytes are counted until ``held`` is closed. None where the client left."""
        pieces: list[bytes] = []
        size = 0

        def give_back() -> None:
            self._bodies_bytes -= size

        held.callback(give_back)
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                while True:
                    async with asyncio.timeout(self.bounds.idle_seconds):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    size += len(piece)
                    self._bodies_bytes += len(piece)
                    if size > self.bounds.body_bytes:
                        raise self._too_large()
                    if self._bodies_bytes > self.bounds.bodies_bytes:
                        raise Overloaded("the bodies of other requests fill the room for them; try again later")
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError as error:
            raise RequestTimeout("the body did not arrive in time") from error

    async def _refuse(self, error: EpdError, receive: Receive, send: Send) -> None:
        """Reply at once, then read on for a while: closing on unread bytes would reset the reply away."""
        response = error_response(error)
        response.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        if not isinstance(error, RequestTimeout):
            await self._drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self, receive: Receive) -> None:
        left = self.bounds.drain_bytes
        try:
            async with asyncio.timeout(self.bounds.drain_seconds):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body has more than {self.bounds.body_bytes} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` as if the body had come in one message; later calls wait for the client to leave."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def request_id_of(scope: Scope | None) -> str:
    """The client's own, where it sent one that can be passed on, else a new one."""
    for name, value in scope["headers"] if scope else ():
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return str(text)
            break
    return uuid.uuid4().hex
