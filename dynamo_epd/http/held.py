# SPDX-License-Identifier: Apache-2.0
"""A streamed reply, and what its request holds until the end of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class HeldStream(StreamingResponse):
    """Server-sent ``events``; ``held`` is closed after them, whatever ends them.

    Not by the generator alone: one that was never begun, since the client left before the first byte, runs none of
    its own ``finally``.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], held: AsyncExitStack, status: int = 200):
        super().__init__(events, status, media_type="text/event-stream")
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._events):
            await super().__call__(scope, receive, send)
