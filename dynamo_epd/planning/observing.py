# SPDX-License-Identifier: Apache-2.0
"""From the metrics of a stage's workers to what the policy sees: sums that outlive those who come, go and restart."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import httpx

from dynamo_epd.planning.doors import Staffed
from dynamo_epd.planning.policy import Observed

SCRAPE_SECONDS = 0.8
SCRAPE_BYTES = 4 * 1024 * 1024
SAMPLE = re.compile(
    rb"^epd_stage_(queue_depth|(?:queue|run)_seconds_(?:sum|count))(?:\{.*\})? ([0-9.eE+-]+)\s*$", re.MULTILINE
)
COUNTERS = ("run_seconds_count", "run_seconds_sum", "queue_seconds_count", "queue_seconds_sum")


@dataclasses.dataclass
class _Sums:
    """Of one service, over all workers that it ever had."""

    counters: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    last: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Worker → what it said last."""

    def add(self, worker: str, now: dict[str, float]) -> None:
        before = self.last.get(worker, {})
        for name in COUNTERS:
            # lower than before: another process has taken this worker's place, and counts from zero
            grown = now[name] - before.get(name, 0.0)
            self.counters[name] += grown if grown >= 0 else now[name]
        self.last[worker] = now


class Observer:
    """Scrapes and adds up. A service that reports no stage is none: `look` leaves it out."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=SCRAPE_SECONDS, trust_env=False)
        self._sums: dict[str, _Sums] = {}

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self, services: dict[str, Staffed]) -> dict[str, Observed]:
        """Service → what is seen of it now. A worker that does not answer counts with what it said last."""
        workers = [(name, worker) for name, staffed in services.items() for worker in staffed.workers]
        texts = await asyncio.gather(*(scraped(self._client, worker.metrics) for _, worker in workers))
        for (name, worker), text in zip(workers, texts, strict=True):
            if text is not None and (samples := stage_samples(text)) is not None:
                self._sums.setdefault(name, _Sums()).add(worker.name, samples)
        return {
            name: self._observed(staffed, self._sums[name]) for name, staffed in services.items() if name in self._sums
        }

    def _observed(self, staffed: Staffed, sums: _Sums) -> Observed:
        here = {worker.name for worker in staffed.workers}
        sums.last = {name: samples for name, samples in sums.last.items() if name in here}
        return Observed(
            replicas=staffed.replicas,
            ready=min(staffed.replicas, sum(worker.ready for worker in staffed.workers)),
            in_stage=sum(samples["queue_depth"] for samples in sums.last.values()),
            finished=sums.counters["run_seconds_count"],
            run_seconds=sums.counters["run_seconds_sum"],
            queued=sums.counters["queue_seconds_count"],
            queue_seconds=sums.counters["queue_seconds_sum"],
        )


async def scraped(client: httpx.AsyncClient, url: str | None) -> bytes | None:
    """The metrics at an address, or None: there are none yet, too many bytes, or not within `SCRAPE_SECONDS`."""
    if url is None:
        return None
    try:
        async with asyncio.timeout(SCRAPE_SECONDS), client.stream("GET", url) as reply:
            text = b""
            async for chunk in reply.aiter_bytes():
                text += chunk
                if len(text) > SCRAPE_BYTES:
                    return None
    except (httpx.HTTPError, TimeoutError):
        return None
    return text


def stage_samples(text: bytes) -> dict[str, float] | None:
    """The stage's own samples in Prometheus' text format, or None where there is no stage."""
    found: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        key = name.decode()
        found[key] = found.get(key, 0.0) + float(value)
    return found if {"queue_depth", *COUNTERS} <= found.keys() else None
