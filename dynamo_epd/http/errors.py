# SPDX-License-Identifier: Apache-2.0
"""The one error body of every route, OpenAI's, and the last place where an exception may arrive."""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_epd import tracing
from dynamo_epd.errors import EpdError, InternalError, InvalidRequest, MethodNotAllowed, NotFound, Unauthorized

logger = logging.getLogger(__name__)

MAX_BODY = 2048
"""Bytes of an error body."""
_MAX_PARAM = 200


def error_body(error: EpdError) -> bytes:
    """OpenAI's error body as JSON, cut to `MAX_BODY` bytes whatever the client's text expands to."""
    body = error.to_openai()
    if isinstance(body["error"]["param"], str):
        body["error"]["param"] = body["error"]["param"][:_MAX_PARAM]
    message = error.message
    while True:
        body["error"]["message"] = message
        # Lone surrogates cannot be sent; a message that quotes one must not become another error.
        raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        if len(raw) <= MAX_BODY or not message:
            return raw
        message = message[: len(message) // 2]


def error_event(error: EpdError) -> bytes:
    """The last event of a stream that breaks off. Its status is out already, so the request's span is told here."""
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        tracing.current().fail(error)
    return b"data: " + error_body(error) + b"\n\n"


def error_response(error: EpdError) -> Response:
    """The reply for ``error``, with Retry-After (whole seconds, rounded up) where it has one."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = error.challenge
    return Response(error_body(error), error.status, headers, media_type="application/json")


def answer_errors(app: FastAPI) -> None:
    """Make every error of ``app`` an OpenAI error body. Call before any other middleware is added."""
    app.add_exception_handler(EpdError, on_epd_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_middleware(ErrorBoundary)


class ErrorBoundary:
    """Turns what nobody expected into `InternalError`: logged in full, answered without its text.

    Once a response has begun it cannot be mended: the exception goes on and the server cuts the connection, so that
    the client sees a broken stream and not an end.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except Exception as error:  # the process boundary
            if begun:
                raise
            if not isinstance(error, EpdError):
                logger.exception("request %s failed", scope.get("state", {}).get("request_id", "-"))
                error = InternalError("internal error")
            await error_response(error)(scope, receive, send)


async def on_epd_error(request: Request, error: Exception) -> Response:
    """`error_response` as a handler of FastAPI's."""
    assert isinstance(error, EpdError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound("no such route"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response = error_response(MethodNotAllowed("this route does not take that method"))
    else:
        cause: EpdError = InvalidRequest(_phrase(error.status_code))
        if error.status_code >= 500:
            cause = InternalError(_phrase(error.status_code))
        cause.status = error.status_code
        response = error_response(cause)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0] if error.errors() else {"loc": (), "msg": "invalid"}
    where = ".".join(str(step) for step in first["loc"] if step not in ("body", "query", "path"))
    # Its message says what is wanted; the client's value, which pydantic also offers, is not echoed.
    return error_response(InvalidRequest(f"'{where[:_MAX_PARAM]}': {first['msg']}", param=where or None))


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "error"
