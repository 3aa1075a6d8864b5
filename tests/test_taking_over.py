# SPDX-License-Identifier: Apache-2.0
"""Who answers for a KV cache between prefill and decode: over doubles of the stages, without an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from components.decode_worker import DecodeWorker
from components.processor import Conversation
from components.protocol import DecodeRequest, Delta, PrefillReply, RejectRequest
from dynamo_epd.errors import EpdError, Preempted, WorkerLost
from dynamo_epd.given import Given
from dynamo_epd.sdk import dynamo_context

KV = {"remote_host": "x"}


class EngineDouble:
    """A decode engine; ``seen`` is what it was asked for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    async def generate(self, request_id: str, *_: Any, **__: Any) -> AsyncIterator[Delta]:
        self.seen.append(("generate", request_id))
        yield Delta([1])

    async def reject(self, request_id: str, kv: dict[str, Any]) -> None:
        self.seen.append(("reject", request_id))


class WorkerDouble(DecodeWorker):
    """A decode worker without configuration, arena and metrics."""

    def __init__(self) -> None:
        self._taken_over = Given()
        self.engine: Any = EngineDouble()
        self.metrics: Any = SimpleNamespace(visit=_Visit)


class _Visit:
    waited: float | None = None

    def __enter__(self) -> _Visit:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is counted."""


async def _ask(worker: WorkerDouble, name: str, until: float) -> list[Delta]:
    return [one async for one in worker.generate(DecodeRequest(name, [1], [], "{}", kv=KV, kv_until=until))]


async def _reject(worker: WorkerDouble, name: str) -> None:
    async for _ in worker.reject(RejectRequest(name, KV)):
        """It is done."""


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerDouble, "config", SimpleNamespace(transfer_timeout=1.0), raising=False)
    monkeypatch.setitem(dynamo_context, "stopping", asyncio.Event())


def test_who_took_it_gives_it_back_itself() -> None:
    async def main() -> None:
        worker = WorkerDouble()
        assert len(await _ask(worker, "r", time.time() + 60)) == 1
        await _reject(worker, "r")
        assert worker.engine.seen == [("generate", "r")]

    asyncio.run(main())


def test_what_was_given_back_is_not_pulled_by_a_request_that_comes_late() -> None:
    async def main() -> None:
        worker = WorkerDouble()
        await _reject(worker, "r")
        with pytest.raises(Preempted):
            await _ask(worker, "r", time.time() + 60)
        assert worker.engine.seen == [("reject", "r")]

    asyncio.run(main())


def test_a_worker_that_stood_still_neither_pulls_nor_gives_back_what_another_may_be_pulling() -> None:
    async def main() -> None:
        worker = WorkerDouble()
        with pytest.raises(Preempted):
            await _ask(worker, "r", time.time() - 0.01)
        assert worker.engine.seen == []
        await _reject(worker, "r")  # but whoever asked no other can tell it to
        assert worker.engine.seen == [("reject", "r")]

    asyncio.run(main())


def test_a_worker_that_leaves_takes_over_nothing() -> None:
    async def main() -> None:
        dynamo_context["stopping"].set()
        worker = WorkerDouble()
        with pytest.raises(Preempted):
            await _ask(worker, "r", time.time() + 60)
        assert worker.engine.seen == []

    asyncio.run(main())


class CallDouble:
    """A call of ``instance`` that ends in ``end``: a reply, an error, or never."""

    def __init__(self, instance: int | None, end: Any):
        self.instance, self.taken, self._end = instance, True, end

    def __aiter__(self) -> CallDouble:
        return self

    async def __anext__(self) -> Any:
        return await self.only()

    async def only(self) -> Any:
        if self._end is None:
            await asyncio.sleep(60)
        if isinstance(self._end, EpdError):
            raise self._end
        return self._end

    async def aclose(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize(
    ("instance", "end"), [(7, WorkerLost("gone")), (7, Preempted("late")), (7, None), (None, None)]
)
def test_a_kv_cache_is_given_back_by_whoever_was_asked_to_take_it(instance: int | None, end: Any) -> None:
    told: list[tuple[str, int | None]] = []

    def rejecting(request: RejectRequest, *, instance: int | None) -> CallDouble:
        told.append((request.request_id, instance))
        return CallDouble(instance, "done")

    processor: Any = SimpleNamespace(
        prefills_apart=lambda *_: True,
        blocks_of=lambda *_: (),
        take_over=lambda decode, *_: decode,
        prefill_worker=SimpleNamespace(prefill=lambda *_, **__: CallDouble(3, PrefillReply(KV, 0.0, [1]))),
        decode_worker=SimpleNamespace(generate=lambda *_, **__: CallDouble(instance, end), reject=rejecting),
    )
    request: Any = SimpleNamespace(pictures=[], deadline=time.time() + 60, request_id="q", tenant="")
    prompt: Any = SimpleNamespace(request_id="q.0", token_ids=[1], images=[], sampling="{}", reasoning=None)

    async def main() -> None:
        conversation = Conversation(processor, request)
        attempt = conversation._attempt(prompt, 0, [])
        with pytest.raises((EpdError, TimeoutError)):
            await asyncio.wait_for(anext(attempt), 0.05)
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert told == [("q.0.0", instance)]
