# SPDX-License-Identifier: Apache-2.0
"""A discrete-event replay of a trace: queues, workers that take time to start, and the planner's own policy.

A stage is one queue, first come first served, before workers of ``concurrency`` slots each. A worker that is asked for
serves after ``replica_start_seconds``; one that leaves takes nothing new and is gone when its last request is done.
Every worker is paid for from the moment it is asked for until it is gone.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from typing import Any

from dynamo_epd.planning.policy import Limits, Observed, State, decide, replicas_for
from dynamo_epd.planning.traces import Arrival, Trace, arrivals

LOOK_SECONDS = 1.0
"""How often the planner looks, as `components.planner` does."""


@dataclasses.dataclass
class _Worker:
    asked: float
    ready: bool
    busy: int = 0
    leaving: bool = False


@dataclasses.dataclass(eq=False)
class _Request:
    arrival: Arrival
    step: int = 0
    since: float = 0.0


@dataclasses.dataclass(frozen=True)
class Made:
    """A decision, when it was made, and what it changed."""

    time: float
    stage: str
    before: int
    after: int
    reason: str
    cause: float


@dataclasses.dataclass
class Replay:
    """What came of it. ``samples``: time → stage → (workers paid for, requests waiting), once a look."""

    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    within: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    ends: list[tuple[float, bool]] = dataclasses.field(default_factory=list)
    """(arrival, whether within its limit) of every request, in the order of their ends."""
    replica_seconds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    decisions: list[Made] = dataclasses.field(default_factory=list)
    samples: dict[float, dict[str, tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def attainment(self, kind: str | None = None) -> float:
        """Share of the requests (of one kind, or of all) that ended within their kind's limit."""
        if kind is not None:
            return self.within[kind] / self.finished[kind]
        return self.within.total() / self.finished.total()


class _Stage:
    def __init__(self, name: str, limits: Limits, replicas: int):
        self.name, self.limits = name, limits
        self.queue: collections.deque[_Request] = collections.deque()
        self.workers = [_Worker(0.0, ready=True) for _ in range(replicas)]
        self.state = State()
        self.running = 0
        self.finished = self.run_seconds = self.queued = self.queue_seconds = 0.0

    @property
    def staying(self) -> list[_Worker]:
        return [worker for worker in self.workers if not worker.leaving]

    def free(self) -> _Worker | None:
        for worker in self.workers:
            if worker.ready and not worker.leaving and worker.busy < self.limits.concurrency:
                return worker
        return None

    def observed(self) -> Observed:
        staying = self.staying
        return Observed(
            replicas=len(staying),
            ready=sum(worker.ready for worker in staying),
            in_stage=len(self.queue) + self.running,
            finished=self.finished,
            run_seconds=self.run_seconds,
            queued=self.queued,
            queue_seconds=self.queue_seconds,
        )


class Simulator:
    """One replay. With ``fixed`` (stage → workers) nobody plans and these stay."""

    def __init__(self, trace: Trace, fixed: dict[str, int] | None = None):
        self.trace = trace
        self.fixed = fixed
        begin = fixed or {name: _enough(trace, name, trace.load(name, 0.0)) for name in trace.limits}
        self.stages = {name: _Stage(name, trace.limits_of(name), begin[name]) for name in trace.limits}
        self.replay = Replay()
        self._events: list[tuple[float, int, Any]] = []
        self._order = itertools.count()

    def run(self) -> Replay:
        """Replays the whole trace, until its last request has ended."""
        coming = arrivals(self.trace)
        following = next(coming, None)
        if self.fixed is None:
            self._at(LOOK_SECONDS, self._look)
        self._at(LOOK_SECONDS, self._sample)
        while following is not None or self._events:
            if following is not None and (not self._events or following.time <= self._events[0][0]):
                self._enter(_Request(following), following.time)
                following = next(coming, None)
            else:
                time, _, act = heapq.heappop(self._events)
                act(time)
        for stage in self.stages.values():
            for worker in stage.workers:
                self._pay(stage, worker, self.trace.seconds)
        return self.replay

    def _at(self, time: float, act: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), act))

    def _enter(self, request: _Request, now: float) -> None:
        request.since = now
        stage = self.stages[self.trace.kinds[request.arrival.kind].route[request.step]]
        stage.queue.append(request)
        self._dispatch(stage, now)

    def _dispatch(self, stage: _Stage, now: float) -> None:
        while stage.queue and (worker := stage.free()) is not None:
            request = stage.queue.popleft()
            worker.busy += 1
            stage.running += 1
            stage.queued += 1
            stage.queue_seconds += now - request.since
            run = request.arrival.runs[request.step]
            self._at(now + run, lambda time, w=worker, r=request: self._end(stage, w, r, time))

    def _end(self, stage: _Stage, worker: _Worker, request: _Request, now: float) -> None:
        worker.busy -= 1
        stage.running -= 1
        stage.finished += 1
        stage.run_seconds += request.arrival.runs[request.step]
        if worker.leaving and not worker.busy:
            self._pay(stage, worker, now)
            stage.workers.remove(worker)
        request.step += 1
        kind = self.trace.kinds[request.arrival.kind]
        if request.step < len(kind.route):
            self._enter(request, now)
        else:
            self._count(request.arrival, now - request.arrival.time, kind.limit_seconds)
        self._dispatch(stage, now)

    def _count(self, arrival: Arrival, seconds: float, limit: float) -> None:
        self.replay.finished[arrival.kind] += 1
        self.replay.within[arrival.kind] += seconds <= limit
        self.replay.seconds[arrival.kind].append(seconds)
        self.replay.ends.append((arrival.time, seconds <= limit))

    def _look(self, now: float) -> None:
        for stage in self.stages.values():
            observed = stage.observed()
            stage.state, decision = decide(stage.state, observed, now, stage.limits)
            if decision is None:
                continue
            made = Made(now, stage.name, observed.replicas, decision.replicas, decision.reason, decision.cause)
            self.replay.decisions.append(made)
            for _ in range(decision.replicas - observed.replicas):
                worker = _Worker(now, ready=False)
                stage.workers.append(worker)
                self._at(now + self.trace.replica_start_seconds, lambda time, s=stage, w=worker: self._up(s, w, time))
            for worker in reversed(stage.staying[decision.replicas :]):
                worker.leaving = True
                if not worker.busy:
                    self._pay(stage, worker, now)
                    stage.workers.remove(worker)
        if now + LOOK_SECONDS < self.trace.seconds:
            self._at(now + LOOK_SECONDS, self._look)

    def _up(self, stage: _Stage, worker: _Worker, now: float) -> None:
        worker.ready = True
        self._dispatch(stage, now)

    def _sample(self, now: float) -> None:
        self.replay.samples[now] = {name: (len(one.workers), len(one.queue)) for name, one in self.stages.items()}
        if now + LOOK_SECONDS < self.trace.seconds:
            self._at(now + LOOK_SECONDS, self._sample)

    def _pay(self, stage: _Stage, worker: _Worker, now: float) -> None:
        paid = min(now, self.trace.seconds) - worker.asked
        self.replay.replica_seconds[stage.name] += max(0.0, paid)  # type: ignore[assignment]


def static_peak(trace: Trace) -> dict[str, int]:
    """What one would set by hand for the highest load of the trace, by the policy's own measure of enough."""
    return {name: _enough(trace, name, trace.peak_load(name)) for name in trace.limits}


def _enough(trace: Trace, stage: str, load: float) -> int:
    limits = trace.limits_of(stage)
    count = replicas_for(load, trace.service_times.stages[stage].seconds, limits)
    return min(max(count, limits.min), limits.max)
