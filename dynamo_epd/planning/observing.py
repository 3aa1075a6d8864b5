# SPDX-License-Identifier: Apache-2.0
"""From the metrics of a stage's workers to what the policy sees: sums that outlive those who come, go and restart."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

import httpx

from dynamo_epd.planning.doors import Staffed, Worker
from dynamo_epd.planning.policy import Observed

SCRAPE_SECONDS = 0.8
SCRAPE_BYTES = 4 * 1024 * 1024
SAMPLE = re.compile(
    rb"^epd_(?:stage_|job_(?=queue_seconds_sum)|(?=job_queue_depth))"
    rb"((?:job_)?queue_depth|(?:queue|run)_seconds_(?:sum|count))(?:\{.*\})? ([0-9.eE+-]+)\s*$",
    re.MULTILINE,
)
"""The time that jobs lay in the queue adds to the stage's waits. Their count does not: each has its visit there. Jobs
that nobody has taken are no visits yet, and a number of their own."""
COUNTERS = ("run_seconds_count", "run_seconds_sum", "queue_seconds_count", "queue_seconds_sum")

Key = TypeVar("Key")


@dataclasses.dataclass
class _Sums:
    """Of one service, over all workers that it ever had."""

    counters: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    last: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Worker → what it said last."""
    unread: set[str] = dataclasses.field(default_factory=set)
    """Workers that were ready at an earlier look, but have said nothing yet: what they did until then is no news."""
    known_late: float = 0.0
    """Requests that such workers had in the stage when they were first read, or those of `lost` that had not died."""
    lost: set[str] = dataclasses.field(default_factory=set)
    """Workers that did not answer when they were not ready, nor since: they are dead, most likely, and so is what they
    had. It would keep its workers, and ask for more, through all the starts of one that does not come up."""

    def add(self, worker: str, now: dict[str, float]) -> None:
        before = self.last.get(worker, {})
        if worker in self.unread:
            self.known_late += now["queue_depth"]
        else:
            grown = growth(before, now)
            for name in COUNTERS:
                self.counters[name] += grown[name]
        if worker in self.lost and all(now[name] >= before[name] for name in COUNTERS):
            self.known_late += before["queue_depth"]  # the same process: what was left out had arrived before
        self.last[worker] = now

    def looked(self, workers: tuple[Worker, ...], answered: set[str]) -> None:
        """After a look at them: forgets who has gone, and notes who did not answer."""
        here = {worker.name for worker in workers}
        self.last = {name: samples for name, samples in self.last.items() if name in here}
        self.lost |= {worker.name for worker in workers if not worker.ready}
        self.lost = (self.lost - answered) & self.last.keys()
        # one that was ready, and is not for a while, has a past all the same
        self.unread = {one.name for one in workers if one.ready or one.name in self.unread} - self.last.keys()


class Observer:
    """Scrapes and adds up. A service that reports no stage is none: `look` leaves it out."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=SCRAPE_SECONDS, trust_env=False)
        self._sums: dict[str, _Sums] = {}

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self, services: dict[str, Staffed]) -> dict[str, Observed]:
        """Service → what is seen of it now. A worker that does not answer counts with what it said last.

        One that is not ready either is taken for dead: what it has done still counts, what it had to do does not.
        """
        workers = [(name, worker) for name, staffed in services.items() for worker in staffed.workers]
        texts = await asyncio.gather(*(scraped(self._client, worker.metrics) for _, worker in workers))
        answered: dict[str, set[str]] = {}
        for (name, worker), text in zip(workers, texts, strict=True):
            if text is not None and (samples := stage_samples(text)) is not None:
                self._sums.setdefault(name, _Sums()).add(worker.name, samples)
                answered.setdefault(name, set()).add(worker.name)
        return {
            name: self._observed(staffed, self._sums[name], answered.get(name, set()))
            for name, staffed in services.items()
            if name in self._sums
        }

    def _observed(self, staffed: Staffed, sums: _Sums, answered: set[str]) -> Observed:
        sums.looked(staffed.workers, answered)
        return Observed(
            replicas=staffed.replicas,
            ready=min(staffed.replicas, sum(worker.ready for worker in staffed.workers)),
            in_stage=sum(samples["queue_depth"] for name, samples in sums.last.items() if name not in sums.lost),
            finished=sums.counters["run_seconds_count"],
            run_seconds=sums.counters["run_seconds_sum"],
            queued=sums.counters["queue_seconds_count"],
            queue_seconds=sums.counters["queue_seconds_sum"],
            known_late=sums.known_late,
            # one queue, of which every worker tells
            jobs=max(
                (one.get("job_queue_depth", 0.0) for name, one in sums.last.items() if name not in sums.lost),
                default=0.0,
            ),
        )


def growth(before: Mapping[Key, float], now: Mapping[Key, float]) -> dict[Key, float]:
    """Of one worker's counters. Lower than before: another process has taken its place, and counts from zero."""
    grown = {name: value - before.get(name, 0.0) for name, value in now.items()}
    return {name: value if value >= 0 else now[name] for name, value in grown.items()}


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
    """The stage's own samples in Prometheus' text format, jobs' waits added, or None where there is no stage."""
    found: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        key = name.decode()
        found[key] = found.get(key, 0.0) + float(value)
    return found if {"queue_depth", *COUNTERS} <= found.keys() else None
