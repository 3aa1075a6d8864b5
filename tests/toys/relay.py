# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""A toy graph: Front asks Middle, Middle asks Back. Every fault that a test needs can be asked for in the request."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dynamo_epd.batching import Batcher
from dynamo_epd.errors import EpdError, InvalidRequest
from dynamo_epd.sdk import (
    api,
    async_on_start,
    depends,
    dynamo_context,
    endpoint,
    liveness,
    on_drain,
    on_shutdown,
    service,
    service_config,
)


class Ask(msgspec.Struct, frozen=True):
    """``mode``: count, hang, refuse, break, die, ail, compute, or identity."""

    mode: str = "count"
    number: int = 3
    pause: float = 0.0
    trace: str = ""


class Tick(msgspec.Struct, frozen=True):
    index: int
    worker: int
    instance: int


@dataclasses.dataclass(frozen=True)
class BackConfig:
    """``events``: a file that lines are appended to."""

    events: str = ""
    fail_start: bool = False


def note(config: BackConfig, text: str) -> None:
    if config.events:
        with Path(config.events).open("a") as file:
            file.write(text + "\n")


def may_end(config: BackConfig) -> bool:
    return Path(config.events + ".end").exists()


def compute_for_ever(items: Sequence[int]) -> Sequence[int]:
    threading.Event().wait()
    return items


@service(config=BackConfig)
class Back:
    def __init__(self) -> None:
        self.config = service_config(BackConfig)
        self.ailing = False
        self.batcher = Batcher(compute_for_ever, most=1, waiting=8, silence=1.0)

    @liveness
    def alive(self) -> bool:
        return not self.ailing and self.batcher.failures.alive()

    @async_on_start
    async def start(self) -> None:
        if self.config.fail_start:
            raise RuntimeError("back cannot start")
        note(self.config, f"start {dynamo_context['worker_index']}")

    @on_drain
    async def owes_nothing(self) -> None:
        note(self.config, "drained")

    @on_shutdown
    async def first_hook(self) -> None:
        while self.ailing and not may_end(self.config):
            await asyncio.sleep(0.05)
        note(self.config, "shutdown first")

    @on_shutdown
    def second_hook(self) -> None:
        note(self.config, "shutdown second")

    @endpoint(addressed=True)
    async def again(self, ask: Ask) -> AsyncIterator[Tick]:
        yield Tick(0, dynamo_context["worker_index"], dynamo_context["instance_id"])

    @endpoint(max_in_flight=8)
    async def answer(self, ask: Ask) -> AsyncIterator[Tick]:
        try:
            async with asyncio.timeout(60):
                for index in range(ask.number):
                    yield Tick(index, dynamo_context["worker_index"], dynamo_context["instance_id"])
                    if ask.pause:
                        await asyncio.sleep(ask.pause)
                if ask.mode == "hang":
                    await asyncio.sleep(60)
                if ask.mode == "refuse":
                    raise InvalidRequest("not this one", param="mode", code="no_thanks")
                if ask.mode == "break":
                    raise RuntimeError("secret of the inside")
                if ask.mode == "compute":
                    await self.batcher.submit(0)
                if ask.mode == "ail":
                    self.ailing = True
                if ask.mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            note(self.config, f"closed {ask.trace}")


@service
class Middle:
    back = depends(Back)

    @endpoint()
    async def relay(self, ask: Ask) -> AsyncIterator[Tick]:
        async for tick in self.back.answer(ask):
            yield tick

    @endpoint()
    async def free(self, anything: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield anything


@service
class Front:
    middle = depends(Middle)
    back = depends(Back)

    @api()
    async def call(self, order: dict[str, Any]) -> dict[str, Any]:
        """Makes the calls of ``order`` one after the other, or ``at_once``, and tells what each gave."""
        target = getattr(self, order.get("service", "back"))
        target.route(order.get("policy", "round-robin"))
        calls = [self._one(target, order, ask) for ask in order["asks"]]
        results = await asyncio.gather(*calls) if order.get("at_once") else [await one for one in calls]
        return {"results": results, "instances": [str(one) for one in self.back.instances()]}

    async def _one(self, target: Any, order: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
        chosen: dict[str, Any] = {name: order[name] for name in ("key", "exclude", "instance") if name in order}
        chosen["blocks"] = [one.encode() for one in order.get("blocks", [])]
        call = getattr(target, order.get("endpoint", "answer"))(ask, **chosen)
        result: dict[str, Any] = {"ticks": []}
        try:
            async with asyncio.timeout(order.get("patience")):
                async for tick in call:
                    result["ticks"].append(tick.index)
                    result |= {"worker": tick.worker, "from": str(tick.instance), "instance": str(call.instance)}
                    if len(result["ticks"]) == order.get("take"):
                        await call.aclose()
                        break
        except EpdError as error:
            result["error"] = error.to_wire()
        except TimeoutError:
            result["error"] = {"class": "TimeoutError"}
        return result


Front.link(Middle).link(Back)
Front.link(Back)
