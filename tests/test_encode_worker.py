# SPDX-License-Identifier: Apache-2.0
"""An encode worker without a graph and without a tower: what it says of one that hangs, and when it READs."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from components.encode_worker import EncodeConfig, EncodeWorker
from components.protocol import EncodeRequest, Picture
from dynamo_epd import metrics
from dynamo_epd.engine import checkpoint, encoder, environment
from dynamo_epd.failures import Hung
from dynamo_epd.flights import Flights
from dynamo_epd.sdk import dynamo_context
from tests.fake_clock import FakeClock

BOUND = 60.0
SILENCE = 60.0


class HangingEncoder:
    """A double of the vision tower: its first forward takes ten times ``SILENCE`` by ``clock``, as one that compiles,
    and the second hangs until it is let go."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.warm = clock, False
        self.began, self.let_go = threading.Event(), threading.Event()

    def process(self, image: Any) -> Any:
        return image

    def embed(self, items: Sequence[Any]) -> Sequence[Any]:
        if self.warm:
            self.began.set()
            assert self.let_go.wait(BOUND)
        self.clock.now += 0 if self.warm else 10 * SILENCE
        self.warm = True
        return items

    def patches(self, item: Any) -> int:
        return 1


def test_a_worker_whose_forward_hangs_says_that_it_does_not_live(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """However long its start has taken."""
    tower = HangingEncoder(clock)
    monkeypatch.setattr(metrics, "Metrics", MagicMock())
    monkeypatch.setitem(dynamo_context, "namespace", "tests")
    monkeypatch.setattr(environment, "prepare", lambda engine_args: None)
    monkeypatch.setattr(encoder, "load_encoder", lambda engine_args: tower)
    monkeypatch.setattr(checkpoint, "revision_of", lambda engine_args: "revision")
    worker = object.__new__(EncodeWorker)
    config = EncodeConfig(engine_silence=SILENCE, engine_args={"model": "a-tower"})
    vars(worker).update(config=config, open_arena=AsyncMock(), arena=SimpleNamespace(stats=None))

    async def main() -> None:
        await worker.start()
        assert tower.warm and worker.alive()
        asked = asyncio.create_task(worker.batcher.submit("a picture"))
        assert await asyncio.to_thread(tower.began.wait, BOUND)
        clock.now += SILENCE
        assert worker.alive()
        clock.now += 1
        with pytest.raises(Hung):
            worker.alive()
        tower.let_go.set()
        assert (await asked).result == "a picture"
        assert worker.alive()
        worker.batcher.close()
        worker.fetcher.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "cpu", "sizes"),
    [
        ({}, True, [10, 6, 4, 1, 1]),
        ({}, False, [10, 10, 2]),
        ({"max_batch_patches": 100}, False, [10, 6, 4, 1, 1]),
        ({"max_batch_patches": 1}, False, [1] * 22),
        ({"max_batch_patches": 10_000}, True, [10, 10, 2]),
    ],
    ids=["a CPU's own", "none on a GPU", "set", "one by one", "more than there are"],
)
def test_a_batch_has_so_many_images_and_so_many_patches(
    given: dict[str, Any], cpu: bool, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.encode_worker.CPU_PATCHES", 100)
    monkeypatch.setattr(environment, "cpu_build", lambda: cpu)
    worker = object.__new__(EncodeWorker)
    vars(worker).update(config=EncodeConfig(max_batch=10, **given), encoder=SimpleNamespace(patches=lambda item: item))
    ran: list[int] = []
    pictures = [1] * 10 + [10] * 5 + [50] + [25] * 4 + [100] + [101]

    async def main() -> None:
        batcher = worker.batches(lambda items: items, worker.config.max_batch, ran.append)
        assert [one.result for one in await batcher.submit_all(pictures)] == pictures
        batcher.close()

    asyncio.run(main())
    assert ran == sizes


@pytest.mark.parametrize("given", [{"max_batch": 0}, {"max_batch_patches": 0}])
def test_a_batch_has_room_for_one(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^max-batch and max-batch-patches must be 1 at least$"):
        EncodeConfig(**given)


class Away(Exception):
    """The bytes are not there any more."""


def test_a_picture_whose_embedding_is_kept_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the frontend says that it is; what an embedding is kept under says the worker itself, of what it READ."""
    worker = object.__new__(EncodeWorker)
    kept: dict[str, str] = {}
    looked: list[tuple[bool, bool]] = []

    def lookup(uuid: str, *, again: bool = False) -> str | None:
        looked.append((uuid in kept, again))
        return kept.get(uuid)

    async def encoded(uuid: str, data: bytes) -> tuple[str, float]:
        kept[uuid] = f"of {data.decode()}"
        return kept[uuid], 0.0

    vars(worker).update(
        config=EncodeConfig(),
        metrics=SimpleNamespace(visit=lambda: nullcontext(SimpleNamespace())),
        arena=SimpleNamespace(lookup=lookup, lease=lambda entry, seconds: entry),
        flights=Flights(),
        metadata={"of a picture": {}, "of another": {}},
        revision="revision",
        give=lambda request_id, handle: True,
        _encode=encoded,
    )

    async def ask(content: str | None, data: bytes | None, tenant: str = "") -> str:
        worker._data = AsyncMock(return_value=data, side_effect=Away if data is None else None)  # type: ignore[method-assign]
        (reply,) = [one async for one in worker.encode(EncodeRequest("", tenant, Picture(content=content)))]
        return str(reply.handle)

    async def main() -> None:
        content = hashlib.sha256(b"a picture").hexdigest()
        assert await ask(content, b"a picture") == "of a picture"
        assert await ask(content, None) == "of a picture"
        assert await ask(None, b"a picture") == "of a picture"
        assert looked == [(False, False), (False, True), (True, False), (True, False)]
        with pytest.raises(Away):
            await ask(content, None, tenant="another")
        assert await ask("no digest of it", b"another") == "of another"
        with pytest.raises(Away):
            await ask("no digest of it", None)

    asyncio.run(main())
