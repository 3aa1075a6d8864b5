# SPDX-License-Identifier: Apache-2.0
"""Every metric of ours, in base units, with the labels that name its stage.

A process has one `Metrics`; prometheus_client's default registry holds what it makes, and each process serves that
registry where its runtime serves its own (``DYN_SYSTEM_PORT``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

LABELS = ("dynamo_namespace", "dynamo_component", "model")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
JOB_SECONDS = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


class Metrics:
    """The metrics of one stage. Attributes are prometheus_client's objects with this stage's labels filled in."""

    def __init__(self, namespace: str, component: str, model: str):
        self._labels = (namespace, component, model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Any:
        return Histogram(name, text, LABELS, buckets=buckets).labels(*self._labels)

    def restarts(self, count: int) -> None:
        """For any worker: its supervisor counts and its process says so, lest a death fall between two scrapes."""
        restarts = Counter("epd_worker_restarts", "Times that this worker was started again after a death", LABELS)
        restarts.labels(*self._labels).inc(count)

    def watch_dropped(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """For any worker: reports, whenever they are scraped, the messages that were dropped because they are none."""
        REGISTRY.register(_DroppedCollector(counts, self._labels))

    def requests(self) -> RequestMetrics:
        """For the stage that sees whole requests."""
        return RequestMetrics(
            self._histogram("epd_request_duration_seconds", "Seconds from a request's arrival to its last byte"),
            Counter("epd_requests", "Requests by HTTP status", (*LABELS, "status")),
            self._labels,
        )

    def tokens(self) -> TokenMetrics:
        """For the stage through which every token goes."""
        return TokenMetrics(
            self._histogram("epd_time_to_first_token_seconds", "Seconds from arrival to the first token"),
            self._histogram("epd_inter_token_latency_seconds", "Seconds between two deltas of an answer"),
        )

    def stage(self) -> StageMetrics:
        """For any stage: how many are in it, how long they waited, how long they ran."""
        return StageMetrics(
            Gauge("epd_stage_queue_depth", "Requests that wait or run in this stage", LABELS).labels(*self._labels),
            self._histogram("epd_stage_queue_seconds", "Seconds a request waited in this stage"),
            self._histogram("epd_stage_run_seconds", "Seconds a request was in this stage and did not wait"),
        )

    def batch_size(self) -> Any:
        """Images in one forward of the vision tower."""
        return self._histogram("epd_encode_batch_size", "Images in one forward", (1, 2, 4, 8, 16, 32, 64))

    def embed_batch_size(self) -> Any:
        """Texts in one batch, which may take several forwards."""
        return self._histogram("epd_embed_batch_size", "Texts in one batch", (1, 2, 4, 8, 16, 32, 64, 128, 256))

    def job_queue(self) -> Any:
        """Apart from the stage's waits: alerts go by those, jobs may wait. Once for a job, when its first picture is
        there: the time from its arrival in the queue, whoever had to give it back, until that picture's worker took it.
        """
        return self._histogram("epd_job_queue_seconds", "Seconds a job lay in the queue", JOB_SECONDS)

    def watch_jobs(self, waiting: Callable[[], int | None]) -> None:
        """Reports whenever they are scraped how many jobs no worker has taken, or nothing where that is not known.
        Every worker says the same of the one queue."""
        REGISTRY.register(_JobsCollector(waiting, self._labels))

    def images(self) -> Any:
        """Pictures made."""
        return Counter("epd_images_generated", "Pictures made", LABELS).labels(*self._labels)

    def stored(self) -> Any:
        """Pictures in the object store."""
        return Counter("epd_images_stored", "Pictures stored", LABELS).labels(*self._labels)

    def expired(self) -> Any:
        """Pictures whose time in the object store was over."""
        return Counter("epd_images_expired", "Pictures deleted because their time was over", LABELS).labels(
            *self._labels
        )

    def denoise_batch_size(self) -> Any:
        """Pictures in one call of the denoiser."""
        return self._histogram("epd_denoise_batch_size", "Pictures in one denoise step", (1, 2, 4, 8, 16, 32))

    def denoise_steps(self) -> Any:
        """Seconds of each denoise step."""
        return self._histogram("epd_denoise_step_seconds", "Seconds of one denoise step")

    def planner(self) -> PlannerMetrics:
        """For the planner: what it sees of each stage, and what it asks for."""
        labels = (*LABELS, "stage")
        return PlannerMetrics(
            Gauge("epd_planner_replicas", "Workers of a stage that are ready, as the planner sees them", labels),
            Gauge("epd_planner_target_replicas", "Workers that the planner wants a stage to have", labels),
            Gauge(
                "epd_planner_queue_seconds",
                "Mean wait in a stage over ten seconds, as the planner sees it; 0 where no wait ended",
                labels,
            ),
            Counter("epd_planner_decisions", "Changes of a stage's workers by the planner", (*labels, "direction")),
            self._labels,
        )

    def watch_arena(self, stats: Callable[[], Any], *, cache: bool) -> None:
        """Reports an arena's own counters whenever they are scraped. With ``cache`` it is the embedding cache too."""
        REGISTRY.register(_ArenaCollector(stats, self._labels, cache))


class RequestMetrics:
    def __init__(self, duration: Any, outcomes: Counter, labels: tuple[str, ...]):
        self.duration = duration
        self._outcomes = outcomes
        self._labels = labels

    def count(self, status: int) -> None:
        self._outcomes.labels(*self._labels, str(status)).inc()


class TokenMetrics:
    def __init__(self, first_token: Any, inter_token: Any):
        self.first_token = first_token
        self.inter_token = inter_token


class PlannerMetrics:
    def __init__(self, replicas: Gauge, target: Gauge, queue: Gauge, decisions: Counter, labels: tuple[str, ...]):
        self._replicas, self._target, self._queue, self._decisions = replicas, target, queue, decisions
        self._labels = labels

    def looked(self, stage: str, *, ready: int, target: int, queue_seconds: float) -> None:
        """After each look at a stage."""
        labels = (*self._labels, stage)
        self._replicas.labels(*labels).set(ready)
        self._target.labels(*labels).set(target)
        self._queue.labels(*labels).set(queue_seconds)
        for direction in ("grow", "shrink"):  # at 0 from the beginning: the first step up would be no increase else
            self._decisions.labels(*labels, direction)

    def decided(self, stage: str, before: int, after: int) -> None:
        """After a change that was not refused."""
        self._decisions.labels(*self._labels, stage, "grow" if after > before else "shrink").inc()


class Visit:
    """One request in a stage."""

    waited: float | None = None
    """Seconds in which the stage did nothing for it, or None while they are not known. A visit that ends before has
    waited all the time: else the queue that clients leave would look like work."""


class StageMetrics:
    def __init__(self, depth: Any, queue: Any, run: Any):
        self._depth = depth
        self._queue = queue
        self._run = run

    @contextmanager
    def visit(self) -> Iterator[Visit]:
        """Around all that the stage does for one request."""
        visit, began = Visit(), perf_counter()
        self._depth.inc()
        try:
            yield visit
        finally:
            self._depth.dec()
            seconds = perf_counter() - began
            waited = seconds if visit.waited is None else visit.waited
            self._queue.observe(waited)
            self._run.observe(max(0.0, seconds - waited))


class _DroppedCollector:
    """Turns `dynamo_epd.dropped`'s plain numbers into a metric family at scrape time."""

    def __init__(self, counts: Callable[[], Mapping[str, int]], labels: tuple[str, ...]):
        self._counts = counts
        self._labels = labels

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        text = "Messages dropped because they are none: not to be decoded, or of no known shape"
        family = CounterMetricFamily("epd_messages_dropped", text, labels=(*LABELS, "place"))
        for place, count in self._counts().items():
            family.add_metric((*self._labels, place), count)
        yield family


class _JobsCollector:
    """Turns `dynamo_epd.jobs`' plain number into a metric family at scrape time."""

    def __init__(self, waiting: Callable[[], int | None], labels: tuple[str, ...]):
        self._waiting = waiting
        self._labels = labels

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        waiting = self._waiting()
        if waiting is not None:
            family = GaugeMetricFamily("epd_job_queue_depth", "Jobs that no worker has taken", labels=LABELS)
            family.add_metric(self._labels, waiting)
            yield family


class _ArenaCollector:
    """Turns `dynamo_epd.transfer`'s plain numbers into metric families at scrape time."""

    def __init__(self, stats: Callable[[], Any], labels: tuple[str, ...], cache: bool):
        self._stats = stats
        self._labels = labels
        self._cache = cache

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._counter("nixl_transfer_bytes", "Bytes READ over NIXL", stats.transfer_bytes)
        seconds = SummaryMetricFamily("nixl_transfer_seconds", "Seconds of READs over NIXL, with digest", labels=LABELS)
        seconds.add_metric(self._labels, stats.transfers, stats.transfer_seconds)
        yield seconds
        yield self._counter("epd_transfer_failures", "READs refused or failed", stats.transfer_failures)
        yield self._counter("epd_digest_failures", "READs whose bytes were refused", stats.digest_failures)
        yield self._gauge("epd_arena_used_bytes", "Bytes of the arena in use", stats.bytes_used)
        yield self._gauge("epd_arena_leases", "Leases outstanding", stats.leases)
        yield self._counter("epd_arena_leases_expired", "Leases that nobody gave back in time", stats.leases_expired)
        if self._cache:
            yield self._counter("epd_embedding_cache_hits", "Images found encoded", stats.hits)
            yield self._counter("epd_embedding_cache_misses", "Images that had to be encoded", stats.misses)
            yield self._gauge("epd_embedding_cache_bytes", "Bytes of encoded images kept", stats.bytes_used)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family
