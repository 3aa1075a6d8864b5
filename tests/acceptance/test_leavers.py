# SPDX-License-Identifier: Apache-2.0
"""1,000 clients that leave at random moments: what they held is given back, and nobody else notices.

They begin a chat about a picture, a picture, a validation or an embedding, and break the connection off: while they
still send, before the reply, or within it. One at a time, at each phase of each kind, has given back all that was held
within a second, descriptors among it. Of a thousand, what is held at the end is what was held after a warm-up by
clients of the same kinds: not one descriptor or mapping more in any process, and every place free.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.hardening.load import KINDS, Answers, alike, client_of, in_peace, messages, prompt
from tests.hardening.report import Clock, Report
from tests.serving import HELD, Graph, at_rest, eventually

LEAVERS = int(os.environ.get("LEAVERS", "1000"))
SEED = 7
AT_ONCE = 8
BOUND = 120.0
GIVEN_BACK = 1.0
"""Seconds, beside those in which this process itself did not run."""
LEASES_END = 60.0
SETTLE_SECONDS = 20.0
"""Bound for descriptors and mappings: the last connections are still being closed."""
PHASES = (None, 0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Of the time that an answer takes: when a client leaves that comes alone; None: while it still sends."""
GIVES_BACK = (
    ("EncodeWorker", "release"),
    ("PrefillWorker", "withdraw"),
    ("DecodeWorker", "reject"),
    ("ImageWorker", "release"),
)
"""Endpoints that only those who leave need. The first call of one opens a watch of discovery with three descriptors,
which stays: that is the warm-up's."""
PLACES = 256
"""That a frontend has for requests and an image worker for pictures, by default."""
KV_CACHE = "vllm:kv_cache_usage_perc"
SHARED = re.compile(r" (?:/dev/shm/|/memfd:|/SYSV)")


def chat_body(number: int) -> dict[str, Any]:
    shared = {"model": "tiny-llava", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    return {"messages": messages(number), **shared}


def picture_body(number: int) -> dict[str, Any]:
    return {"prompt": prompt(number), "seed": number, "num_inference_steps": 8}


def text_body(number: int) -> dict[str, Any]:
    return {"model": "tiny-t5", "input": [prompt(number), prompt(number + 1)]}


ASKED: dict[str, tuple[str, Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", chat_body, {}),
    "streamed chat": ("/v1/chat/completions", chat_body, {"stream": True}),
    "picture": ("/v1/images/generations", picture_body, {}),
    "streamed picture": ("/v1/images/generations", picture_body, {"stream": True, "partial_images": 2}),
    "validation": ("/v1/validations", picture_body, {}),
    "streamed validation": ("/v1/validations", picture_body, {"stream": True}),
    "embedding": ("/v1/embeddings", text_body, {}),
}
"""Path, body of the number-th question, and what is added to it."""


@dataclass(frozen=True)
class Visit:
    """One client: what it sends, and when it leaves."""

    request: bytes
    sent: int
    """Bytes of it that are sent."""
    seconds: float
    """After which it leaves, if it has not got its reply by then."""
    abrupt: bool
    """Whether it leaves by a reset."""


def request_of(kind: str, number: int, **fields: Any) -> bytes:
    path, body, more = ASKED[kind]
    raw = json.dumps(body(number) | more | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def paid(graph: Graph, visit: Visit) -> bytes:
    """What came of the reply until the client left."""
    received = b""
    end = time.monotonic() + visit.seconds
    with socket.create_connection(("127.0.0.1", graph.port), timeout=BOUND) as connection:
        connection.sendall(visit.request[: visit.sent])
        while not whole(received) and (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                more = connection.recv(65536)
            except TimeoutError:
                break
            if not more:
                break
            received += more
        if visit.abrupt:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return received


def whole(received: bytes) -> bool:
    """Whether this is all of a reply."""
    head, found, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(found) and (len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n"))


class Leavers:
    """Clients by a seed, each with a question of its own so that no cache answers it."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._chance = random.Random(SEED)
        self._numbers = iter(range(10_000, 10_000_000))
        self.usual: dict[str, float] = {}
        """Seconds that each kind takes among as many others as there will be."""
        self.seen: Counter[str] = Counter()
        self.refused: list[bytes] = []

    def measure(self) -> None:
        """Clients that stay, to know when the others are to leave."""
        kinds = [kind for kind in ASKED for _ in range(5)]
        self._chance.shuffle(kinds)

        def stay(kind: str, number: int) -> float:
            since = time.monotonic()
            request = request_of(kind, number)
            received = paid(self._graph, Visit(request, len(request), BOUND, abrupt=False))
            assert received.startswith(b"HTTP/1.1 200 ") and whole(received), f"{kind}: {received[:500]!r}"
            return time.monotonic() - since

        with ThreadPoolExecutor(AT_ONCE) as pool:
            took = list(pool.map(stay, kinds, self._numbers))
        for kind in ASKED:
            self.usual[kind] = statistics.median(
                seconds for one, seconds in zip(kinds, took, strict=True) if one == kind
            )

    def come_and_leave(self, count: int) -> None:
        """So many, `AT_ONCE` at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            visits = [self._visit() for _ in range(count)]
            for visit, received in zip(visits, pool.map(partial(paid, self._graph), visits), strict=True):
                if received and not received.startswith(b"HTTP/1.1 200 "):
                    self.refused.append(received[:500])
                if visit.sent < len(visit.request):
                    self.seen["while sending"] += 1
                elif not received:
                    self.seen["before the reply"] += 1
                else:
                    self.seen["after the reply" if whole(received) else "within the reply"] += 1

    def alone(self, kind: str) -> float:
        """Seconds that this kind takes while nobody else asks."""
        request = request_of(kind, next(self._numbers))
        since = time.monotonic()
        received = paid(self._graph, Visit(request, len(request), BOUND, abrupt=False))
        assert received.startswith(b"HTTP/1.1 200 ") and whole(received), f"{kind}: {received[:500]!r}"
        return time.monotonic() - since

    def leave_alone(self, kind: str, seconds: float, *, sent: float, abrupt: bool) -> None:
        """``sent``: the share of the request that is sent."""
        request = request_of(kind, next(self._numbers))
        paid(self._graph, Visit(request, int(sent * len(request)), seconds, abrupt))

    def _visit(self) -> Visit:
        chance = self._chance
        kind = chance.choice(list(ASKED))
        request = request_of(kind, next(self._numbers))
        sent = chance.randrange(len(request)) if chance.random() < 0.15 else len(request)
        return Visit(request, sent, chance.uniform(0, 1.2) * self.usual[kind], chance.random() < 0.3)


class Neighbour(threading.Thread):
    """Asks one question after the other, and knows the answers."""

    def __init__(self, graph: Graph, expected: Answers):
        super().__init__(name="neighbour")
        self.stop = threading.Event()
        self.asked = 0
        self.wrong: list[str] = []
        self._graph = graph
        self._expected = expected

    def run(self) -> None:
        with client_of(self._graph, retries=0) as client:
            while not self.stop.is_set():
                for name, number in self._expected:
                    if self.stop.is_set():
                        break
                    self.asked += 1
                    self._ask(client, name, number)

    def _ask(self, client: openai.OpenAI, name: str, number: int) -> None:
        (kind,) = (one for one in KINDS if one.name == name)
        try:
            answer = kind.ask(client, number)
        except Exception as error:  # whatever a client may see is what is looked for here
            self.wrong.append(f"{name} {number}: {type(error).__name__}: {error}"[:300])
            return
        if not alike(self._expected[name, number], answer):
            self.wrong.append(f"{name} {number}: {answer[:100]}, not {self._expected[name, number][:100]}")


@contextmanager
def neighbour(graph: Graph, expected: Answers) -> Iterator[None]:
    """Somebody who asks all the while, and is always answered rightly."""
    one = Neighbour(graph, expected)
    one.start()
    try:
        yield
    finally:
        one.stop.set()
        one.join(BOUND)
    print(f"the neighbour asked {one.asked} times")
    assert not one.wrong, f"{len(one.wrong)} of {one.asked}:\n" + "\n".join(one.wrong[:10])
    assert one.asked


def held(graph: Graph) -> dict[str, float]:
    """What is held for requests, KV blocks among it."""
    found = graph.busy()
    for service in ("PrefillWorker", "DecodeWorker"):
        if share := graph.metrics(service).total(KV_CACHE):
            found[f"{service}-0 {KV_CACHE}"] = share
    return found


def still_held(graph: Graph) -> dict[str, float]:
    """What is not given back within `GIVEN_BACK`, after which it is waited for until leases end by themselves."""
    left: dict[str, float] = {}
    since = time.monotonic()
    with Clock() as clock:
        while True:
            began = time.monotonic()
            now = held(graph)
            if not now or began - since > LEASES_END:
                return left
            if began - since > GIVEN_BACK + clock.late():
                left = left or now
            time.sleep(0.02)


def descriptors(graph: Graph) -> dict[str, int]:
    """Of every process."""
    found = {}
    for process in graph.tree():
        with suppress(psutil.Error, OSError):  # it has just ended
            found[f"descriptors of {name_of(process)} ({process.pid})"] = process.num_fds()
    return found


def given_back(graph: Graph, before: dict[str, int]) -> float:
    """Seconds until nothing is held for requests, and no process has more descriptors than ``before``."""
    since = time.monotonic()
    while True:
        began = time.monotonic()
        more = {what: count - before.get(what, 0) for what, count in descriptors(graph).items()}
        left = held(graph) | {what: float(count) for what, count in more.items() if count > 0}
        if not left:
            return began - since
        assert time.monotonic() - since < LEASES_END, left
        time.sleep(0.02)


@dataclass(frozen=True)
class Process:
    """What the machine keeps for one process."""

    name: str
    descriptors: int
    mappings: int
    """Of shared memory."""


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    if "--service-name" in words:
        return f"{words[words.index('--service-name') + 1]}-{words[words.index('--worker-index') + 1]}"
    parent = process.parent()
    return (
        f"{process.name()} of {name_of(parent)}" if parent and "--service-name" in parent.cmdline() else process.name()
    )


def processes(graph: Graph) -> dict[int, Process]:
    found = {}
    for process in graph.tree():
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        shared = sum(bool(SHARED.search(line)) for line in lines)
        found[process.pid] = Process(name_of(process), process.num_fds(), shared)
    return found


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@dataclass(frozen=True)
class Kept:
    """Of the whole graph at one moment of rest."""

    processes: dict[int, Process]
    files: set[str]
    """In shared memory, whosever."""


def grown(before: Kept, after: Kept) -> dict[str, int]:
    """What is there more of, by name."""
    found: dict[str, int] = {}
    for pid in before.processes.keys() & after.processes.keys():
        was, now = before.processes[pid], after.processes[pid]
        found[f"descriptors of {was.name} ({pid})"] = now.descriptors - was.descriptors
        found[f"shared mappings of {was.name} ({pid})"] = now.mappings - was.mappings
    found["files in shared memory"] = len(after.files - before.files)
    return {what: more for what, more in found.items() if more > 0}


def kept(graph: Graph, before: Kept | None = None, most: int = 0) -> Kept:
    """What is kept at rest: as soon as no more than ``most`` has grown since ``before``, or the time is up."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        with suppress(psutil.NoSuchProcess, OSError):
            now = Kept(processes(graph), shared_files())
            if before is None or time.monotonic() > end or max(grown(before, now).values(), default=0) <= most:
                return now
        assert time.monotonic() < end + SETTLE_SECONDS, "processes come and go"
        time.sleep(0.25)


def settled(graph: Graph) -> Kept:
    """The first one: when it does not change any more."""
    last = kept(graph)
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        time.sleep(2)
        now = kept(graph)
        if now == last:
            break
        last = now
    return last


def show(*readings: Kept) -> None:
    for pid, process in readings[0].processes.items():
        own = [one.processes[pid] for one in readings if pid in one.processes]
        descriptors = " → ".join(str(one.descriptors) for one in own)
        mappings = " → ".join(str(one.mappings) for one in own)
        print(f"{process.name} ({pid}): {descriptors} descriptors, {mappings} shared mappings")
    print("files in shared memory: " + " → ".join(str(len(one.files)) for one in readings))


def places(graph: Graph) -> None:
    """Fails unless as many pictures as there are places are all taken on. Their clients leave before they are made."""
    connections: list[socket.socket] = []

    def replies() -> list[bytes]:
        found = []
        for one in connections:
            with suppress(BlockingIOError):
                found.append(one.recv(500, socket.MSG_PEEK))
        return found

    def taken() -> bool:
        waiting = graph.metrics("ImageWorker").total("epd_stage_queue_depth")
        return waiting + len(replies()) >= PLACES

    try:
        for number in range(PLACES):
            connections.append(socket.create_connection(("127.0.0.1", graph.port), timeout=BOUND))
            connections[-1].sendall(request_of("picture", number, num_inference_steps=100))
            connections[-1].setblocking(False)
        eventually(taken, f"{PLACES} pictures wait, are made or refused", 60)
        refused = [one for one in replies() if not one.startswith(b"HTTP/1.1 200 ")]
        assert not refused, f"{len(refused)} of {PLACES} places are not free: {refused[0]!r}"
    finally:
        for one in connections:
            one.close()


@pytest.fixture(scope="module")
def expected(seeing: Graph) -> Answers:
    return in_peace(seeing)


@pytest.fixture(scope="module")
def leavers(seeing: Graph, expected: Answers) -> Leavers:
    """After a warm-up in which so many came and left that everything has been called once that leavers need."""
    for service, names in HELD.items():
        assert set(names) <= seeing.metrics(service).names, "what is not told of cannot be seen to be held"
    assert all(KV_CACHE in seeing.metrics(service).names for service in ("PrefillWorker", "DecodeWorker"))
    found = Leavers(seeing)
    with neighbour(seeing, expected):
        found.measure()
        found.come_and_leave(max(40, LEAVERS // 5))

    def called(service: str, endpoint: str) -> bool:
        name = "dynamo_component_requests_total"
        return seeing.metrics(service).total(name, f'dynamo_endpoint="{endpoint}"') > 0

    for _ in range(20):
        if all(called(*one) for one in GIVES_BACK):
            break
        found.come_and_leave(40)
    else:
        raise AssertionError(f"never called by 800 leavers: {[one for one in GIVES_BACK if not called(*one)]}")
    print("usual seconds: " + ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in found.usual.items()))
    at_rest(seeing, LEASES_END)
    settled(seeing)
    return found


@pytest.mark.parametrize("kind", ASKED)
def test_whoever_leaves_alone_gives_back_all_within_a_second(seeing: Graph, leavers: Leavers, kind: str) -> None:
    usual = statistics.median(leavers.alone(kind) for _ in range(3))
    given_back(seeing, descriptors(seeing))
    before: dict[str, int] = {}
    for _ in range(10):  # the fewest of each: metrics are being read, and looked into directories
        for what, count in descriptors(seeing).items():
            before[what] = min(count, before.get(what, count))
        time.sleep(0.1)
    late = []
    with Report(f"leaver-{kind.replace(' ', '-')}", usual=round(usual, 3)) as report:
        for index, phase in enumerate(PHASES):
            sent, seconds = (0.5, 0.05) if phase is None else (1.0, phase * usual)
            leavers.leave_alone(kind, seconds, sent=sent, abrupt=index % 2 == 1)
            with Clock() as clock:
                took = given_back(seeing, before)
                bound = GIVEN_BACK + clock.late()
            left = "while it sent" if phase is None else f"after {phase:.0%}"
            report.goal(f"left {left}: all given back within {bound:.2f} s", took <= bound, f"{took:.2f} s")
            if took > bound:
                late.append((phase, took, bound))
    assert not late, report.missed


def test_whoever_leaves_gives_back_what_was_held(seeing: Graph, leavers: Leavers, expected: Answers) -> None:
    with Report("leavers", leavers=LEAVERS, seed=SEED) as report:
        left = [still_held(seeing)]
        before = settled(seeing)
        leavers.seen.clear()
        with neighbour(seeing, expected):
            leavers.come_and_leave(LEAVERS // 2)
        report.say(f"half of them have left: {dict(leavers.seen)}")
        left.append(still_held(seeing))
        half = kept(seeing, before)
        with neighbour(seeing, expected):
            leavers.come_and_leave(LEAVERS - LEAVERS // 2)
        report.say(f"all have left: {dict(leavers.seen)}")
        left.append(still_held(seeing))
        after = kept(seeing, before)

        report.note(seen=dict(leavers.seen), held=left, grown=[grown(before, half), grown(before, after)])
        same = before.processes.keys() == half.processes.keys() == after.processes.keys()
        report.goal("no process is lost, or new", same)
        report.goal("nobody is refused", not leavers.refused, leavers.refused[:5] or None)
        phases = {"while sending", "before the reply", "within the reply", "after the reply"}
        report.goal("they left in every phase", set(leavers.seen) == phases, dict(leavers.seen))
        more = grown(before, after)
        report.goal("not one descriptor, mapping or file more than after the warm-up", not more, more or None)
        report.goal(f"nothing is held for requests {GIVEN_BACK:g} s after", not any(left), left if any(left) else None)
        show(before, half, after)
        assert not report.missed, report.missed
        places(seeing)
        report.goal("every place is free", True, PLACES)
        at_rest(seeing, 30)
