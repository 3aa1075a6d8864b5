# SPDX-License-Identifier: Apache-2.0
"""The table of faults, each against content validation with two workers per stage.

Greedy tokens and seeded pictures are the same every time, so each answer is first had in peace and then compared. What
is not here has its own place: decode workers killed in mid-stream, clients that leave and a NATS that is out of reach
(`tests/acceptance`), jobs (`tests/acceptance/test_jobs.py`), corrupt hand-offs (`test_handoffs.py`), stores
(`tests/acceptance/test_store_faults.py`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import httpx
import psutil
import pytest

from tests.hardening.chaos import WORKERS, whole
from tests.hardening.load import (
    CHAT,
    KINDS,
    LEASES_END,
    NATS,
    SLOW_START,
    STAGES,
    TOKENS,
    Answers,
    Kind,
    alike,
    answered,
    client_of,
    image,
    kinds,
    numbers_of,
    streamed_chat,
)
from tests.hardening.load import in_peace as answers_in_peace
from tests.hardening.report import Clock, Report
from tests.picture_server import silent
from tests.questions import picture, user
from tests.serving import Graph, at_rest, eventually, serve
from tests.test_leaving import Client

BEHIND = tuple(stage for stage in STAGES if stage != "Frontend")
AT_ONCE = 4
KILLS = 6
"""Of a stage, at most, until one has met a request: some have one in their hands for milliseconds alone."""
BACK = 200.0
"""Bound of a worker's return: its engine is loaded anew, and the machine may be busy."""
RECOVERED = 5.0
"""Seconds within which chat must be answered again once NATS is back."""
FOUND_WITHIN = 3.0
"""Seconds within which a worker that was stopped is passed by."""
TRIES = 3
"""To measure seconds on a machine that has time for it."""


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    with Report("faults") as one:
        yield one


@pytest.fixture(scope="module")
def graph(report: Report) -> Iterator[Graph]:
    """Pictures may come from servers on this machine. Its workers say whom they lose, which they do in debugging alone;
    the runtime keeps silent, or it would say something to every request."""
    workers = [f"--{stage}.ServiceArgs.workers={WORKERS}" for stage in STAGES]
    private = "--Common.media.allow-private=true"
    with serve(
        "graphs.cova:Frontend",
        "configs/tiny-cova.yaml",
        "-v",
        private,
        *workers,
        DYNAMO_START_SECONDS=SLOW_START,
        DYNAMO_LOG="DEBUG",
        DYN_LOG="error",
    ) as served:
        report.say("the graph is up")
        yield served


@pytest.fixture(scope="module")
def in_peace(graph: Graph) -> Answers:
    return answers_in_peace(graph)


@pytest.fixture(autouse=True)
def mended(graph: Graph, report: Report, request: pytest.FixtureRequest) -> Iterator[None]:
    """After every fault each stage comes back whole, and nothing stays held."""
    report.say(request.node.name)
    yield
    eventually(lambda: whole(graph) == set(STAGES), f"every stage is whole; now {whole(graph)}", BACK, pause=0.5)
    at_rest(graph, LEASES_END)


@contextmanager
def asking(graph: Graph, in_peace: Answers, kinds: list[Kind]) -> Iterator[list[Future[tuple[Kind, int, str]]]]:
    """Clients that never ask twice, at work from here to the end of the block. Yields what they were told so far."""
    told: list[Future[tuple[Kind, int, str]]] = []
    over = threading.Event()
    numbers = numbers_of(in_peace)

    def one(turn: int) -> tuple[Kind, int, str]:
        kind, number = kinds[turn % len(kinds)], numbers[turn % len(numbers)]
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


def ends(graph: Graph, name: str) -> list[str]:
    """How each process of a worker has ended so far: the supervisor says so when it starts another."""
    return [found[1] for line in list(graph.lines) if (found := re.match(rf"{name} died \((.*)\); starting", line))]


def crossing(stage: str, *, streams: bool = True) -> list[Kind]:
    return [kind for kind in KINDS if stage in kind.stages and (streams or kind.retried)]


def more(told: list[Future[tuple[Kind, int, str]]], count: int) -> None:
    """Waits until so many more answers have come."""
    wanted = len(told) + count
    eventually(lambda: len(told) >= wanted, f"{count} more answers", 300)


def at_work(graph: Graph, stage: str) -> tuple[int, int]:
    """Index and process of a worker of a stage that has a request at this moment, which for some lasts milliseconds; a
    frontend leases the pictures that came in one."""
    name = "epd_arena_leases" if stage == "Frontend" else "dynamo_component_inflight_requests"
    workers = graph.workers(stage)

    def found() -> list[int]:  # the first: while another is asked too, it may have answered
        return next(([index] for index in workers if graph.metrics(stage, index).total(name)), [])

    index = int(eventually(found, f"a {stage} is at work", 120, pause=0.002)[0])
    return index, workers[index]


LOST = re.compile(r"DEBUG dynamo_epd\.sdk\.client: (\w+) \d+ lost: .*[Ss]tream ended")
"""What a caller says whose request a worker had taken: its stream broke off. One that was never taken, or a lease that
can no more be given back, is lost in other words."""


def lost(graph: Graph, stage: str) -> int:
    """How many requests went down with the workers of a stage so far, by their callers' own words."""
    return sum(found[1] == stage for line in list(graph.lines) if (found := LOST.search(line)))


@pytest.mark.parametrize("stage", ["Processor", "EncodeWorker", "PrefillWorker", "ImageWorker", "EmbedWorker"])
def test_a_killed_worker_is_not_seen(graph: Graph, in_peace: Answers, report: Report, stage: str) -> None:
    """One after another is killed until a caller has lost a request with it."""
    for turn in range(KILLS):
        eventually(lambda: whole(graph) == set(STAGES), "every stage is whole", BACK, pause=0.5)
        before = lost(graph, stage)
        with asking(graph, in_peace, crossing(stage, streams=stage != "Processor")) as told:
            more(told, 4)
            os.kill(at_work(graph, stage)[1], signal.SIGKILL)
            more(told, 24)
        all_right(told, in_peace)
        met = lost(graph, stage) - before
        report.say(f"kill {turn + 1} of a {stage}: {met} requests were in its hands")
        if met:
            return
    said = [line for line in list(graph.lines) if " lost: " in line]
    pytest.fail(f"none of {KILLS} kills of a {stage} met a request; callers last said {said[-KILLS:]}")


RAN = "epd_stage_run_seconds_count"
REPLIED = 0.1
"""Seconds for a reply to reach its caller: a stage counts what it has done before it says it."""
AWAITED = 0.3
"""Seconds for an engine that was given a KV cache to ask where it lies."""
ENDED = re.compile(r"components\.processor: \S+ attempt \d+: (.*)")
"""What a processor says of an attempt at an answer that came to nothing."""


class Replies:
    """Tells which worker of a stage is the next to reply. Looks for their processes before: that takes a while."""

    def __init__(self, graph: Graph, stage: str):
        self._graph, self._stage = graph, stage
        self._pids = graph.workers(stage)
        self._before = {index: self._done(index) for index in self._pids}

    def next(self) -> int:
        """Its process, once the caller has the reply."""

        def found() -> list[int]:
            return [pid for index, pid in self._pids.items() if self._done(index) > self._before[index]]

        pid = int(eventually(found, f"a {self._stage} has replied", 60, pause=0.01)[0])
        time.sleep(REPLIED)
        return pid

    def _done(self, index: int) -> float:
        return self._graph.metrics(self._stage, index).total(RAN)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def standing_still(graph: Graph, stage: str) -> AbstractContextManager[None]:
    """All workers of a stage: what they are asked waits. For less time than it takes until one is missed."""
    return stopped(*graph.workers(stage).values())


def attempts_ended(graph: Graph) -> list[str]:
    """Why, by the processors' own words."""
    return [found[1] for line in list(graph.lines) if (found := ENDED.search(line))]


def renewed(graph: Graph, stage: str) -> None:
    """Has another process in the place of every worker of a stage."""
    old = graph.workers(stage)
    for pid in old.values():
        os.killpg(pid, signal.SIGKILL)

    def new() -> bool:
        now = graph.workers(stage)
        return now.keys() == old.keys() and not set(now.values()) & set(old.values())

    eventually(new, f"each {stage} is started again", BACK, pause=0.5)
    eventually(lambda: whole(graph) == set(STAGES), f"each {stage} is back", BACK, pause=0.5)


@pytest.mark.parametrize("asked", ["EncodeWorker", "PrefillWorker", "DecodeWorker"])
def test_a_processor_killed_before_the_first_chunk_of_a_stream_is_not_seen(
    graph: Graph, in_peace: Answers, asked: str
) -> None:
    """While it waits for an embedding, for a KV cache, and for the first token: those whom it has asked stand still."""
    number, before = numbers_of(in_peace)[0], lost(graph, "Processor")
    asked_before = CHAT[CHAT.index(asked) - 1]
    replies = Replies(graph, asked_before) if asked_before != "Processor" else None
    with ThreadPoolExecutor(1) as client:
        with standing_still(graph, asked):
            stream = client.submit(streamed_chat, client_of(graph, retries=0), number)
            if replies is not None:
                replies.next()
            os.kill(at_work(graph, "Processor")[1], signal.SIGKILL)
        assert alike(stream.result(), in_peace["streamed chat", number])
    eventually(lambda: lost(graph, "Processor") > before, "its caller says that it was lost")


@pytest.mark.parametrize(("giver", "taker"), [("EncodeWorker", "PrefillWorker"), ("PrefillWorker", "DecodeWorker")])
def test_a_worker_killed_between_its_reply_and_the_read_is_not_seen(
    graph: Graph, in_peace: Answers, report: Report, giver: str, taker: str
) -> None:
    """It has given a handle, or said where a KV cache lies; those who are to READ it stand still until it is gone, and
    its engine with it. Tried again where they stood still for so long that they were given up too."""
    number = numbers_of(in_peace)[0]
    for turn in range(TRIES):
        eventually(lambda: whole(graph) == set(STAGES), "every stage is whole", BACK, pause=0.5)
        before, ended, replies = lost(graph, giver), len(attempts_ended(graph)), Replies(graph, giver)
        with ThreadPoolExecutor(1) as client:
            with standing_still(graph, taker):
                stream = client.submit(streamed_chat, client_of(graph, retries=0), number)
                os.killpg(replies.next(), signal.SIGKILL)
            assert alike(stream.result(), in_peace["streamed chat", number])
        said = attempts_ended(graph)[ended:]
        report.say(f"kill {turn + 1} of a {giver} after its reply; attempts ended: {said}")
        if lost(graph, giver) == before and said and not any(taker in one or "in time" in one for one in said):
            return
    pytest.fail(f"none of {TRIES} kills of a {giver} came between its reply and the READ")


def test_a_prefill_worker_killed_while_its_kv_cache_is_taken_over_is_not_seen(
    graph: Graph, in_peace: Answers, report: Report
) -> None:
    """Engines that meet for the first time ask each other where the KV cache lies. The one that is asked stands still,
    and the decode engine waits for it, when it is killed."""
    number = numbers_of(in_peace)[0]
    for turn in range(TRIES):
        renewed(graph, "PrefillWorker")
        ended, replies = len(attempts_ended(graph)), Replies(graph, "PrefillWorker")
        with ThreadPoolExecutor(1) as client:
            with standing_still(graph, "DecodeWorker"):
                stream = client.submit(streamed_chat, client_of(graph, retries=0), number)
                prefilled = replies.next()
                os.killpg(prefilled, signal.SIGSTOP)
            at_work(graph, "DecodeWorker")
            time.sleep(AWAITED)
            os.killpg(prefilled, signal.SIGKILL)
            assert alike(stream.result(), in_peace["streamed chat", number])
        said = attempts_ended(graph)[ended:]
        report.say(f"kill {turn + 1} of a PrefillWorker in a hand-off; attempts ended: {said}")
        if any("lost the KV cache" in one for one in said):
            return
    pytest.fail(f"none of {TRIES} kills of a PrefillWorker met a decode engine that waited for it")


def who_fetches(graph: Graph, port: int) -> int:
    """The encode worker at this end of a connection to a server of pictures."""
    (pid,) = (one.pid for one in psutil.net_connections("tcp") if one.laddr[1:] == (port,) and one.pid)
    assert pid in graph.workers("EncodeWorker").values()
    return pid


def test_a_worker_killed_while_it_fetches_is_not_seen(graph: Graph, in_peace: Answers) -> None:
    """The one moment before a hand-off that lasts as long as the test likes. The other worker gets the picture."""
    number = numbers_of(in_peace)[0]
    file = picture(number, (64, 64))
    head = f"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {len(file)}\r\nconnection: close\r\n\r\n"
    with silent() as (listener, url):
        # What was asked in peace, but for where the picture comes from.
        question = user(f"Describe the picture. ({number})", url)
        body = {"model": "tiny-llava", "messages": [question], "max_tokens": TOKENS, "temperature": 0}
        with ThreadPoolExecutor(1) as client:
            path = f"{graph.url}/v1/chat/completions"
            asked = client.submit(httpx.post, path, json=body | {"ignore_eos": True}, timeout=120)
            fetch, (_, port) = listener.accept()
            with fetch:
                os.kill(who_fetches(graph, port), signal.SIGKILL)
            again, _ = listener.accept()
            with again:
                assert again.recv(65536).startswith(b"GET /never.png")
                again.sendall(head.encode() + file)
            reply = asked.result()
    assert reply.status_code == 200, reply.text
    assert alike(reply.json()["choices"][0]["message"]["content"], in_peace["chat", number])


def test_a_request_that_ends_two_workers_is_given_no_third(graph: Graph) -> None:
    """Whichever worker fetches this picture is killed."""
    with silent() as (listener, url):
        body = {"model": "tiny-llava", "messages": [user("Describe the picture.", url)]}
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(httpx.post, f"{graph.url}/v1/chat/completions", json=body, timeout=120)
            for _ in range(2):
                fetch, (_, port) = listener.accept()
                with fetch:
                    os.kill(who_fetches(graph, port), signal.SIGKILL)
            reply = asked.result()
        assert reply.status_code == 503, reply.text
        assert reply.json()["error"]["code"] == "stage_unavailable"
        assert "EncodeWorker" in reply.json()["error"]["message"]
        assert "given up" in reply.json()["error"]["message"]  # and not because nobody is left to ask
        listener.settimeout(1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_stream_whose_processor_is_killed_ends_in_an_error_event(graph: Graph) -> None:
    body = {"model": "tiny-llava", "messages": [user("Describe the picture.")], "max_tokens": 1500, "ignore_eos": True}
    client = Client(graph, body | {"stream": True})
    client.read_until(5)
    os.kill(at_work(graph, "Processor")[1], signal.SIGKILL)
    *said, last = client.read_to_the_end()
    assert "error" in json.loads(last)
    assert all("error" not in json.loads(one) for one in said), "one event says it"
    client.leave()


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_that_ends_by_sigterm_loses_nothing(graph: Graph, in_peace: Answers, stage: str) -> None:
    """It finishes what it has while others are asked, ends with exit status 0, and its place is taken again."""
    with asking(graph, in_peace, crossing(stage)) as told:
        more(told, 2)
        before = {index: ends(graph, f"{stage}-{index}") for index in range(WORKERS)}
        index, pid = at_work(graph, stage)
        os.kill(pid, signal.SIGTERM)
        name = f"{stage}-{index}"
        eventually(lambda: len(ends(graph, name)) > len(before[index]), f"{name} has drained", 60)
        more(told, 4)
    assert ends(graph, name)[len(before[index]) :] == ["exit status 0"]
    all_right(told, in_peace)


@pytest.mark.parametrize("stage", BEHIND)
def test_a_worker_that_is_stopped_is_passed_by(graph: Graph, in_peace: Answers, stage: str) -> None:
    """Every answer comes while it stands still."""
    with asking(graph, in_peace, crossing(stage, streams=stage != "Processor")) as told:
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


MET = 1.0
"""Seconds above the usual that tell a request which met the stopped worker: its caller waits for a word of it."""
SHORT = kinds(4, 1)
DIRECT = {"EmbedWorker": SHORT[4], "ImageWorker": SHORT[2]}
"""What is asked of a stage by one caller alone: a validation may find out twice, by its two callers of the T5."""


@pytest.mark.parametrize("stage", BEHIND)
def test_a_stopped_worker_is_found_within_3_seconds(graph: Graph, report: Report, stage: str) -> None:
    """By whoever asks it next: nothing runs on it when it is stopped. One client, question after question."""
    kind = DIRECT.get(stage, SHORT[0])
    numbers = iter(range(70_000, 80_000))  # so many pictures that affinity leads some of them to it

    def asked() -> float:
        began = time.monotonic()
        kind.ask(client_of(graph, retries=0), next(numbers))
        return time.monotonic() - began

    def found() -> float:
        """Seconds above the usual that the slowest answer took, of those that met it."""
        usual = statistics.median(asked() for _ in range(12))
        pid = graph.pid(stage, 1)
        os.kill(pid, signal.SIGSTOP)
        try:
            took: list[float] = []
            while sum(one - usual > MET for one in took) == 0:
                assert len(took) < 200, f"nobody asks {stage}-1"
                took.append(asked())
            took += [asked() for _ in range(12)]  # another caller may find out for itself
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return max(took) - usual

    in_time(found, report, f"{stage}-1 was stopped and passed by")


def in_time(measure: Callable[[], float], report: Report, what: str, bound: float = FOUND_WITHIN) -> None:
    """Fails unless ``measure`` gives no more than the bound, on a machine that let this process run meanwhile."""
    for turn in range(TRIES):
        with Clock() as clock:
            took = measure()
        report.say(f"{what} after {took:.2f} s; this process itself ran {clock.late():.2f} s late")
        if took <= bound:
            return
        if clock.late() < 0.25 or turn == TRIES - 1:
            raise AssertionError(f"{what} after {took:.2f} s, not {bound:g}")
        time.sleep(20)  # until the stopped worker is trusted again, and in discovery


SILENT = re.compile(r"WARNING dynamo_epd\.sdk\.client: a (\w+) was silent for")
LONG = {"model": "tiny-llava", "messages": [user("Describe the picture.")], "max_tokens": 1500, "ignore_eos": True}
DRAWING_STEPS = 100
DRAWING: dict[str, Any] = {"prompt": "a large red star", "num_inference_steps": DRAWING_STEPS}


@pytest.mark.parametrize(
    ("stage", "path", "body"),
    [
        ("Processor", "/v1/chat/completions", LONG),
        ("DecodeWorker", "/v1/chat/completions", LONG),
        ("ImageWorker", "/v1/images/generations", DRAWING),
    ],
)
def test_a_worker_that_is_stopped_at_work_is_found_within_3_seconds(
    graph: Graph, report: Report, stage: str, path: str, body: dict[str, Any]
) -> None:
    """Whoever waits for it says so. The request is then begun again elsewhere, and answered."""

    def found() -> float:
        def said() -> int:
            return sum(one[1] == stage for line in list(graph.lines) if (one := SILENT.search(line)))

        with ThreadPoolExecutor(1) as client:
            asked = client.submit(httpx.post, f"{graph.url}{path}", json=body, timeout=200)
            _, pid = at_work(graph, stage)
            before, began = said(), time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            try:
                eventually(lambda: said() > before, f"a {stage} is missed", 20, pause=0.02)
                took = time.monotonic() - began
                assert asked.result().status_code == 200, asked.result().text
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return took

    in_time(found, report, f"a {stage} was stopped at work and missed")


def test_a_stopped_frontend_is_ended_within_3_seconds(graph: Graph, report: Report) -> None:
    """The kernel goes on giving it connections, so it is ended, and its clients learn it at once."""

    def found() -> float:
        def still() -> int:
            return sum(line.startswith("Frontend-1 has stood still") for line in list(graph.lines))

        before, began = still(), time.monotonic()
        os.kill(graph.pid("Frontend", 1), signal.SIGSTOP)
        eventually(lambda: still() > before, "Frontend-1 is missed", 60, pause=0.02)
        took = time.monotonic() - began
        eventually(lambda: whole(graph) == set(STAGES), "Frontend-1 is back", BACK, pause=0.5)
        return took

    in_time(found, report, "Frontend-1 was stopped and ended")


@pytest.mark.parametrize("stage", ["PrefillWorker", "DecodeWorker"])
def test_an_engine_that_is_stopped_is_ended_within_3_seconds(
    graph: Graph, in_peace: Answers, report: Report, stage: str
) -> None:
    """Only its EngineCore stands still: the worker before it goes on and says so."""

    def said() -> int:
        return sum(line.endswith("is stopped and is ended") for line in list(graph.lines))

    def found() -> float:
        worker = graph.pid(stage, 1)
        (core,) = (one for one in psutil.Process(worker).children() if "EngineCore" in one.name())
        with asking(graph, in_peace, crossing(stage)) as told:
            more(told, 2)
            before, began = said(), time.monotonic()
            core.suspend()
            eventually(lambda: said() > before, f"the engine of {stage}-1 is missed", 60, pause=0.02)
            took = time.monotonic() - began
            more(told, 24)
        all_right(told, in_peace)
        eventually(lambda: graph.workers(stage).get(1) not in (None, worker), f"{stage}-1 is started again", BACK)
        eventually(lambda: whole(graph) == set(STAGES), f"{stage}-1 is back", BACK, pause=0.5)
        return took

    in_time(found, report, f"the engine of {stage}-1 was stopped and ended")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_picture_is_made_though_its_worker_is_killed(graph: Graph, share: float) -> None:
    """At the beginning of its steps, in their midst, and at the last one; the same picture comes."""
    body = {**DRAWING, "seed": 11}
    steps = "epd_denoise_step_seconds_count"

    def ask() -> httpx.Response:
        return httpx.post(f"{graph.url}/v1/validations", json=body, timeout=200)

    def drawn() -> dict[int, float]:
        """Steps of each worker since the test began."""
        return {index: graph.metrics("ImageWorker", index).total(steps) - had for index, had in before.items()}

    right = ask().json()["data"][0]["b64_json"]
    before = dict.fromkeys(graph.workers("ImageWorker"), 0.0)
    before = drawn()
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(ask)
        if share:
            far = eventually(
                lambda: [index for index, done in drawn().items() if done >= share * DRAWING_STEPS],
                f"{share:.0%} of the steps are done",
                120,
                pause=0.002,
            )
            index, pid = far[0], graph.workers("ImageWorker")[far[0]]
        else:
            index, pid = at_work(graph, "ImageWorker")
        os.kill(pid, signal.SIGKILL)
        reply = asked.result()
    assert reply.status_code == 200, reply.text
    assert alike(reply.json()["data"][0]["b64_json"], right)
    if share < 0.9:  # else it may just have been done
        del before[index]
        assert all(done >= DRAWING_STEPS for done in drawn().values()), "the other one has drawn it anew"


def test_chat_comes_back_when_nats_does(graph: Graph, report: Report) -> None:
    pid = graph.nats()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: graph.nats() not in (None, pid), "NATS is started again", 60)
    begun = time.monotonic()
    eventually(lambda: answered(graph), "chat is answered", RECOVERED, pause=0.1)
    report.say(f"chat was answered {time.monotonic() - begun:.1f} s after {NATS} was started again")


def test_chat_comes_back_when_nats_stood_still(graph: Graph) -> None:
    """Its connections stay open, and nothing comes. Packets that are lost: `tests/acceptance/test_nats_away.py`."""
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
    client, numbers = client_of(graph, retries=0), numbers_of(in_peace)
    asked = [numbers[index % len(numbers)] for index in range(200)]
    with ThreadPoolExecutor(200) as clients:
        made = list(clients.map(lambda number: image(client, number), asked))
    assert all(alike(one, in_peace["image", number]) for number, one in zip(asked, made, strict=True))
