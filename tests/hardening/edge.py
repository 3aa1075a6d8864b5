# SPDX-License-Identifier: Apache-2.0
"""A graph's front door as a hostile client sees it: raw requests, what a refusal must look like, and what must not
happen meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image, PngImagePlugin

from models import world
from tests.picture_server import Canary
from tests.questions import data_url, picture, post, user
from tests.serving import Graph, eventually
from tests.toys.running import ROOT

MARK = "zq7mark"
"""Stands in values that a test sends. No refusal may repeat it."""

LONGEST_REFUSAL = 2048
LATE_DIAL_SECONDS = 1.0
"""In which a dial shows that comes after its reply, at the end of all cases."""
BOUND = 120.0
"""Seconds for any reply: these tests ask what is answered, on machines of any speed."""

_SECRETS = re.compile(
    rf"{MARK}|Traceback|File \"|site-packages|\.py\b|0x[0-9a-f]{{6,}}|\b\d+\.\d+\.\d+\.\d+\b|localhost|::1|"
    rf"(?:^|[\s'\"(=:])/[\w.-]+/|{re.escape(str(ROOT))}"
)
"""An address, a path, a traceback, an object's address, or what the client has sent."""


@dataclass(frozen=True)
class Entry:
    """A route that takes a body, and a body that it answers with 200 or 202."""

    name: str
    path: str
    body: dict[str, Any] = field(hash=False)

    def with_(self, **fields: Any) -> dict[str, Any]:
        return {**self.body, **fields}


STAR = "a large red star on a blue background"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
CHAT = Entry("chat", "/v1/chat/completions", {"model": "tiny-llava", **HELLO})
COMPLETIONS = Entry(
    "completions", "/v1/completions", {"model": "tiny-llava", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
)
EMBEDDINGS = Entry("embeddings", "/v1/embeddings", {"model": "tiny-t5", "input": "a red star"})
SHORT = {"prompt": STAR, "num_inference_steps": 1, "seed": 1}
IMAGES = Entry("images", "/v1/images/generations", {"model": "tiny-image", **SHORT})
JOBS = Entry("jobs", "/v1/images/jobs", {"model": "tiny-image", **SHORT})
VALIDATIONS = Entry("validations", "/v1/validations", {"model": "tiny-image", **SHORT})
PREDICT = Entry("predict", "/v1/models/tiny-image:predict", {"instances": [SHORT]})
PREDICT_TEXT = Entry("predict-text", "/v1/models/tiny-t5:predict", {"instances": ["a red star"]})

EVERY = (CHAT, COMPLETIONS, EMBEDDINGS, IMAGES, JOBS, VALIDATIONS, PREDICT, PREDICT_TEXT)
"""All that take a body of JSON."""
PICTURES = (IMAGES, JOBS, VALIDATIONS)
"""Whose body describes a picture at its top."""
TEXT = (CHAT, COMPLETIONS)

HOSTS = {
    "loopback": "127.0.0.1",
    "loopback, another": "127.255.255.254",
    "loopback name": "localhost",
    "loopback name in capitals": "LOCALHOST",
    "loopback name with root dot": "localhost.",
    "name below localhost": "a.localhost",
    "loopback IPv6": "[::1]",
    "loopback IPv6 in full": "[0000:0000:0000:0000:0000:0000:0000:0001]",
    "IPv4 in IPv6": "[::ffff:127.0.0.1]",
    "IPv4 in IPv6, hex": "[::ffff:7f00:1]",
    "IPv4-compatible IPv6": "[::127.0.0.1]",
    "NAT64": "[64:ff9b::7f00:1]",
    "NAT64, local": "[64:ff9b:1::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "Teredo": "[2001:0:7f00:1::]",
    "decimal": "2130706433",
    "hex": "0x7f000001",
    "hex by parts": "0x7f.0x0.0x0.0x1",
    "octal": "0177.0.0.1",
    "octal as one": "017700000001",
    "short": "127.1",
    "shortest": "0",
    "full-width digits": "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "circled digits": "\u2460\u2461\u2466.0.0.1",
    "full-width dots": "127\u30020\uff0e0\uff611",
    "percent-encoded": "%31%32%37.0.0.1",
    "nothing": "0.0.0.0",
    "nothing IPv6": "[::]",
    "private 10": "10.0.0.1",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "shared": "100.64.0.1",
    "unique local": "[fd00::1]",
    "link-local": "169.254.1.1",
    "link-local IPv6": "[fe80::1]",
    "link-local with zone": "[fe80::1%25lo]",
    "metadata": "169.254.169.254",
    "metadata in decimal": "2852039166",
    "metadata in IPv6": "[fd00:ec2::254]",
    "metadata name": "metadata.google.internal",
    "metadata short name": "metadata",
    "metadata, Alibaba": "100.100.100.200",
    "metadata, Azure": "168.63.129.16",
    "a cluster's service": "kubernetes.default.svc",
    "a cluster's service in full": "nats.default.svc.cluster.local",
    "multicast": "224.0.0.1",
    "broadcast": "255.255.255.255",
    "name without dot": "frontend",
}
"""Of the inside, in every spelling."""

GETS = (
    "/v1/models",
    "/v1/images",
    "/v1/images/img-0",
    "/v1/images/jobs/job-0",
    "/results/job-0",
    "/health",
    "/live",
)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


def send(
    graph: Graph,
    method: str,
    path: str,
    body: Any = None,
    headers: Iterable[tuple[str, str]] = (("content-type", "application/json"),),
) -> Reply:
    """One request, its path as it is given, on a connection of its own. ``body``: bytes, or what becomes JSON.

    A server may answer and hang up while the body is still on its way: then what it has said counts.
    """
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", graph.port, timeout=BOUND)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if raw is not None:
            connection.putheader("content-length", str(len(raw)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if raw is not None:
                connection.send(raw)
        reply = connection.getresponse()
        named = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, named, reply.read(), time.monotonic() - began)
    finally:
        connection.close()


def job_ended(graph: Graph, id: str) -> dict[str, Any]:
    """A job's state once it is done or has failed."""

    def state() -> dict[str, Any] | None:
        found: dict[str, Any] = json.loads(send(graph, "GET", f"/v1/images/jobs/{id}", headers=()).body)
        return found if found.get("status") in ("completed", "failed") else None

    found: dict[str, Any] = eventually(state, f"{id} ends", BOUND)
    return found


def send_raw(graph: Graph, *pieces: bytes, pause: float = 0.0) -> Reply:
    """The first reply to these bytes, which need be no HTTP."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", graph.port), timeout=BOUND) as connection:
        for piece in pieces:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(piece)
            if pause:
                time.sleep(pause)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        body = reply.read() if reply.chunked else reply.read(int(reply.headers["content-length"]))
        named = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, named, body, time.monotonic() - began)


def refused(reply: Reply, status: int | tuple[int, ...], code: str | None = None, param: str | None = None) -> None:
    """Fails unless this is a refusal as it should be: OpenAI's body, short, and silent about the inside."""
    said = reply.body[:LONGEST_REFUSAL].decode("utf-8", "replace")
    assert reply.status in ((status,) if isinstance(status, int) else status), f"{reply.status}: {said}"
    assert len(reply.body) <= LONGEST_REFUSAL
    assert reply.headers["content-type"] == "application/json"
    whole = json.loads(reply.body)
    assert set(whole) == {"error"} and set(whole["error"]) == {"message", "type", "param", "code"}, said
    error = whole["error"]
    assert error["type"] == "invalid_request_error", said
    assert isinstance(error["message"], str) and error["message"], said
    assert isinstance(error["code"], str) and error["code"], said
    assert error["param"] is None or isinstance(error["param"], str), said
    assert not _SECRETS.search(error["message"]), said
    assert MARK not in said, said
    if code is not None:
        assert error["code"] == code, said
    if param is not None:
        assert error["param"] == param, said


def refused_as_unavailable(reply: Reply) -> None:
    """Fails unless this is the 503 of a graph that cannot answer now, as short and silent as any refusal."""
    said = reply.body[:LONGEST_REFUSAL].decode("utf-8", "replace")
    assert reply.status == 503, f"{reply.status}: {said}"
    assert len(reply.body) <= LONGEST_REFUSAL
    assert reply.error["type"] == "service_unavailable" and reply.error["code"], said
    assert int(reply.headers["retry-after"]) >= 1, said
    assert not _SECRETS.search(reply.error["message"]), said


def answered_or_refused(reply: Reply) -> None:
    """200 or 202, or a refusal with 400: a row that leaves it open."""
    if reply.status not in (200, 202):
        refused(reply, 400)


def chat_with(*urls: str, text: str = "Describe the picture.") -> dict[str, Any]:
    return CHAT.with_(messages=[user(text, *urls)])


class Door:
    """A graph under attack: its processes as they were, ports that nobody may dial, and a neighbour."""

    def __init__(self, graph: Graph, neighbour: Neighbour):
        self.graph = graph
        self.neighbour = neighbour
        self.canary = Canary()
        self.canaries = [self.canary, *_well_known()]
        self._dialled = 0
        self._last = "its start"
        self._processes = graph.tree()
        assert len(self._processes) > 6, graph.text

    def post(self, entry: Entry, body: Any) -> Reply:
        return send(self.graph, "POST", entry.path, body)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Around one case. A dial between it and the one before it is that one's, which is named."""
        self._not_dialled(f"after {self._last}")
        yield
        try:
            self.unharmed()
        finally:
            self._last = name

    def unharmed(self) -> None:
        """Fails if a process is gone, or anything has dialled a canary."""
        lost = [one for one in self._processes if not one.is_running() or one.status() == psutil.STATUS_ZOMBIE]
        assert not lost, f"{lost}\n{self.graph.text[-3000:]}"
        self._not_dialled(f"now, or late after {self._last}")

    def _not_dialled(self, when: str) -> None:
        """Since it was last looked."""
        before, self._dialled = self._dialled, sum(one.dialled() for one in self.canaries)
        assert self._dialled == before, f"a canary was dialled {when}"

    def close(self) -> None:
        """Fails where a canary is dialled after the last case: nobody looks after that."""
        try:
            time.sleep(LATE_DIAL_SECONDS)
            self._not_dialled(f"after {self._last}")
        finally:
            for one in self.canaries:
                one.__exit__(None, None, None)


class Peaks:
    """How far each process' resident memory has risen since this was made, at its highest (Linux counts it)."""

    def __init__(self, door: Door):
        self._pids = [one.pid for one in door.graph.tree() if one.is_running()]
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = {pid: psutil.Process(pid).memory_info().rss for pid in self._pids}

    def grown(self) -> dict[int, int]:
        found = {}
        for pid in self._pids:
            line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
            found[pid] = int(line.split()[1]) * 1024 - self._before[pid]
        return found


class Work:
    """CPU time that a graph, and this process as its client, have taken since this was made."""

    def __init__(self, door: Door):
        self._processes = [psutil.Process(), *(one for one in door.graph.tree() if one.is_running())]
        self._before = self._taken()

    def seconds(self) -> list[float]:
        """By process, this one first."""
        return [now - before for now, before in zip(self._taken(), self._before, strict=True)]

    def _taken(self) -> list[float]:
        times = [one.cpu_times() for one in self._processes]
        return [one.user + one.system for one in times]


def waited_for(work: list[float], cores: int) -> float:
    """Seconds in which these cores have done work of so many seconds of each process, if none stood still while there
    was any: Graham's bound of a list schedule, Bell System Technical Journal 45 (1966). A process is one chain."""
    return sum(work) / cores + max(work) * (1 - 1 / cores)


def _well_known() -> list[Canary]:
    """Where a URL without a port leads to. Most users may not listen there: then the refusal's code has to do."""
    found = []
    for port in (80, 443):
        with contextlib.suppress(OSError):
            found.append(Canary(port))
    return found


class Neighbour:
    """A well-behaved client: questions whose right answers it knows. Each picture comes in a file of its own, so that
    no cache has the answer."""

    def __init__(self, graph: Graph, known: list[tuple[Image.Image | bytes, str]], model: str):
        self._graph = graph
        self._known = known
        self._model = model
        self._asked = random.Random(7).randrange(1 << 30)

    @classmethod
    def of_trained(cls, graph: Graph) -> Neighbour:
        """Held-out pictures that the trained model describes rightly (it does nine of ten)."""
        scenes = world.scenes(random.Random(20261121), held_out=True, pairs=0.0)
        asked = [next(scenes) for _ in range(6)]
        drawn = [world.draw(scene, random.Random(index), side=120).image for index, scene in enumerate(asked)]
        neighbour = cls(
            graph, [(image, scene.caption) for image, scene in zip(drawn, asked, strict=True)], "tiny-llava"
        )
        neighbour._known = [one for one in neighbour._known if neighbour._answer(one[0]) == one[1]]
        assert len(neighbour._known) >= 3
        return neighbour

    @classmethod
    def of_untrained(cls, graph: Graph) -> Neighbour:
        """Random weights say what they said before anybody did harm."""
        neighbour = cls(graph, [], "tiny-llava")
        images = [Image.open(io.BytesIO(picture(90_000 + index))) for index in range(3)]
        neighbour._known = [(image, neighbour._answer(image)) for image in images]
        return neighbour

    def asks(self) -> None:
        """Fails unless the next question gets its right answer."""
        self._asked += 1
        image, answer = self._known[self._asked % len(self._known)]
        assert self._answer(image) == answer

    def _answer(self, image: Image.Image | bytes) -> str:
        assert isinstance(image, Image.Image)
        self._asked += 1
        about = PngImagePlugin.PngInfo()
        about.add_text("number", str(self._asked))
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=about)
        body = {
            "model": self._model,
            "messages": [user("Describe the picture.", data_url(file.getvalue()))],
            "max_tokens": 24,
            "temperature": 0,
        }
        said: str = post(f"{self._graph.url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        return said
