# SPDX-License-Identifier: Apache-2.0
"""Equal work in flight is done once: those who ask while it runs wait for the same result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

Result = TypeVar("Result")


@dataclass
class _Flight(Generic[Result]):
    task: asyncio.Task[Result]
    waiting: int = 0


class Flights(Generic[Result]):
    """Work by key. A flight goes on while at least one caller waits for it, whoever started it."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[Result]] = {}

    async def join(self, key: str, work: Callable[[], Awaitable[Result]]) -> Result:
        """The result of the flight under ``key``; ``work`` is called where there is none. Its exception reaches all."""
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(work()))
            self._flights[key] = flight
            flight.task.add_done_callback(partial(self._landed, key, flight))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                # Off the board at once: who asks next must not join a flight that is being cancelled.
                self._landed(key, flight)
                flight.task.cancel()

    def _landed(self, key: str, flight: _Flight[Result], task: object = None) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
