# SPDX-License-Identifier: Apache-2.0
"""An encode worker without a graph and without a tower: what it says of one that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from components.encode_worker import EncodeConfig, EncodeWorker
from dynamo_epd import metrics
from dynamo_epd.engine import checkpoint, encoder, environment
from dynamo_epd.failures import Hung
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
