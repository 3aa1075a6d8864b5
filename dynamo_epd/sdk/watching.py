# SPDX-License-Identifier: Apache-2.0
"""What `dynamo top` shows of a running graph: two looks at the metrics of every worker, and what lies between them."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from dynamo_epd.planning.observing import SCRAPE_SECONDS, growth, scraped
from dynamo_epd.sdk.control import ask

Samples = dict[tuple[str, str], float]
"""(name, upper bound of a histogram's bucket or "") → value, over all other labels."""

FAILED_REQUESTS = "failed requests"
"""Name of a sample of our own: `epd_requests_total` with a status of 500 and above."""
FAILURES = (FAILED_REQUESTS, "epd_transfer_failures_total", "epd_digest_failures_total")
WAITS = ("epd_stage_queue_seconds",)
RUNS = ("epd_stage_run_seconds", "epd_request_duration_seconds")
REQUESTS = ("epd_stage_run_seconds_count", "epd_requests_total", "epd_time_to_first_token_seconds_count")
"""Of these the first that a stage reports counts; a processor counts answers that have begun."""
OUTPUTS = (
    ("vllm:generation_tokens_total", "tokens"),
    ("epd_images_generated_total", "images"),
    ("epd_encode_batch_size_sum", "images"),
    ("epd_embed_batch_size_sum", "texts"),
)
CACHES = (
    ("epd_embedding_cache_hits_total", ("epd_embedding_cache_hits_total", "epd_embedding_cache_misses_total")),
    ("vllm:prefix_cache_hits_total", ("vllm:prefix_cache_queries_total",)),
)
"""Hits, and what adds up to all that was looked for."""
JOBS = "epd_job_queue_depth", ""
NIXL_BYTES = ("nixl_transfer_bytes_total", "vllm:nixl_bytes_transferred_sum")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One service. Rates, waits and shares are of the time since the look before.

    None: it reports no such thing, nothing of it happened, or there was no look before.
    """

    name: str
    ready: int
    wanted: int
    silent: int
    """Workers that are ready and have metrics, but did not give them."""
    queue_depth: float | None
    job_queue_depth: float | None
    """Jobs that none of its workers has taken."""
    wait_p50: float | None
    wait_p99: float | None
    """Seconds."""
    run_seconds: float | None
    """Mean of one request."""
    requests_per_second: float | None
    output_per_second: float | None
    output: str | None
    """What that counts: tokens, images, texts."""
    cache_hit_rate: float | None
    nixl_bytes_per_second: float | None
    failures: int | None
    """Since the workers that were there at the first look had begun: answers of 500 and above, failed hand-offs."""
    memory_bytes: int
    """Resident, of its workers and all of their children; pages that these share count for each."""


class Watch:
    """Looks at the graph behind the control socket ``path``. `look` raises ControlError once nobody answers there."""

    def __init__(self, path: str | Path):
        self.url: str | None = None
        """Of the graph, once it was looked at."""
        self.reports = False
        """Whether any worker has metrics."""
        self._path = path
        self._client = httpx.AsyncClient(timeout=SCRAPE_SECONDS, trust_env=False)
        self._when: float | None = None
        self._last: dict[tuple[str, int], Samples] = {}
        self._unread: set[tuple[str, int]] = set()
        self._failures: dict[str, float] = {}

    async def close(self) -> None:
        await self._client.aclose()

    async def look(self) -> list[Stage]:
        """Every service of the graph, callers before what they call."""
        services: dict[str, list[dict[str, Any]]] = (await ask(self._path, do="status"))["services"]
        workers = [(name, one) for name, of_service in services.items() for one in of_service]
        texts = await asyncio.gather(*(scraped(self._client, one["metrics"]) for _, one in workers))
        now = time.monotonic()
        seconds = None if self._when is None else now - self._when
        read = {
            _identity(name, one): samples
            for (name, one), text in zip(workers, texts, strict=True)
            if text is not None and (samples := samples_of(text)) is not None
        }
        stages = [self._stage(name, of_service, read, seconds) for name, of_service in services.items()]
        here = {_identity(name, one) for name, one in workers}
        # who did not answer this time is compared with what it said last
        self._last = {one: samples for one, samples in (self._last | read).items() if one in here}
        self._unread = {_identity(name, one) for name, one in workers if one["ready"]} - self._last.keys()
        self._when = now
        self.url = next((one["url"] for _, one in workers if one["url"]), self.url)
        self.reports = any(one["metrics"] for _, one in workers)
        return stages

    def _stage(
        self, name: str, workers: list[dict[str, Any]], read: dict[tuple[str, int], Samples], seconds: float | None
    ) -> Stage:
        identities = [_identity(name, one) for one in workers]
        now = _sum(read[one] for one in identities if one in read)
        grown = _sum(self._growth(one, read[one]) for one in identities if one in read) if seconds else {}
        counted = now if seconds is None else grown
        self._failures[name] = self._failures.get(name, 0.0) + sum(counted.get((one, ""), 0.0) for one in FAILURES)
        waits = _buckets(grown, _first(now, WAITS, "_bucket"))
        ran = _first(now, RUNS, "_count")
        output = next(((one, unit) for one, unit in OUTPUTS if (one, "") in now), None)
        cache = next(((hits, asked) for hits, asked in CACHES if (hits, "") in now), None)
        nixl = [grown[one, ""] for one in NIXL_BYTES if (one, "") in grown]
        per_second = 1 / seconds if seconds else None
        return Stage(
            name=name,
            ready=sum(one["ready"] for one in workers),
            wanted=sum(not one["leaving"] for one in workers),
            silent=sum(
                one["ready"] and one["metrics"] is not None and _identity(name, one) not in read for one in workers
            ),
            queue_depth=now.get(("epd_stage_queue_depth", "")),
            # one queue, of which every worker tells
            job_queue_depth=max((read[one][JOBS] for one in identities if JOBS in read.get(one, {})), default=None),
            wait_p50=quantile(0.5, waits),
            wait_p99=quantile(0.99, waits),
            run_seconds=_ratio(grown, (f"{ran}_sum",), (f"{ran}_count",)),
            requests_per_second=_times(grown.get((_first(now, REQUESTS), "")), per_second),
            output_per_second=_times(grown.get((output[0], "")) if output else None, per_second),
            output=output[1] if output else None,
            cache_hit_rate=_ratio(grown, cache[:1], cache[1]) if cache else None,
            nixl_bytes_per_second=_times(sum(nixl) if nixl else None, per_second),
            failures=int(self._failures[name]) if any((one, "") in now for one in FAILURES) else None,
            memory_bytes=sum(memory(one["pid"]) for one in workers if one["pid"] is not None),
        )

    def _growth(self, worker: tuple[str, int], now: Samples) -> Samples:
        """Of a worker's counters since it was last read: from zero for a process that was not there, or not ready."""
        if worker in self._unread:
            return dict.fromkeys(now, 0.0)
        return growth(self._last.get(worker, {}), now)


def samples_of(text: bytes) -> Samples | None:
    """Everything in Prometheus' text format, or None for what is not of that format."""
    found: Samples = {}
    try:
        for family in text_string_to_metric_families(text.decode()):
            for name, labels, value, *_ in family.samples:
                key = name, labels.get("le", "")
                found[key] = found.get(key, 0.0) + value
                if name == "epd_requests_total":
                    failed = value if labels.get("status", "") >= "500" else 0.0
                    found[FAILED_REQUESTS, ""] = found.get((FAILED_REQUESTS, ""), 0.0) + failed
    except ValueError:
        return None
    return found


def quantile(share: float, buckets: list[tuple[float, float]]) -> float | None:
    """Of a histogram, from (upper bound, count of what is not above it) in order; None when it is empty.

    Linear within a bucket, and the highest finite bound for what lies above it, as Prometheus' `histogram_quantile`
    (https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile).
    """
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    lower, below = 0.0, 0.0
    for upper, count in buckets:
        if count >= rank:
            if math.isinf(upper):
                return lower
            return lower + (upper - lower) * (rank - below) / (count - below) if count > below else upper
        lower, below = upper, count
    return lower


def memory(pid: int) -> int:
    """Resident bytes of a process and its children, or 0 when it has gone."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.Error:  # it ends just now: what was counted so far must do
        pass
    return total


def _identity(service: str, worker: dict[str, Any]) -> tuple[str, int]:
    """Of a process: one that was started again counts from zero."""
    return f"{service}-{worker['index']}", worker["pid"] or 0


def _sum(many: Iterable[Samples]) -> Samples:
    found: Samples = {}
    for samples in many:
        for key, value in samples.items():
            found[key] = found.get(key, 0.0) + value
    return found


def _first(samples: Samples, names: Iterable[str], ending: str = "") -> str:
    """The first name that there is, without ``ending``; a histogram's buckets are there by their last bound."""
    bound = "+Inf" if ending == "_bucket" else ""
    return next((name for name in names if (name + ending, bound) in samples), "")


def _buckets(samples: Samples, name: str) -> list[tuple[float, float]]:
    return sorted((float(bound), count) for (found, bound), count in samples.items() if found == f"{name}_bucket")


def _ratio(samples: Samples, parts: Iterable[str], wholes: Iterable[str]) -> float | None:
    whole = sum(samples.get((one, ""), 0.0) for one in wholes)
    return sum(samples.get((one, ""), 0.0) for one in parts) / whole if whole > 0 else None


def _times(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other
