# SPDX-License-Identifier: Apache-2.0
"""The table of faults, each against content validation with two workers per stage.

Greedy tokens and seeded pictures are the same every time, so each answer is first had in peace and then compared. What
is not here has its own place: decode workers killed in mid-stream and clients that leave (`tests/acceptance`), jobs
(`tests/acceptance/test_jobs.py`), corrupt hand-offs (`tests/test_transfer.py`), stores (`tests/test_store.py`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import psutil
import pytest

from tests.hardening.chaos import NATS, WORKERS, whole
from tests.hardening.load import KINDS, QUESTIONS, STAGES, Answers, Kind, alike, chat, client_of, image
from tests.hardening.load import in_peace as answers_in_peace
from tests.picture_server import silent
from tests.questions import user
from tests.serving import Graph, at_rest, eventually, serve
from tests.test_leaving import Client

BEHIND = tuple(stage for stage in STAGES if stage != "Frontend")
AT_ONCE = 4
BACK = 200.0
"""Bound of a worker's return: its engine is loaded anew, and the machine may be busy."""
RECOVERED = 5.0
"""Seconds within which chat must be answered again once NATS is back."""


@pytest.fixture(scope="module")
def graph() -> Iterator[Graph]:
    """Pictures may come from servers on this machine."""
    workers = [f"--{stage}.ServiceArgs.workers={WORKERS}" for stage in STAGES]
    private = "--Common.media.allow-private=true"
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", private, *workers) as served:
        yield served


@pytest.fixture(scope="module")
def in_peace(graph: Graph) -> Answers:
    return answers_in_peace(graph)


@pytest.fixture(autouse=True)
def mended(graph: Graph) -> Iterator[None]:
    """After every fault each stage comes back whole, and nothing stays held."""
    yield
    eventually(lambda: whole(graph) == set(STAGES), f"every stage is whole; now {whole(graph)}", BACK, pause=0.5)
    at_rest(graph, 30)


@contextmanager
def asking(graph: Graph, kinds: list[Kind]) -> Iterator[list[Future[tuple[Kind, int, str]]]]:
    """Clients that never ask twice, at work from here to the end of the block. Yields what they were told so far."""
    told: list[Future[tuple[Kind, int, str]]] = []
    over = threading.Event()

    def one(turn: int) -> tuple[Kind, int, str]:
        kind, number = kinds[turn % len(kinds)], turn % QUESTIONS
        return kind, number, kind.ask(client_of(graph, retries=0), number)

    def keep_asking(first: int) -> None:
        turn = first
        while not over.is_set():
            future: Future[tuple[Kind, int, str]] = Future()
            try:
                future.set_result(one(turn))
            except Exception as error:  # the test reads it from the future
                future.set_exception(error)
            told.append(future)
            turn += AT_ONCE

    with ThreadPoolExecutor(AT_ONCE) as clients:
        running = [clients.submit(keep_asking, first) for first in range(AT_ONCE)]
        try:
            yield told
        finally:
            over.set()
        for client in running:
            client.result()


def all_right(told: list[Future[tuple[Kind, int, str]]], in_peace: Answers) -> None:
    for future in told:
        kind, number, answer = future.result()
        assert alike(answer, in_peace[kind.name, number]), f"{kind.name} {number}"


def has_ended(pid: int, name: str) -> None:
    worker = psutil.Process(pid)
    eventually(lambda: not worker.is_running(), f"{name} has drained", 60)


def crossing(stage: str, *, streams: bool = True) -> list[Kind]:
    return [kind for kind in KINDS if stage in kind.stages and (streams or kind.retried)]


def more(told: list[Future[tuple[Kind, int, str]]], count: int) -> None:
    """Waits until so many more answers have come."""
    wanted = len(told) + count
    eventually(lambda: len(told) >= wanted, f"{count} more answers", 300)


def at_work(graph: Graph, stage: str) -> int:
    """The worker of a stage that now has a request."""

    def found() -> list[int]:
        name = "dynamo_component_inflight_requests"
        return [index for index in graph.workers(stage) if graph.metrics(stage, index).total(name)]

    return int(eventually(found, f"a {stage} is at work")[0])


@pytest.mark.parametrize("stage", ["Processor", "EncodeWorker", "PrefillWorker", "ImageWorker", "EmbedWorker"])
def test_a_killed_worker_is_not_seen(graph: Graph, in_peace: Answers, stage: str) -> None:
    with asking(graph, crossing(stage, streams=stage != "Processor")) as told:
        more(told, 4)
        os.kill(graph.pid(stage, at_work(graph, stage)), signal.SIGKILL)
        more(told, 24)
    all_right(told, in_peace)


def test_a_request_that_ends_two_workers_is_given_no_third(graph: Graph) -> None:
    """Whichever worker fetches this picture is killed."""
    with silent() as (listener, url):
        body = {"model": "tiny-llava", "messages": [user("Describe the picture.", url)]}
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(httpx.post, f"{graph.url}/v1/chat/completions", json=body, timeout=120)
            for _ in range(2):
                fetch, (_, port) = listener.accept()
                with fetch:
                    (pid,) = (one.pid for one in psutil.net_connections("tcp") if one.laddr[1:] == (port,) and one.pid)
                    assert pid in graph.workers("EncodeWorker").values()
                    os.kill(pid, signal.SIGKILL)
            reply = asked.result()
        assert reply.status_code == 503, reply.text
        assert reply.json()["error"]["code"] == "stage_unavailable"
        assert "EncodeWorker" in reply.json()["error"]["message"]
        listener.settimeout(1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_stream_whose_processor_is_killed_ends_in_an_error_event(graph: Graph) -> None:
    body = {"model": "tiny-llava", "messages": [user("Describe the picture.")], "max_tokens": 1500, "ignore_eos": True}
    client = Client(graph, body | {"stream": True})
    client.read_until(5)
    os.kill(graph.pid("Processor", at_work(graph, "Processor")), signal.SIGKILL)
    client.read_until(1, b'data: {"error"')
    client.leave()


@pytest.mark.parametrize("stage", BEHIND)
def test_a_worker_that_ends_by_sigterm_loses_nothing(graph: Graph, in_peace: Answers, stage: str) -> None:
    """It finishes what it has while others are asked, and its place is taken again."""
    with asking(graph, crossing(stage)) as told:
        more(told, 2)
        pid = graph.pid(stage, at_work(graph, stage))
        os.kill(pid, signal.SIGTERM)
        has_ended(pid, stage)
        more(told, 4)
    all_right(told, in_peace)


@pytest.mark.parametrize("stage", BEHIND)
def test_a_worker_that_is_stopped_is_passed_by(graph: Graph, in_peace: Answers, stage: str) -> None:
    """Every answer comes while it stands still."""
    with asking(graph, crossing(stage, streams=stage != "Processor")) as told:
        more(told, 2)
        pid = graph.pid(stage, 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            more(told, 24)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        more(told, 4)
    all_right(told, in_peace)


@pytest.mark.parametrize("stage", ["PrefillWorker", "DecodeWorker"])
def test_an_engine_that_is_stopped_is_ended(graph: Graph, in_peace: Answers, stage: str) -> None:
    """Only its EngineCore stands still: the worker before it goes on and says so."""
    worker = graph.pid(stage, 1)
    (core,) = (one for one in psutil.Process(worker).children() if "EngineCore" in one.name())
    with asking(graph, crossing(stage)) as told:
        more(told, 2)
        core.suspend()
        more(told, 24)
    all_right(told, in_peace)
    eventually(lambda: graph.workers(stage).get(1) not in (None, worker), f"{stage}-1 is started again", BACK)


def answered(graph: Graph) -> bool:
    """One try, without patience."""
    with suppress(openai.OpenAIError):
        return bool(chat(client_of(graph, retries=0).with_options(timeout=2), 0))
    return False


def test_chat_comes_back_when_nats_does(graph: Graph) -> None:
    pid = graph.nats()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: graph.nats() not in (None, pid), "NATS is started again", 60)
    begun = time.monotonic()
    eventually(lambda: answered(graph), "chat is answered", RECOVERED, pause=0.1)
    print(f"chat was answered {time.monotonic() - begun:.1f} s after {NATS} was started again")


def test_chat_comes_back_when_nats_was_out_of_reach(graph: Graph) -> None:
    """A server that stands still is one behind a route that swallows every packet: its connections stay open."""
    pid = graph.nats()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: not answered(graph), "NATS is missed")
        time.sleep(10)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: answered(graph), "chat is answered", RECOVERED, pause=0.1)


def test_200_pictures_at_once_are_200_pictures(graph: Graph, in_peace: Answers) -> None:
    client = client_of(graph, retries=0)
    with ThreadPoolExecutor(200) as clients:
        made = list(clients.map(lambda number: image(client, number % QUESTIONS), range(200)))
    assert all(alike(one, in_peace["image", number % QUESTIONS]) for number, one in enumerate(made))
