# SPDX-License-Identifier: Apache-2.0
"""Ending a task that works ahead of a generator."""

from __future__ import annotations

import asyncio
from typing import Any


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels ``task`` and waits for it, whatever becomes of it. One that is over is not waited for, not even a turn of
    the event loop: what ends a generator at once lets its last item and its end travel together (`wire.LAST`)."""
    if task.done():
        task.cancelled() or task.exception()  # it has been asked: asyncio need not say that nobody did
        return
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
