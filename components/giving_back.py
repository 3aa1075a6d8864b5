# SPDX-License-Identifier: Apache-2.0
"""What is given back once a request is over. Nobody waits for it, and nobody is told where it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from components.protocol import ReleaseRequest
from dynamo_epd.errors import EpdError, Retryable
from dynamo_epd.sdk.client import Call

SECONDS = 5.0
"""Bound of one release."""

log = logging.getLogger(__name__)

_under_way: set[asyncio.Task[None]] = set()


def afterwards(work: Coroutine[Any, Any, None]) -> None:
    """Lets ``work`` go on although the request that it belongs to is over."""
    task = asyncio.create_task(work)
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)


async def give_back(call: Call) -> Any:
    """The reply of a release or a renewal; None where it fails: the lease then ends by itself."""
    try:
        async with asyncio.timeout(SECONDS):
            return await call.only()
    except (EpdError, TimeoutError) as error:
        log.info("a lease is left to expire: %s", error)


@asynccontextmanager
async def drawing(image_worker: Any, call: Call, request_id: str) -> AsyncIterator[None]:
    """Around all that is done with a call for a picture. Whoever leaves it before its end gives back what is laid out
    for it.

    What a caller has not yet heard of is among it: a reply is lost whose caller has left, and a worker may lay out one
    thing and then refuse for want of room for another.
    """
    try:
        async with aclosing(call):
            yield
    except Retryable:  # the worker is gone, or is asked again by this id: what it gives then would be taken back too
        raise
    except BaseException:
        if call.instance is not None:
            afterwards(
                give_back(image_worker.release(ReleaseRequest(request_ids=[request_id]), instance=call.instance))
            )
        raise
