# SPDX-License-Identifier: Apache-2.0
"""Content validation with its planner at work, and its clients: some that want pictures, and one that chats."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.questions import Refused, ask, chat, data_url, picture, post, user
from tests.serving import Graph, eventually, serve
from tests.toys.calling import Callers

STAGES = ("ImageWorker", "EmbedWorker", "EncodeWorker", "PrefillWorker", "DecodeWorker")
MOVED = "ImageWorker"
SETTINGS = (
    "--ImageWorker.max-batch=1",
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    f"--Planner.stages.{MOVED}={{max: 2, concurrency: 1, cool-down: 15, window: 15, queue-target: 2}}",
    *(f"--Planner.stages.{stage}={{max: 2, cool-down: 15, queue-target: 5}}" for stage in STAGES if stage != MOVED),
)
CHAT_SECONDS = 3.0
BOUND = 300.0
"""For one reply: a worker that starts takes a core away from those that work."""
BODY = {"model": "tiny-image", "prompt": "a large red star on a blue background", "size": "64x64", "quality": "low"}


@contextlib.contextmanager
def planned() -> Iterator[Graph]:
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", *SETTINGS) as graph:
        yield graph


def one_picture(graph: Graph) -> None:
    """Raises Refused, and OSError."""
    post(f"{graph.url}/v1/images/generations", BODY, timeout=BOUND)


def alone(graph: Graph, count: int = 8) -> float:
    """Mean seconds that the stage runs for a picture while nobody else wants one. As many before them warm up. With
    pauses: one right after the other would be a worker's whole work, and the planner looks already. The very first may
    have had it ask for a worker all the same."""

    def ran() -> tuple[float, float]:
        said = graph.metrics(MOVED)
        return said.total("epd_stage_run_seconds_sum"), said.total("epd_stage_run_seconds_count")

    one_picture(graph)
    time.sleep(2)
    eventually(lambda: len(graph.workers(MOVED)) == 1, "one worker, at rest", BOUND, 1.0)
    sums = []
    for _ in range(2):
        for _ in range(count):
            began = time.monotonic()
            one_picture(graph)
            time.sleep(2 * (time.monotonic() - began))
        sums.append(ran())
    (seconds, runs), (later, more) = sums
    return (later - seconds) / (more - runs)


class Painters(Callers):
    """Each wants a picture, thinks for twice the time that one takes, and wants another: one of them is a third of a
    worker's work, four are more than all of it. ``answers``: "200", or what came instead."""

    def __init__(self, graph: Graph):
        super().__init__(graph, seconds=0.0, think=2 * alone(graph))
        self._served = graph

    def _ask(self) -> str:
        try:
            one_picture(self._served)
        except Refused as refused:
            return str(refused)
        return "200"

    @property
    def lost(self) -> list[str]:
        return [answer for answer in self.answers if answer != "200"]


class Chatting:
    """One who asks the same every few seconds while it is entered. ``texts``: what was answered."""

    def __init__(self, graph: Graph):
        self.texts: list[str] = []
        self._url = graph.url
        self._question: dict[str, Any] = chat(user("Describe the picture.", data_url(picture(1))), max_tokens=16)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def _chat(self) -> None:
        while True:
            self.texts.append(ask(self._url, self._question).text)
            if self._stop.wait(CHAT_SECONDS):
                return

    def __enter__(self) -> Chatting:
        self._chatting = self._pool.submit(self._chat)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._chatting.result()  # a chat that was refused is raised here
        self._pool.shutdown()
