# SPDX-License-Identifier: Apache-2.0
"""Requests of the page that are running, so that a button, or a browser that leaves, can end them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

Event = TypeVar("Event")

WAITING_EVENTS = 256
"""Events that a slow browser may leave lying before the graph's stream has to wait."""


class Stopped(Exception):
    """A person, or their browser's leaving, ended the run."""


class Runs:
    """At most one run for each tab of each browser session: a new one ends the one before."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def follow(
        self, session: str, tab: str, source: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[list[Event], None]:
        """The events of ``source``, all that are there by now in one list. Raises `Stopped`, and what it raises.

        However this ends, ``source`` is closed, and its HTTP request with it.
        """
        events: asyncio.Queue[Event] = asyncio.Queue(WAITING_EVENTS)

        async def pump() -> None:
            async with aclosing(source):
                async for event in source:
                    await events.put(event)

        # One task for the whole stream: its timeouts do not outlive the step of a generator otherwise.
        task = asyncio.create_task(pump())
        self.stop(session, tab)
        self._running[session, tab] = task
        try:
            while not (task.done() and events.empty()):
                getter = asyncio.ensure_future(events.get())
                try:
                    await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
                    found = [getter.result()] if getter.done() else []
                finally:
                    getter.cancel()
                while not events.empty():
                    found.append(events.get_nowait())
                if task.cancelled():
                    raise Stopped
                if found:
                    yield found
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._running.get((session, tab)) is task:
                del self._running[session, tab]

    def stop(self, session: str, tab: str | None = None) -> None:
        """Ends the run of one tab, or all of a session's."""
        for key, task in list(self._running.items()):
            if key[0] == session and tab in (None, key[1]):
                task.cancel()
