# SPDX-License-Identifier: Apache-2.0
"""1,000 clients that leave at random moments: what they held is given back, and nobody else notices.

They begin a chat about a picture, a picture, a validation or an embedding, and break the connection off: while they
still send, before the reply, or within it. Held at the end is compared with held after a warm-up by clients of the
same kinds, and the second half of the clients with the first: what grows in both would go on growing.
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

from tests.hardening.load import KINDS, Answers, alike, client_of, in_peace, messages, prompt
from tests.serving import HELD, Graph

LEAVERS = int(os.environ.get("LEAVERS", "1000"))
SEED = 7
AT_ONCE = 8
BOUND = 120.0
GIVEN_BACK = 5.0
"""Far above the second that it takes, for the machine may be busy, and below every lease (10 s and 30 s)."""
LEASES_END = 60.0
SETTLE_SECONDS = 20.0
"""Bound for descriptors and mappings: the last connections are still being closed."""
ONCE = 9
"""Descriptors or mappings that a process may have more after all clients: the first call of an endpoint that is seldom
called, as for what is given back, opens a watch of discovery with three."""
FEW = 3
"""Of these after the second half of them: what grows with the clients grows by more."""
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


def request_of(kind: str, number: int) -> bytes:
    path, body, more = ASKED[kind]
    raw = json.dumps(body(number) | more).encode()
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
    while (now := held(graph)) and time.monotonic() - since < LEASES_END:
        if time.monotonic() - since > GIVEN_BACK:
            left = left or now
        time.sleep(0.05)
    return left


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
        own = [one.processes[pid] for one in readings]
        descriptors = " → ".join(str(one.descriptors) for one in own)
        mappings = " → ".join(str(one.mappings) for one in own)
        print(f"{process.name} ({pid}): {descriptors} descriptors, {mappings} shared mappings")
    print("files in shared memory: " + " → ".join(str(len(one.files)) for one in readings))


def test_whoever_leaves_gives_back_what_was_held(seeing: Graph) -> None:
    expected = in_peace(seeing)
    for service, names in HELD.items():
        assert set(names) <= seeing.metrics(service).names, "what is not told of cannot be seen to be held"
    assert all(KV_CACHE in seeing.metrics(service).names for service in ("PrefillWorker", "DecodeWorker"))
    leavers = Leavers(seeing)
    with neighbour(seeing, expected):
        leavers.measure()
        leavers.come_and_leave(max(40, LEAVERS // 5))
    print("usual seconds: " + ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in leavers.usual.items()))
    left = [still_held(seeing)]
    before = settled(seeing)
    leavers.seen.clear()
    with neighbour(seeing, expected):
        leavers.come_and_leave(LEAVERS // 2)
    left.append(still_held(seeing))
    half = kept(seeing, before)
    with neighbour(seeing, expected):
        leavers.come_and_leave(LEAVERS - LEAVERS // 2)
    left.append(still_held(seeing))
    after = kept(seeing, half)

    print(f"{LEAVERS} left: {dict(leavers.seen)}")
    assert before.processes.keys() == half.processes.keys() == after.processes.keys(), "a process is lost, or new"
    show(before, half, after)
    print(f"still held {GIVEN_BACK:g} s after the warm-up, the first half and the second: {left}")
    assert not leavers.refused, leavers.refused[:5]
    assert set(leavers.seen) == {"while sending", "before the reply", "within the reply", "after the reply"}
    more, lately = grown(before, after), grown(half, after)
    assert max(more.values(), default=0) <= ONCE, more
    assert max(lately.values(), default=0) <= FEW, lately
    assert not any(left), left
