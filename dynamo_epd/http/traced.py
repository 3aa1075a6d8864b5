# SPDX-License-Identifier: Apache-2.0
"""The span of an HTTP request, by OpenTelemetry's conventions for HTTP servers."""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_epd import tracing

UNTRACED = ("/live", "/health", "/metrics", "/ui")
"""What probes, scrapers and browsers ask all the time."""


class Traced:
    """ASGI middleware around everything: the trace goes on that the client's ``traceparent`` names.

    The span fails with a status from 500 on, which is its ``error.type`` then, with what is raised instead of a reply,
    and where a stream breaks off (`dynamo_epd.http.errors.error_event`).
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(UNTRACED):
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        with tracing.span(method, kind="server", carrier=Headers(scope=scope)) as span:
            span.describe({"http.request.method": method, "url.path": scope["path"]})

            async def told(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.describe({"http.response.status_code": status})
                    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:  # what is refused is the client's failure
                        span.fail(str(int(status)))
                await send(message)

            try:
                await self.app(scope, receive, told)
            finally:
                span.describe({"dynamo.request_id": scope.get("state", {}).get("request_id")})
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.rename(f"{method} {route}")
                    span.describe({"http.route": route})
