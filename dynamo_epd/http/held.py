# SPDX-License-Identifier: Apache-2.0
"""A streamed reply, and what its request holds until the end of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send


class HeldStream(StreamingResponse):
    """``pieces`` of a body: server-sent events, or what ``headers`` say. ``held`` is closed after them, whatever ends
    them.

    Not by the generator alone: one that was never begun, since the client left before the first byte, runs none of
    its own ``finally``. Nor for as long as a client cares to read: after ``seconds``, where they are given, it counts
    as gone.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        held: AsyncExitStack,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        seconds: float | None = None,
    ):
        super().__init__(pieces, status, headers, media_type="text/event-stream")  # unless the headers name another
        self._pieces = pieces
        self._held = held
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = False

        async def sending(message: Message) -> None:
            nonlocal whole
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        async with self._held, aclosing(self._pieces):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, sending)
            if not whole:  # who is held must know: what was given to this client has reached nobody
                raise ClientDisconnect
