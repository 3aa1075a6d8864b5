# SPDX-License-Identifier: Apache-2.0
"""A worker that leaves by scaling finishes what takes longer than a drain; a graph that ends waits a drain for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from dynamo_epd.sdk.control import ask
from tests.test_worker import eventually
from tests.toys.calling import at_work, busy_worker, door, workers
from tests.toys.running import Served

GRAPH = "tests/toys/scaled.py:Front"
LONG = 3.0
"""Seconds of work, three drains."""
ENDLESS = 100.0
MANY = 12
"""The kernel chooses who gets a connection: so many, and each of two workers has one."""


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    with Served(home, GRAPH, "--Busy.ServiceArgs.workers=2", DYNAMO_DRAIN_SECONDS="1") as graph:
        yield graph.wait_until_up()


def resize(home: Path, service: str, count: int) -> None:
    asyncio.run(ask(door(home), do="scale", service=service, workers=count))


def with_one_at_the_second_door(
    served: Served, home: Path, pool: ThreadPoolExecutor, seconds: float
) -> list[Future[str]]:
    """Requests, the last of which is the only one of the second worker with HTTP."""
    resize(home, "Front", 2)
    eventually(lambda: [one["ready"] for one in workers(home, "Front")] == [True, True], "two doors")
    second = psutil.Process(served.workers("Front")[1])
    asked: list[Future[str]] = []
    while not has_client(second, served.port):
        assert len(asked) < MANY
        asked.append(pool.submit(served.post, "call", {"seconds": seconds}))
        eventually(lambda: sum(at_work(home).values()) + sum(one.done() for one in asked) == len(asked), "it runs")
    return asked


def has_client(process: psutil.Process, port: int) -> bool:
    here = [one for one in process.net_connections("tcp") if one.laddr.port == port]
    return any(one.status == psutil.CONN_ESTABLISHED for one in here)


def test_a_worker_that_leaves_finishes_what_takes_longer_than_a_drain(served: Served, home: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(served.post, "call", {"seconds": LONG}) for _ in range(2)]
        eventually(lambda: at_work(home) == {0: 1, 1: 1}, "one request on each worker")
        resize(home, "Busy", 1)
        eventually(lambda: [one["leaving"] for one in workers(home, "Busy")] == [False, True], "the second leaves")
        assert {busy_worker(one.result()) for one in asked} == {0, 1}
    served.wait_for("^Busy-1 has left$")
    assert "still running" not in served.text


def test_a_door_that_leaves_answers_what_takes_longer_than_a_drain(served: Served, home: Path) -> None:
    with ThreadPoolExecutor(MANY) as pool:
        asked = with_one_at_the_second_door(served, home, pool, LONG)
        resize(home, "Front", 1)
        assert all('"workers"' in one.result() for one in asked)
    served.wait_for("^Front-1 has left$")
    assert "still running" not in served.text


def test_the_end_of_the_graph_waits_no_longer_for_who_leaves(served: Served, home: Path) -> None:
    with ThreadPoolExecutor(MANY) as pool:
        asked = with_one_at_the_second_door(served, home, pool, ENDLESS)
        resize(home, "Front", 1)
        eventually(lambda: [one["leaving"] for one in workers(home, "Front")] == [False, True], "the second leaves")
        assert served.stop() == 0
        served.wait_for(r"^\[Front-1\] .* 1 responses were still running$")
        assert all(one.exception() or '"workers"' not in one.result() for one in asked), "it was much shorter"
    assert served.leftovers() == []
