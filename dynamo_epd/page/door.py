# SPDX-License-Identifier: Apache-2.0
"""What of Gradio's server is open: the routes that the page itself uses, and nothing that dials, runs or reads more.

Gradio also serves an API of its own, a proxy that fetches addresses a client names, deep links, recordings,
monitoring. None of it is reached from outside, and uploads have a bound in sum.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_epd.page.preparing import ICON

OPEN = re.compile(
    r"""GET\ (/ | /config/? | /theme\.css | /gradio_api/(theme\.css|info/?|app_id/?|startup-events|queue/data)
           | /(assets|static|svelte)/[\w@./-]+ | /gradio_api/heartbeat/\w+ | /gradio_api/upload_progress
           | /gradio_api/file=/.+)
      | HEAD\ /
      | POST\ /gradio_api/(queue/join|cancel|reset|upload)/?""",
    re.VERBOSE,
)
JOIN_BYTES = 256 * 1024
"""Of what a click sends: texts, and names of uploaded files."""
UPLOADS_BYTES = 512 * 1024 * 1024
"""Of all uploads together; the oldest go first."""
UPLOADS = 1024
"""Files, however small."""
AT_ONCE = 256
"""Requests of all pages that are open: each has two streams that do not end before it is closed."""
YEAR = "public, max-age=31536000, immutable"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' "
    "blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""No other host, whatever a model or a client writes. Gradio compiles its templates, hence 'unsafe-eval'."""
ELSEWHERE = re.compile(rb'<meta\s+(?:property="og|name="twitter):[^>]*>')
"""Gradio's descriptions of itself, with addresses on other hosts."""
MANIFEST = re.compile(rb'<link rel="manifest"[^>]*>')
"""Of an app that could be installed. There is none; an icon stands in its place."""


class Door:
    """ASGI middleware before Gradio's app. ``uploads``: the directory of its files."""

    def __init__(self, app: ASGIApp, uploads: Path):
        self._app = app
        self._uploads = uploads
        self._making_room = asyncio.Lock()
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # it needs none
            await send({"type": "websocket.close"})
            return
        if self._running >= AT_ONCE:
            await PlainTextResponse("Too many pages are open", 503)(scope, receive, send)
            return
        self._running += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self._running -= 1

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        refusal: tuple[str, int] | None = None
        if scope["method"] == "POST" and _site(scope) not in (b"", b"same-origin", b"none"):
            # A browser sends what it knows of the visitor with it, whoever's page it comes from.
            refusal = ("Only this page may send that", 403)
        elif not OPEN.fullmatch(f"{scope['method']} {path}") or b"deep_link" in scope.get("query_string", b""):
            refusal = ("Not found", 404)
        elif path.startswith("/gradio_api/queue/join"):
            body = await _body(receive, JOIN_BYTES)
            if body is None:
                refusal = ("The message is too long", 413)
            elif not names_only_uploads(body):
                refusal = ("A file must be uploaded", 400)
            else:
                receive = _again(body, receive)
        elif path.startswith("/gradio_api/upload") and scope["method"] == "POST":
            async with self._making_room:
                await asyncio.to_thread(make_room, self._uploads, UPLOADS_BYTES, UPLOADS)
        if refusal is not None:
            await PlainTextResponse(*refusal)(scope, receive, send)
            return
        if path == "/":
            await self._document(scope, receive, _guarded(send, None))
        else:
            await self._app(scope, receive, _guarded(send, YEAR if path.startswith("/assets/") else None))

    async def _document(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The page itself, without what points to other hosts."""
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        start: Message = {}
        pieces: list[bytes] = []

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = MANIFEST.sub(ICON.encode(), ELSEWHERE.sub(b"", b"".join(pieces)))
                MutableHeaders(scope=start)["content-length"] = str(len(body))
                await send(start)
                await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

        await self._app(scope, receive, collect)


def names_only_uploads(body: bytes) -> bool:
    """Whether every file that a click names is a path: Gradio would fetch an address, whoever's it is."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            path = item.get("path")
            if path is not None and not (isinstance(path, str) and path.startswith("/") and "//" not in path):
                return False
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return True


def make_room(directory: Path, bound: int, most: int) -> None:
    """Deletes the oldest files, and the directory that each has to itself, until what is there is within ``bound``
    bytes and ``most`` files."""
    found = []
    for path in directory.rglob("*"):
        try:
            if path.is_file():
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        except FileNotFoundError:
            continue
    size = sum(one for _, one, _ in found)
    for index, (_, one, path) in enumerate(sorted(found, key=lambda entry: entry[0])):
        if size <= bound and len(found) - index <= most:
            return
        path.unlink(missing_ok=True)
        if path.parent != directory:
            with suppress(OSError):  # another file is in it
                path.parent.rmdir()
        size -= one


def _site(scope: Scope) -> bytes:
    """From whose page a browser says that a request comes (Fetch Metadata); empty for what is no browser."""
    return next((value for name, value in scope["headers"] if name == b"sec-fetch-site"), b"")


def _guarded(send: Send, cache: str | None) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = POLICY
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "same-origin"
            if cache is not None and message["status"] == 200:
                headers["cache-control"] = cache
        await send(message)

    return guarded


async def _body(receive: Receive, most: int) -> bytes | None:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(pieces)


def _again(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
