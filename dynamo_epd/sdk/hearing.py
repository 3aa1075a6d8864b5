# SPDX-License-Identifier: Apache-2.0
"""Waiting for the other end of a call, but not for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from dynamo_epd.sdk import wire

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LATE_SECONDS = 0.25
"""A timer of ours that rings later than this: our own event loop stood still, and knows nothing of the other end."""


class Hearing:
    """What one call waits for, one thing after the other.

    One timer looks after all of them, and rings once in `wire.SILENT_SECONDS`. A timeout around each frame was a sixth
    of the Processor's work under many answers (``make scale``).
    """

    def __init__(self, name: str):
        self._name = name
        self._since = 0.0
        """By the event loop's clock."""
        self._waiting: asyncio.Future[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silent = False

    async def wait(self, work: Awaitable[Result]) -> Result:
        """The result of ``work``. Raises TimeoutError after `wire.SILENT_SECONDS` in which this process listened and
        heard nothing; ``work`` is cancelled then."""
        loop = asyncio.get_running_loop()
        self._waiting = waiting = asyncio.ensure_future(work)
        self._since, self._silent = loop.time(), False
        if self._timer is None:
            self._look_at(self._since + wire.SILENT_SECONDS)
        try:
            return await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._silent or (task is not None and task.cancelling()):
                raise
            raise TimeoutError from None
        finally:
            self._waiting = None

    def _look_at(self, due: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(due, self._look, due)

    def _look(self, due: float) -> None:
        self._timer = None
        if self._waiting is None:
            return
        now = asyncio.get_running_loop().time()
        if now - due > LATE_SECONDS:
            self._since = now
        if now < self._since + wire.SILENT_SECONDS:
            self._look_at(self._since + wire.SILENT_SECONDS)
        elif self._waiting.cancel():
            log.warning("a %s was silent for %g s and counts as lost", self._name, wire.SILENT_SECONDS)
            self._silent = True

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
