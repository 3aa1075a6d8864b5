# SPDX-License-Identifier: Apache-2.0
"""Clients of the toy graph in scaled.py: as many at a time as one says."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

from dynamo_epd.sdk.control import ask
from tests.toys.running import Served


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

    def _call(self, stop: threading.Event) -> None:
        while not stop.wait(self._think):
            try:
                self.answers.append(self._graph.post("call", {"seconds": self._seconds}))
            except OSError as error:
                self.answers.append(f"lost: {error}")

    @property
    def lost(self) -> list[str]:
        """Answers that are none."""
        return [answer for answer in self.answers if '"workers"' not in answer]

    def __enter__(self) -> Callers:
        return self

    def __exit__(self, *_: object) -> None:
        self.number(0)
        for thread in self._threads:
            thread.join(60)


def busy_worker(answer: str) -> int:
    """The worker of the first stage that gave it."""
    return int(json.loads(answer)["workers"][0])


def door(home: Path) -> Path:
    """The control socket of the one graph with that state."""
    (record,) = (home / "dynamo" / "graphs").glob("*.json")
    return Path(json.loads(record.read_text())["socket"])


def ready(home: Path) -> dict[str, int]:
    """Service → workers that serve."""
    services = asyncio.run(ask(door(home), do="status"))["services"]
    return {name: sum(one["ready"] for one in workers) for name, workers in services.items()}
