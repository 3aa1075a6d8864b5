# SPDX-License-Identifier: Apache-2.0
"""HTTP of a service: its own FastAPI app, or a small one made of its `@api` functions, under uvicorn in its process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from dynamo_epd.errors import EpdError
from dynamo_epd.http.connection import BoundedConnection, TlsConnection
from dynamo_epd.http.errors import on_epd_error
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.port import HOST, PORT, SHARED_PORT, bound
from dynamo_epd.sdk.service import ServiceInfo

log = logging.getLogger(__name__)

PROBES = ("/live", "/health")
GIVING_UP_SECONDS = 1.0
"""For responses that are given up to end, and the app with them."""


@dataclass(frozen=True)
class TlsConfig:
    """HTTP over TLS (key ``tls``). Both files are PEM and read at the start."""

    cert_file: Path
    """The certificate, then those that lead to a root."""
    key_file: Path
    """The certificate's private key, without a passphrase."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the worker has handlers of its own


class HttpServer:
    """`start` opens the door. `stop` closes it and lets running responses end; cancelled, it gives them up.

    Raises ConfigError for a port that cannot be had and for certificates that cannot be used.
    """

    def __init__(self, app: Any, tls: TlsConfig | None = None):
        self._scheme = "http" if tls is None else "https"
        connection: Any = BoundedConnection if tls is None else partial(TlsConnection, _context(tls))
        host, port = os.environ.get(HOST, "127.0.0.1"), int(os.environ.get(PORT, "8000"))
        self._socket = bound(host, port, shared=bool(os.environ.get(SHARED_PORT)))
        config = uvicorn.Config(
            app,
            http=connection,
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
            server_header=False,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    async def start(self) -> asyncio.Task[None]:
        """Returns, once requests are taken, the task that ends when the server does."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if serving.done():
                await serving
                raise RuntimeError("the HTTP server ended while starting")
            await asyncio.sleep(0.01)
        self._serving = serving
        return serving

    async def stop(self) -> None:
        if self._serving is not None:
            self._server.should_exit = True
            try:
                await asyncio.shield(self._serving)
            except asyncio.CancelledError:
                await self._give_up(self._serving)
                raise
        self._socket.close()

    async def _give_up(self, serving: asyncio.Task[None]) -> None:
        running = list(self._server.server_state.tasks)
        log.warning("%d responses were still running", len(running))
        for one in running:
            one.cancel()
        await asyncio.wait([serving], timeout=GIVING_UP_SECONDS)


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a pass phrase would be asked for on the terminal.
        context.load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"tls: {tls.cert_file} and {tls.key_file} cannot be used: {reason}") from error
    return context


def app_of(info: ServiceInfo, instance: Any) -> Any | None:
    """The service's app with its `@api` routes added, or None when it has neither."""
    routes = info.marked("api")
    if info.app is None and not routes:
        return None
    app = info.app if info.app is not None else FastAPI()
    for attribute, mark in routes.items():
        app.add_api_route(
            f"/{mark.name}", _answering(getattr(instance, attribute)), methods=["POST"], response_model=None
        )
    if info.app is None:
        app.add_exception_handler(EpdError, on_epd_error)
    _answer_probes(app)
    return app


def _answer_probes(app: Any) -> None:
    """Kubernetes asks every frontend for these. The door is open only between the start hooks and the drain, so that
    an answer says it all; an app that knows more brings its own.
    """
    known = {getattr(route, "path", None) for route in app.routes}
    for path in PROBES:
        if path not in known:
            app.add_api_route(path, lambda: {"status": "ready"}, methods=["GET"], include_in_schema=False)


def _answering(function: Any) -> Any:
    """The function as a route: its parameters stay, an async generator becomes a streamed answer."""
    if not inspect.isasyncgenfunction(function):
        return function

    async def route(*args: Any, **kwargs: Any) -> Response:
        replies = function(*args, **kwargs)
        try:
            first = await anext(replies)
        except StopAsyncIteration:
            return StreamingResponse(iter(()))

        async def body() -> Any:
            try:
                yield _text(first)
                async for item in replies:
                    yield _text(item)
            finally:
                await replies.aclose()

        return StreamingResponse(body(), media_type="text/event-stream")

    route.__signature__ = _resolved_signature(function)  # type: ignore[attr-defined]
    route.__name__ = function.__name__
    return route


def _resolved_signature(function: Any) -> inspect.Signature:
    return inspect.signature(function, eval_str=True).replace(return_annotation=inspect.Signature.empty)


def _text(item: Any) -> str | bytes:
    if isinstance(item, str | bytes):
        return item
    if hasattr(item, "model_dump_json"):
        return str(item.model_dump_json())
    import msgspec

    return msgspec.json.encode(item)
