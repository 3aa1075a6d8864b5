# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from components.embed_worker import EmbedConfig, EmbedWorker
from components.encode_worker import EncodeWorker
from components.protocol import EncodeRequest, Picture, StatesRequest
from dynamo_epd.batching import Batcher
from dynamo_epd.metrics import Metrics, StageMetrics

BOUND = 60.0


def test_every_metric_is_there_under_its_name_and_labels():
    metrics = Metrics("space", "Stage", "model")
    requests, tokens, stage = metrics.requests(), metrics.tokens(), metrics.stage()
    arena = SimpleNamespace(
        transfer_bytes=4096,
        transfers=2,
        transfer_failures=2,
        transfer_seconds=0.5,
        digest_failures=1,
        bytes_used=64,
        leases=5,
        leases_expired=6,
        hits=7,
        misses=8,
    )
    metrics.watch_arena(lambda: arena, cache=True)
    requests.duration.observe(0.2)
    requests.count(200)
    tokens.first_token.observe(0.1)
    tokens.inter_token.observe(0.01)
    with stage.visit() as visit:
        visit.waited = 0.3
        assert re.search(r"(?m)^epd_stage_queue_depth\{.*\} 1\.0$", generate_latest().decode())
    metrics.batch_size().observe(4)
    metrics.restarts(3)
    metrics.watch_dropped(lambda: {"encode": 9})
    waiting: list[int | None] = [None]
    metrics.watch_jobs(lambda: waiting[0])
    assert "epd_job_queue_depth" not in generate_latest().decode(), "nobody knows"
    waiting[0] = 12
    text = generate_latest().decode()
    labels = 'dynamo_component="Stage",dynamo_namespace="space",model="model"'
    for name, value in {
        "epd_request_duration_seconds_sum": 0.2,
        "epd_time_to_first_token_seconds_sum": 0.1,
        "epd_inter_token_latency_seconds_sum": 0.01,
        "epd_stage_queue_depth": 0.0,
        "epd_stage_queue_seconds_sum": 0.3,
        "epd_stage_run_seconds_count": 1.0,
        "epd_stage_run_seconds_sum": 0.0,  # it is not said to have run while it waited
        "epd_encode_batch_size_sum": 4.0,
        "epd_worker_restarts_total": 3.0,
        "epd_job_queue_depth": 12.0,
        "epd_embedding_cache_hits_total": 7.0,
        "epd_embedding_cache_misses_total": 8.0,
        "epd_embedding_cache_bytes": 64.0,
        "epd_arena_leases": 5.0,
        "epd_arena_leases_expired_total": 6.0,
        "epd_transfer_failures_total": 2.0,
        "epd_digest_failures_total": 1.0,
        "nixl_transfer_bytes_total": 4096.0,
        "nixl_transfer_seconds_sum": 0.5,
        "nixl_transfer_seconds_count": 2.0,
    }.items():
        lines = [line for line in text.splitlines() if line.startswith(name + "{")]
        assert len(lines) == 1, f"{name}: {lines}"
        found, said = lines[0].rsplit(" ", 1)
        assert ",".join(sorted(found[len(name) + 1 : -1].split(","))) == labels
        assert float(said) == value, name
    assert (
        'epd_messages_dropped_total{dynamo_component="Stage",dynamo_namespace="space",model="model",place="encode"} 9.0'
        in text
    )
    assert (
        'epd_requests_total{dynamo_component="Stage",dynamo_namespace="space",model="model",status="200"} 1.0' in text
    )


class Stage:
    """One stage's metrics in a registry of their own: a process has each only once."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.metrics = StageMetrics(
            Gauge("depth", "", registry=registry),
            Histogram("queue", "", registry=registry),
            Histogram("run", "", registry=registry),
        )

    def seconds(self) -> tuple[float, float]:
        """In the queue, and at work, of the one request that there was."""
        assert [self._registry.get_sample_value(f"{name}_count") for name in ("queue", "run")] == [1, 1]
        queued, ran = (self._registry.get_sample_value(f"{name}_sum") for name in ("queue", "run"))
        assert queued is not None and ran is not None
        return queued, ran


async def left(replies: AsyncIterator[Any], seconds: float) -> None:
    """A caller that goes away ``seconds`` after it asked."""
    asked = asyncio.ensure_future(anext(replies))
    await asyncio.sleep(seconds)
    asked.cancel()
    await asyncio.wait([asked], timeout=BOUND)
    assert asked.cancelled()


def test_a_request_that_leaves_the_queue_has_waited_and_not_run() -> None:
    stage = Stage()
    began, go = threading.Event(), threading.Event()

    def run(items: Sequence[list[int]]) -> Sequence[list[int]]:
        began.set()
        assert go.wait(BOUND)
        return items

    async def scenario() -> None:
        batcher = Batcher(run, most=1, waiting=2)
        worker = object.__new__(EmbedWorker)
        encoder = SimpleNamespace(vocabulary=3)
        vars(worker).update(config=EmbedConfig("tiny-t5"), metrics=stage.metrics, batcher=batcher, encoder=encoder)
        running = asyncio.create_task(batcher.submit([1]))
        assert await asyncio.to_thread(began.wait, BOUND)
        await left(worker.states(StatesRequest("", [2], 1, masked=True)), 0.3)
        go.set()
        await running
        batcher.close()

    asyncio.run(scenario())
    queued, ran = stage.seconds()
    assert queued > 0.25 and ran == 0, "it was never taken up"


def test_a_request_that_leaves_while_its_picture_is_fetched_has_not_waited() -> None:
    stage = Stage()

    async def scenario() -> None:
        worker = object.__new__(EncodeWorker)
        fetcher = SimpleNamespace(fetch=lambda url: asyncio.sleep(BOUND))
        vars(worker).update(metrics=stage.metrics, fetcher=fetcher)
        await left(worker.encode(EncodeRequest("", "", Picture(url="http://far.example/slow.png"))), 0.3)

    asyncio.run(scenario())
    queued, ran = stage.seconds()
    assert queued == 0 and ran > 0.25
