# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""A toy graph with the planner: two stages that sleep, and report what the real ones report."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

import msgspec

from components.planner import Planner
from dynamo_epd.metrics import Metrics
from dynamo_epd.sdk import api, async_on_start, depends, dynamo_context, endpoint, service, service_config


class Work(msgspec.Struct, frozen=True):
    """``until``: a file, for which it waits besides; work that is as long as a test wants it."""

    seconds: float
    until: str = ""

    def waits(self) -> bool:
        return bool(self.until) and not os.path.exists(self.until)


class Worked(msgspec.Struct, frozen=True):
    worker: int


@dataclasses.dataclass(frozen=True)
class SleeperConfig:
    """``fail_from``: workers of this index and above do not come up."""

    fail_from: int = 1000


class Sleeper:
    """One request at a time; the others wait."""

    @async_on_start
    async def start(self) -> None:
        if dynamo_context["worker_index"] >= service_config(SleeperConfig).fail_from:
            raise RuntimeError("no room for one more")
        self.turn = asyncio.Lock()
        metrics = Metrics(dynamo_context["namespace"], dynamo_context["component"], "")
        self.metrics = metrics.stage()

    @endpoint()
    async def work(self, work: Work) -> AsyncIterator[Worked]:
        arrived = perf_counter()
        with self.metrics.visit() as visit:
            async with self.turn:
                visit.waited = perf_counter() - arrived
                await asyncio.sleep(work.seconds)
                while work.waits():
                    await asyncio.sleep(0.05)
        yield Worked(dynamo_context["worker_index"])


@service(config=SleeperConfig)
class Busy(Sleeper):
    pass


@service(config=SleeperConfig)
class Calm(Sleeper):
    pass


@service
class Front:
    planner = depends(Planner)
    busy = depends(Busy)
    calm = depends(Calm)

    @api()
    async def call(self, order: dict[str, Any]) -> dict[str, Any]:
        """``seconds`` of work in the first stage, and until the file ``until`` is there; ``calm`` in the second."""
        self.busy.route("least-loaded")
        work = Work(order["seconds"], order.get("until", ""))
        first = [worked.worker async for worked in self.busy.work(work)]
        last = [worked.worker async for worked in self.calm.work(Work(order.get("calm", 0.001)))]
        return {"workers": first + last, "pid": os.getpid()}


Front.link(Planner)
Front.link(Busy)
Front.link(Calm)
