# SPDX-License-Identifier: Apache-2.0
"""Arrival traces from recorded parameters: the same file and seed give the same requests, one by one.

Arrivals are a Poisson process whose rate follows the day, made by thinning (P. A. W. Lewis and G. S. Shedler, 1979):
``rate(t) = mean × (1 - amplitude × cos(2 pi t / period))``, times a factor while a burst lasts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dynamo_epd.planning.policy import Limits


class ServiceTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request in one stage: a gamma distribution. ``spread``: its standard deviation over its mean."""

    seconds: float
    spread: float


class ServiceTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``how``: where the seconds come from, in words; ``measured`` is False for placeholders."""

    measured: bool
    how: str
    stages: dict[str, ServiceTime]


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``workers``: how many of that stage the kind alone keeps busy on average, without bursts."""

    stage: str
    workers: float


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that go through the same stages, one after the other. ``limit_seconds``: from arrival to the end."""

    route: tuple[str, ...]
    load: Load
    limit_seconds: float


class Burst(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    from_seconds: float
    seconds: float
    factor: float
    kinds: tuple[str, ...]

    def factor_at(self, kind: str, time: float) -> float:
        within = self.from_seconds <= time < self.from_seconds + self.seconds
        return self.factor if within and kind in self.kinds else 1.0


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trace's parameters, as its file has them. Raises ValueError for names that do not fit together."""

    seed: int
    seconds: float
    period_seconds: float
    amplitude: float
    replica_start_seconds: float
    burst: Burst
    service_times: ServiceTimes
    kinds: dict[str, Kind]
    limits: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        stages = self.service_times.stages
        for name, kind in self.kinds.items():
            if kind.load.stage not in kind.route or not set(kind.route) <= stages.keys():
                raise ValueError(f"kind {name}: its stages are not all known")
        if self.limits.keys() != stages.keys() or not set(self.burst.kinds) <= self.kinds.keys():
            raise ValueError("limits must name every stage, and the burst known kinds")

    def limits_of(self, stage: str) -> Limits:
        return Limits(**self.limits[stage])

    def mean_rate(self, name: str) -> float:
        """Requests per second of a kind, without bursts. It follows from the service times: in workers, the trace stays
        the same when they are measured anew."""
        kind = self.kinds[name]
        concurrency = self.limits_of(kind.load.stage).concurrency
        visits = kind.route.count(kind.load.stage)
        return kind.load.workers * concurrency / self.service_times.stages[kind.load.stage].seconds / visits

    def rate(self, name: str, time: float) -> float:
        """Requests per second of a kind at a time."""
        day = 1 - self.amplitude * math.cos(2 * math.pi * time / self.period_seconds)
        return self.mean_rate(name) * day * self.burst.factor_at(name, time)

    def load(self, stage: str, time: float) -> float:
        """Requests that run at once in a stage, on average, if none waits: Little's law."""
        seconds = self.service_times.stages[stage].seconds
        return sum(self.rate(name, time) * kind.route.count(stage) * seconds for name, kind in self.kinds.items())

    def peak_load(self, stage: str) -> float:
        """The highest load of any second."""
        return max(self.load(stage, float(second)) for second in range(math.ceil(self.seconds)))


@dataclasses.dataclass(frozen=True)
class Arrival:
    """``runs``: seconds of service in each stage of the route, in its order."""

    time: float
    kind: str
    runs: tuple[float, ...]


def read_trace(path: Path) -> Trace:
    """Raises msgspec.ValidationError for a file of another shape."""
    return msgspec.convert(json.loads(path.read_text()), Trace)


def arrivals(trace: Trace) -> Iterator[Arrival]:
    """Every request of the trace in the order of arrival."""
    drawn = random.Random(trace.seed)
    names = list(trace.kinds)
    means = {name: trace.mean_rate(name) for name in names}
    highest = sum(
        means[name] * (1 + trace.amplitude) * (trace.burst.factor if name in trace.burst.kinds else 1.0)
        for name in names
    )
    shapes = {name: (one.seconds, one.spread) for name, one in trace.service_times.stages.items()}
    time = 0.0
    while (time := time + drawn.expovariate(highest)) < trace.seconds:
        day = 1 - trace.amplitude * math.cos(2 * math.pi * time / trace.period_seconds)
        left = drawn.random() * highest
        for name in names:
            left -= means[name] * day * trace.burst.factor_at(name, time)
            if left < 0:
                runs = tuple(_draw(drawn, *shapes[stage]) for stage in trace.kinds[name].route)
                yield Arrival(time, name, runs)
                break


def _draw(drawn: random.Random, seconds: float, spread: float) -> float:
    return drawn.gammavariate(1 / spread**2, seconds * spread**2) if spread > 0 else seconds
