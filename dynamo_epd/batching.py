# SPDX-License-Identifier: Apache-2.0
"""Work that arrives one by one and runs many at a time.

While one batch runs in its thread the next one gathers, so nobody waits for a timer: a lone item runs at once, and
under load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

from dynamo_epd.errors import Overloaded
from dynamo_epd.failures import Failures

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ran(Generic[Result]):
    """An item's result, how long it waited for its batch, and how long the batch ran."""

    result: Result
    queue_seconds: float
    run_seconds: float


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Ran[Result]]
    since: float


def one_thread() -> ThreadPoolExecutor:
    """Where a model is loaded, warmed up and run. Each thread that calls torch has OpenMP threads of its own; where all
    of them are more than the cores, those of the one that computes wait asleep for each of its operations."""
    return ThreadPoolExecutor(1, thread_name_prefix="batch")


class Batcher(Generic[Item, Result]):
    """Calls ``run`` in one thread of its own, with as many items as ``most`` allows.

    ``failures`` says whether ``run`` still works at all, and comes back.

    Args:
        run: takes a list of items, returns one result an item, in order. It blocks. An exception fails its whole batch.
        most: what the items of a batch may weigh together; one that weighs more runs alone.
        waiting: items that may wait; one more is refused with Overloaded.
        weight: of an item; by default each weighs 1.
        observe: told the size of each batch before it runs.
        silence: seconds that one batch may take, before it counts as hung.
        thread: the executor of one thread that ``run`` is called in, and that `close` ends. By default one of its own.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        most: int,
        waiting: int,
        weight: Callable[[Item], int] = lambda item: 1,
        observe: Callable[[int], None] = lambda size: None,
        silence: float = math.inf,
        thread: ThreadPoolExecutor | None = None,
    ):
        self._run = run
        self._most = most
        self._waiting = waiting
        self._weight = weight
        self._observe = observe
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._thread = thread or one_thread()
        self._at_work = False
        self.failures = Failures(silence)

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    async def submit(self, item: Item) -> Ran[Result]:
        """Waits for the item's result. Cancelled while it waits, the item never runs."""
        return (await self.submit_all([item]))[0]

    async def submit_all(self, items: Sequence[Item]) -> list[Ran[Result]]:
        """Waits for the results of all items, in order. They are taken on all or none; where one fails, or the caller
        is cancelled, those that still wait never run."""
        if len(self._queue) + len(items) > self._waiting:
            raise Overloaded(f"{self._waiting} items may wait in this stage, and there is no room; try again later")
        loop = asyncio.get_running_loop()
        waiting = [_Waiting[Item, Result](item, loop.create_future(), perf_counter()) for item in items]
        self._queue.extend(waiting)
        if not self._at_work:
            self._at_work = True
            loop.call_soon(self._begin)  # with what others submit in the same turn of the loop
        try:
            return [await one.future for one in waiting]  # they end in this order
        except BaseException:
            for one in waiting:
                if not one.future.cancel() and not one.future.cancelled():
                    one.future.exception()  # of the same batch: asyncio would log those that nobody has asked for
            raise

    def _begin(self) -> None:
        """Callbacks and no task: a lone item would wait two turns of the loop more."""
        batch = self._next()
        self._at_work = bool(batch)
        if not batch:
            return
        self._observe(len(batch))
        watched = ExitStack()
        watched.enter_context(self.failures.counted())
        watched.enter_context(self.failures.under_way())
        began = perf_counter()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, self._run, [one.item for one in batch])
        running.add_done_callback(lambda done: self._ended(batch, began, watched, done))

    def _ended(
        self,
        batch: list[_Waiting[Item, Result]],
        began: float,
        watched: ExitStack,
        done: asyncio.Future[Sequence[Result]],
    ) -> None:
        seconds = perf_counter() - began
        try:
            with watched:
                results = done.result()
            if len(results) != len(batch):  # else some would wait for ever
                raise ValueError(f"{len(results)} results of {len(batch)} items")
        except Exception as error:  # the boundary: whatever the batch died of belongs to those who wait for it
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
        else:
            for one, result in zip(batch, results, strict=True):
                if not one.future.done():
                    one.future.set_result(Ran(result, began - one.since, seconds))
        self._begin()

    def _next(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        total = 0
        while self._queue:
            first = self._queue[0]
            if not first.future.done():
                total += self._weight(first.item)
                if batch and total > self._most:
                    break
                batch.append(first)
            self._queue.popleft()
        return batch

    def close(self) -> None:
        """Refuses what waits and lets the running batch end."""
        while self._queue:
            self._queue.popleft().future.cancel()
        self._thread.shutdown(wait=True)
