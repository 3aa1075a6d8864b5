# SPDX-License-Identifier: Apache-2.0
"""Stages scaled apart: work reaches every worker, one that leaves costs nothing, and one that is killed only time."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.questions import Refused, Said, ask, ask_all, assert_same, chat, data_url, difference, picture, user
from tests.serving import Graph, at_rest, eventually, resized, serve, untrained
from tests.test_leaving import Client, long_answer

WORKERS = {"EncodeWorker": 3, "PrefillWorker": 2, "DecodeWorker": 2}
ENDPOINTS = {"EncodeWorker": "encode", "PrefillWorker": "prefill", "DecodeWorker": "generate"}


TOKENS = 1200
"""Of an answer that takes far longer than a drain of one second."""


@pytest.fixture
def narrow() -> Iterator[Graph]:
    """One worker a stage. It is gone before `wide` comes."""
    model = untrained("llava")
    with serve("graphs.disagg:Frontend", "configs/tiny-disagg.yaml", model=model, DYNAMO_DRAIN_SECONDS="1") as graph:
        yield graph


def test_stages_grow_and_shrink_under_load(narrow: Graph) -> None:
    """Decode shrinks in the middle of answers that cannot go on elsewhere, and for which a drain is too short."""
    questions = requests(64, 605_000, max_tokens=48)
    expected = ask_all(narrow.url, questions)
    with Asking(narrow, questions, at_once=6) as asking, ThreadPoolExecutor(4) as readers:
        for stage in ENDPOINTS:
            resized(narrow, stage, 2)
        eventually(lambda: all(min(worked(narrow, one)) >= 3 for one in ENDPOINTS), "work reaches the new ones", 120)
        fields = {"max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
        own = {"seed": 1, "temperature": 1}  # not resumable
        told = [Client(narrow, long_answer(606_000 + number, **fields) | own) for number in range(4)]
        for client in told:
            client.read_until(3)
        whole = [readers.submit(client.read_until, 1, b"[DONE]") for client in told]
        resized(narrow, "DecodeWorker", 1)
        for one in whole:
            one.result()
        assert [client.usage()["completion_tokens"] for client in told] == [TOKENS] * 4
        for stage in ("PrefillWorker", "EncodeWorker"):
            asking.wait_for_more(12)
            resized(narrow, stage, 1)
        asking.wait_for_more(12)
    for client in told:
        client.leave()
    lost = [one for _, one in asking.answers if isinstance(one, Refused)]
    assert not lost, f"{len(lost)} of {len(asking.answers)} were refused: {lost[0]}\n{narrow.text[-3000:]}"
    got = [(expected[place], one) for place, one in asking.answers if isinstance(one, Said)]
    assert_same([want for want, _ in got], [have for _, have in got])
    assert "died" not in narrow.text and "still running" not in narrow.text
    at_rest(narrow, 15)


class Asking:
    """Clients that ask ``questions`` over and over. ``answers``: the place of a question, and what came."""

    def __init__(self, graph: Graph, questions: list[dict[str, Any]], at_once: int):
        self.answers: list[tuple[int, Said | Refused]] = []
        self._graph, self._questions, self._at_once = graph, questions, at_once
        self._places = itertools.cycle(range(len(questions)))
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(at_once)

    def _ask(self) -> None:
        while not self._stop.is_set():
            place = next(self._places)
            try:
                self.answers.append((place, ask(self._graph.url, self._questions[place])))
            except Refused as refused:
                self.answers.append((place, refused))

    def wait_for_more(self, count: int) -> None:
        enough = len(self.answers) + count
        eventually(lambda: len(self.answers) >= enough, f"{count} more answers", 120)

    def __enter__(self) -> Asking:
        self._clients = [self._pool.submit(self._ask) for _ in range(self._at_once)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for one in self._clients:
            one.result()  # a connection that broke off is raised here
        self._pool.shutdown()


@pytest.fixture(scope="module")
def wide() -> Iterator[Graph]:
    workers = [f"--{service}.ServiceArgs.workers={count}" for service, count in WORKERS.items()]
    with serve("graphs.disagg:Frontend", "configs/tiny-disagg.yaml", *workers, model=untrained("llava")) as graph:
        yield graph


def requests(count: int, first: int, **fields: Any) -> list[dict[str, Any]]:
    return [chat(user("What is it?", data_url(picture(first + number))), **fields) for number in range(count)]


def worked(graph: Graph, service: str) -> list[float]:
    """How many requests each worker of a stage has been asked for."""
    endpoint = f'dynamo_endpoint="{ENDPOINTS[service]}"'
    return [
        graph.metrics(service, index).total("dynamo_component_requests_total", endpoint)
        for index in sorted(graph.workers(service))
    ]


@pytest.fixture(scope="module")
def expected(wide: Graph) -> list[Said]:
    """64 answers, asked one by one while nothing is disturbed."""
    return ask_all(wide.url, requests(64, 600_000, max_tokens=48))


def test_work_reaches_every_worker(wide: Graph) -> None:
    before = {service: worked(wide, service) for service in WORKERS}
    questions = requests(60, 610_000)
    together = ask_all(wide.url, questions, at_once=12)
    for service, count in WORKERS.items():
        done = [now - then for now, then in zip(worked(wide, service), before[service], strict=True)]
        assert len(done) == count
        assert min(done) >= 5, f"{service}: {done}"
        assert sum(done) == len(questions)
    assert_same(ask_all(wide.url, questions), together)


def test_equal_pictures_meet_in_one_encode_worker(wide: Graph) -> None:
    before = worked(wide, "EncodeWorker")
    ask_all(wide.url, requests(1, 620_000) * 9, at_once=3)
    assert sorted(now - then for now, then in zip(worked(wide, "EncodeWorker"), before, strict=True)) == [0, 0, 9]


@pytest.mark.parametrize("service", ["EncodeWorker", "PrefillWorker"])
def test_a_killed_worker_costs_only_time(wide: Graph, expected: list[Said], service: str) -> None:
    """Killed three times under load, at different moments, and with new pictures: nothing comes from caches."""
    for round_number in range(3):
        questions = requests(48, 630_000 + 1000 * round_number + 500 * (service == "PrefillWorker"))
        got = _under_fire(wide, service, questions, after=4 + 9 * round_number)
        lost = [one for one in got if isinstance(one, Refused)]
        assert not lost, f"{len(lost)} of {len(got)} were refused: {lost[0]}\n{wide.text[-3000:]}"
        assert_same(ask_all(wide.url, questions), [one for one in got if isinstance(one, Said)])
    assert_same(expected, ask_all(wide.url, requests(64, 600_000, max_tokens=48), at_once=16))
    at_rest(wide, 15)


def test_a_killed_decode_worker_gives_no_wrong_answer(wide: Graph, expected: list[Said]) -> None:
    """Its answers go on elsewhere with the same tokens, or end in an error; the others are not disturbed."""
    got = _under_fire(wide, "DecodeWorker", requests(64, 600_000, max_tokens=48), after=8)
    answered = [(want, have) for want, have in zip(expected, got, strict=True) if isinstance(have, Said)]
    assert [have.status for have in got if isinstance(have, Refused)] == [503] * (len(got) - len(answered))
    assert not [text for want, have in answered if (text := difference(want, have))]
    assert len(answered) >= 32
    assert_same(expected, ask_all(wide.url, requests(64, 600_000, max_tokens=48), at_once=16))


def _under_fire(graph: Graph, service: str, questions: list[dict[str, Any]], after: int) -> list[Said | Refused]:
    """Asks 16 at once, kills one worker of ``service`` when ``after`` answers are there, and waits until it is back."""
    answers: dict[int, Said | Refused] = {}
    places = iter(range(len(questions)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            try:
                answers[place] = ask(graph.url, questions[place])
            except Refused as refused:
                answers[place] = refused

    victim = graph.pid(service, 1)
    clients = [threading.Thread(target=client) for _ in range(16)]
    for one in clients:
        one.start()
    eventually(lambda: len(answers) >= after, f"{after} answers", 120, pause=0.001)
    os.kill(victim, signal.SIGKILL)
    for one in clients:
        one.join()
    eventually(lambda: graph.workers(service).get(1) not in (None, victim), f"{service}-1 started again", 60)
    eventually(lambda: _stages(graph)[service] == WORKERS[service], f"{service}-1 is back", 200, pause=0.5)
    return [answers[place] for place in range(len(questions))]


def _stages(graph: Graph) -> dict[str, int]:
    with urllib.request.urlopen(f"{graph.url}/health") as reply:
        found: dict[str, int] = json.loads(reply.read())["stages"]
        return found
