# SPDX-License-Identifier: Apache-2.0
"""The graph's HTTP API as the page uses it: over loopback, through the same checks as anyone's requests."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

CONNECT_SECONDS = 5.0
SHORT_SECONDS = 15.0
"""For what is looked up: models, past results."""
MAX_REPLY = 64 * 1024 * 1024
"""Bytes of one reply, a stream's events together."""
MAX_CONNECTIONS = 64
HERE = "x-dynamo-epd-here"
"""A header of who wants addresses of pictures at the frontend alone: the page asks no other host."""

logging.getLogger("httpx").setLevel(logging.WARNING)  # the Frontend has a line for each of these requests


class Refused(Exception):
    """The graph said no, or could not be asked. ``advice`` says what a person can do about it."""

    def __init__(self, message: str, advice: str, status: int = 0, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.advice = advice
        self.status = status
        self.param = param


@dataclass(frozen=True)
class Visitor:
    """For whom the graph is asked: the address of the Frontend itself, and the key that the browser came with."""

    base: str
    key: str | None = None


class GraphApi:
    """``deadline``: seconds that the graph gives one request; the page waits a little longer, for its last word.

    ``cert_file``: the Frontend's own certificate, where it serves TLS.
    """

    def __init__(self, deadline: float, cert_file: Path | None = None):
        self._deadline = deadline + 5
        self._kept = True
        """Whether a validation's stream may ask for its picture to be kept, as the gallery shows it."""
        # Neither a proxy nor a .netrc of the environment has anything to do with loopback.
        self._client = httpx.AsyncClient(
            trust_env=False,
            verify=_only(cert_file) if cert_file else True,
            timeout=httpx.Timeout(self._deadline, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=4),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def chat_models(self, visitor: Visitor) -> list[str]:
        """Names of the models that chat: only those have a length of context."""
        models = (await self._get(visitor, "/v1/models")).get("data", [])
        return [one["id"] for one in models if one.get("max_model_len")] or [one["id"] for one in models]

    async def past_results(self, visitor: Visitor, limit: int) -> list[dict[str, Any]]:
        """Newest first. Raises `Refused` with status 404 where the graph keeps none."""
        found = (await self._get(visitor, f"/v1/images?limit={limit}")).get("data", [])
        return sorted(found, key=lambda one: one.get("created") or 0, reverse=True)

    async def validate(self, visitor: Visitor, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one validation, each the moment its stage is done. The picture is kept where that is taken."""
        body = {**body, "stream": True, "include_embeddings": True}
        if self._kept:
            try:
                async for event in self._events(visitor, "/v1/validations", {**body, "response_format": "url"}):
                    yield event
                return
            except Refused as refused:
                if refused.param != "response_format":
                    raise
                self._kept = False
        async for event in self._events(visitor, "/v1/validations", body):
            yield event

    async def chat(self, visitor: Visitor, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """The answer's text, piece by piece."""
        async for event in self._events(visitor, "/v1/chat/completions", {**body, "stream": True}):
            for choice in event.get("choices", []):
                if choice.get("delta", {}).get("content"):
                    yield choice["delta"]["content"]

    async def _get(self, visitor: Visitor, path: str) -> dict[str, Any]:
        async with self._answer(visitor, "GET", path, None, SHORT_SECONDS) as reply:
            return _json(await _whole(reply))

    async def _events(self, visitor: Visitor, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        async with self._answer(visitor, "POST", path, body, self._deadline) as reply:
            async for data in _data_of(reply):
                if data == b"[DONE]":
                    return
                event = _json(data)
                if "error" in event:
                    raise refusal(0, event, None)
                yield event

    @asynccontextmanager
    async def _answer(
        self, visitor: Visitor, method: str, path: str, body: dict[str, Any] | None, seconds: float
    ) -> AsyncIterator[httpx.Response]:
        """The reply, which is closed with its connection however this ends. Raises `Refused` for any but a 200."""
        headers = {HERE: "1"} | ({"Authorization": f"Bearer {visitor.key}"} if visitor.key else {})
        url = visitor.base + path
        try:
            async with asyncio.timeout(seconds), self._client.stream(method, url, json=body, headers=headers) as reply:
                if reply.status_code != 200:
                    raise refusal(reply.status_code, _json(await _whole(reply)), reply.headers.get("retry-after"))
                yield reply
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Refused("The graph did not answer in time.", "Try again; fewer denoise steps take less.") from error
        except httpx.HTTPError as error:
            raise Refused("The connection to the graph broke off.", "Try again in a moment.") from error


def _only(cert_file: Path) -> ssl.SSLContext:
    """Trust in that certificate and no other. It need not name the loopback address, at which the page asks."""
    context = ssl.create_default_context(cafile=str(cert_file))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def refusal(status: int, body: dict[str, Any], retry_after: str | None) -> Refused:
    """What an OpenAI error body means to a person. ``status`` is 0 within a stream."""
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or f"The graph answered with status {status}.")
    kind, param = error.get("type"), error.get("param")
    if status == 401 or kind == "authentication_error":
        advice = "The key with which this page was opened is good no more: load it again."
    elif kind == "rate_limit_error":
        advice = f"Try again in {retry_after or 'a few'} seconds."
    elif status in (429, 503) or kind in ("overloaded_error", "service_unavailable"):
        advice = f"The graph is busy, or a stage is being restarted: try again in {retry_after or 'a few'} seconds."
    elif status == 504 or kind == "timeout_error":
        advice = "Try again; a smaller size or fewer denoise steps take less time."
    elif status == 404:
        advice = "This graph does not have it."
    elif kind == "invalid_request_error" or 400 <= status < 500:
        advice = f"Change {param} and send it again." if param else "Change the request and send it again."
    else:
        advice = "Try again; the graph's log says more."
    return Refused(message[:1].upper() + message[1:], advice, status, param)


async def _data_of(reply: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The ``data`` of each server-sent event: these servers put it in one line."""
    size, rest = 0, bytearray()
    async for piece in reply.aiter_bytes():
        size += len(piece)
        if size > MAX_REPLY:
            raise Refused("The answer is too long.", "Ask for less at once.")
        rest += piece
        *lines, last = rest.split(b"\n") if b"\n" in piece else [rest]
        rest = bytearray(last)
        for line in lines:
            if line.startswith(b"data: "):
                yield bytes(line[6:])


async def _whole(reply: httpx.Response) -> bytes:
    pieces, size = [], 0
    async for piece in reply.aiter_bytes():
        size += len(piece)
        if size > MAX_REPLY:
            raise Refused("The answer is too long.", "Ask for less at once.")
        pieces.append(piece)
    return b"".join(pieces)


def _json(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
