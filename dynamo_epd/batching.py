# SPDX-License-Identifier: Apache-2.0
"""Work that arrives one by one and runs many at a time.

While one batch runs in its thread the next one gathers, so nobody waits for a timer: a lone item runs at once, and
under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from dynamo_epd.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Calls ``run`` with up to ``most`` items in one thread of its own.

    Args:
        run: takes a list of items, returns one result an item, in order. It blocks. An exception fails its whole batch.
        most: items a batch.
        waiting: items that may wait; one more is refused with Overloaded.
        observe: told the size of each batch before it runs.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        most: int,
        waiting: int,
        observe: Callable[[int], None] = lambda size: None,
    ):
        self._run = run
        self._most = most
        self._waiting = waiting
        self._observe = observe
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._loop: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    async def submit(self, item: Item) -> Result:
        """Waits for the item's result. Cancelled while it waits, the item never runs."""
        if len(self._queue) >= self._waiting:
            raise Overloaded("too many images wait to be encoded")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next():
            self._observe(len(batch))
            try:
                results = await loop.run_in_executor(self._thread, self._run, [item for item, _ in batch])
            except Exception as error:  # the boundary: whatever the batch died of belongs to those who wait for it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._queue and len(batch) < self._most:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    def close(self) -> None:
        """Refuses what waits and lets the running batch end."""
        while self._queue:
            self._queue.popleft()[1].cancel()
        self._thread.shutdown(wait=True)
