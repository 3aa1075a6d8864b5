# SPDX-License-Identifier: Apache-2.0
"""Clients of a graph, of the toy graph in scaled.py: as many at a time as one says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from dynamo_epd.sdk.control import ask
from dynamo_epd.sdk.watching import samples_of
from tests.toys.running import Served

LOOK_SECONDS = 1.0


class Callers:
    """Threads that each ask, think, and ask again. ``answers``: what came back, as text, in order."""

    def __init__(self, graph: Served, *, seconds: float, think: float = 0.0):
        self.answers: list[str] = []
        self._graph, self._seconds, self._think = graph, seconds, think
        self._stops: list[threading.Event] = []
        self._threads: list[threading.Thread] = []

    def number(self, count: int) -> None:
        """From now on there are ``count`` of them; those too many end after their request."""
        while len(self._stops) > count:
            self._stops.pop().set()
        while len(self._stops) < count:
            stop = threading.Event()
            self._stops.append(stop)
            self._threads.append(threading.Thread(target=self._call, args=(stop,)))
            self._threads[-1].start()

    @property
    def count(self) -> int:
        return len(self._stops)

    def _ask(self) -> str:
        return self._graph.post("call", {"seconds": self._seconds})

    def _call(self, stop: threading.Event) -> None:
        while not stop.wait(self._think):
            try:
                self.answers.append(self._ask())
            except OSError as error:
                self.answers.append(f"lost: {error}")

    @property
    def lost(self) -> list[str]:
        """Answers that are none."""
        return [answer for answer in self.answers if '"workers"' not in answer]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.number(0)
        for thread in self._threads:
            thread.join(60)


class Sampling:
    """Looks once a second while it is entered. ``samples``: when, how many clients, workers that serve by stage."""

    def __init__(self, home: Path, callers: Callers, stages: Sequence[str]):
        self.samples: list[dict[str, float]] = []
        self._home, self._callers, self._stages = home, callers, stages
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def _sample(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(LOOK_SECONDS):
            workers = ready(self._home)
            now = {"seconds": round(time.monotonic() - began, 1), "clients": self._callers.count}
            self.samples.append(now | {stage: workers[stage] for stage in self._stages})

    def __enter__(self) -> Sampling:
        self._sampling = self._pool.submit(self._sample)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sampling.result()  # what kept it from looking is raised here
        self._pool.shutdown()


def busy_worker(answer: str) -> int:
    """The worker of the first stage that gave it."""
    return int(json.loads(answer)["workers"][0])


def door(home: Path) -> Path:
    """The control socket of the one graph with that state."""
    (record,) = (home / "dynamo" / "graphs").glob("*.json")
    return Path(json.loads(record.read_text())["socket"])


def status(home: Path) -> dict[str, list[dict[str, Any]]]:
    """Service → what the graph says of its workers."""
    found: dict[str, list[dict[str, Any]]] = asyncio.run(ask(door(home), do="status"))["services"]
    return found


def workers(home: Path, service: str) -> list[dict[str, Any]]:
    return status(home)[service]


def ready(home: Path) -> dict[str, int]:
    """Service → workers that serve."""
    return {name: sum(one["ready"] for one in found) for name, found in status(home).items()}


def at_work(home: Path) -> dict[int, float]:
    """Requests that wait or run, by worker of the first stage."""
    found = {}
    for one in workers(home, "Busy"):
        with urllib.request.urlopen(one["metrics"], timeout=10) as reply:
            found[one["index"]] = (samples_of(reply.read()) or {}).get(("epd_stage_queue_depth", ""), 0.0)
    return found
