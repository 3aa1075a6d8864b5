# SPDX-License-Identifier: Apache-2.0
"""The last row of HARDENING.md: what comes over NATS, to NIXL's side channel, to ZeroMQ and to every other open port.

Whoever is in the graph's NATS is trusted (SECURITY.md). What is held here is that nothing there is unpickled, that
garbage is dropped and counted, and that no process ends of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import nats
import psutil
import pytest
import zmq

from components.protocol import (
    DecodeRequest,
    EncodeRequest,
    Handle,
    Picture,
    PrefillRequest,
    PromptImage,
    RejectRequest,
    ReleaseRequest,
    StatesRequest,
)
from dynamo_epd.exchange import CardQuery
from dynamo_epd.sdk.nats import connect_options
from dynamo_epd.transfer.peers import Card
from tests.hardening import messages, stranger
from tests.hardening.edge import EMBEDDINGS, IMAGES, JOBS, STAR, VALIDATIONS, Door, job_ended
from tests.serving import Graph, Metrics, at_rest, eventually

pytestmark = pytest.mark.usefixtures("unharmed")

COUNTED = "dynamo_component_requests_total"
"""The runtime's, which counts so what it cannot take apart, but right requests too."""
HANDLED = ("epd_stage_run_seconds_count", "epd_time_to_first_token_seconds_count")
"""What only a request raises that a stage was given."""
DROPPED = "epd_messages_dropped_total"
"""Ours, by place: what came through and is no message of that place."""
TOO_LARGE = "maximum payload exceeded"
"""How NATS counts what is too large for it: a line for each."""
LARGE = 64 << 20


class Executed:
    """Unpickled it would make a file. Nobody may."""

    path = Path("/tmp") / f"unpickled-{os.getpid()}"

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


PICKLE = pickle.dumps(Executed())


@pytest.fixture(scope="module", autouse=True)
def nothing_is_unpickled() -> Iterator[None]:
    yield
    assert not Executed.path.exists()


def framed(head: bytes, body: bytes) -> bytes:
    """As the runtime frames a request: two lengths and no checksum."""
    return struct.pack(">QQQ", len(head), len(body), 0) + head + body


RAW: dict[str, bytes] = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 16,
    "pickle": PICKLE,
    "JSON": b'{"request_id": "x"}',
    "empty frame": framed(b"", b""),
    "a frame without a request": framed(b"{}", b"x"),
    "a frame of garbage": framed(b"\xff" * 64, b"\xff" * 64),
    "a frame of pickle": framed(PICKLE, PICKLE),
    "lengths above every number": struct.pack(">QQQ", 2**63, 2**64 - 1, 0) + b"x",
    "lengths that are not there": struct.pack(">QQQ", 100, 100, 0) + b"x",
    "half a length": b"\0\0\0",
    "7 MB of zeros": bytes(7 << 20),
    "7 MB of lists": framed(b"[" * (7 << 20), b""),
}

STAGES = {
    "Processor": "dynamo_processor.chat",
    "EncodeWorker": "dynamo_encodeworker.encode",
    "PrefillWorker": "dynamo_prefillworker.prefill",
    "DecodeWorker": "dynamo_decodeworker.generate",
    "EmbedWorker": "dynamo_embedworker.embed",
    "ImageWorker": "dynamo_imageworker.generate",
}


@pytest.fixture(scope="module")
def subjects(door: Door) -> dict[str, str]:
    """Where the workers really listen, overheard while a neighbour asks. Whatever was asked before has been done."""
    at_rest(door.graph, 60)

    async def overhear() -> set[str]:
        heard = set()

        async def hear(message: Any) -> None:
            heard.add(message.subject)

        async with await connected(door.graph) as connection:
            await connection.subscribe(">", cb=hear)
            await asyncio.to_thread(door.neighbour.asks)
            await asyncio.to_thread(door.post, VALIDATIONS, VALIDATIONS.body)
            await asyncio.to_thread(door.post, EMBEDDINGS, EMBEDDINGS.body)
            await asyncio.to_thread(door.post, IMAGES, IMAGES.body)
            await connection.flush()
        return heard

    heard = asyncio.run(overhear())
    found = {stage: next((one for one in heard if one.startswith(begin)), "") for stage, begin in STAGES.items()}
    assert all(found.values()), heard
    return found


async def connected(graph: Graph) -> Any:
    """A client with the password of the graph's own workers."""
    environment = stranger.credentials(graph)
    return await nats.connect(environment["NATS_SERVER"], **connect_options(environment))


@pytest.mark.usefixtures("neighbour")
class TestNats:
    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("data", RAW.values(), ids=RAW)
    def test_what_is_no_request_is_dropped_and_counted(
        self, door: Door, subjects: dict[str, str], stage: str, data: bytes
    ) -> None:
        before = door.graph.metrics(stage)

        async def sent() -> bytes:
            async with await connected(door.graph) as connection:
                reply = await connection.request(subjects[stage], data, timeout=20)
                return bytes(reply.data)

        assert asyncio.run(sent()) == b""  # taken off the queue, and that is all
        counted = before.total(COUNTED)
        eventually(lambda: door.graph.metrics(stage).total(COUNTED) > counted, f"{COUNTED} counts it")
        after = door.graph.metrics(stage)
        assert [after.total(name) for name in HANDLED] == [before.total(name) for name in HANDLED]

    @pytest.mark.parametrize("stage", STAGES)
    def test_64_mb_do_not_pass(self, door: Door, subjects: dict[str, str], stage: str) -> None:
        before = door.graph.text.count(TOO_LARGE)
        environment = stranger.credentials(door.graph)
        server = urlsplit(environment["NATS_SERVER"])
        secret = {"user": environment["NATS_AUTH_USERNAME"], "pass": environment["NATS_AUTH_PASSWORD"]}
        with socket.create_connection((server.hostname, server.port), timeout=30) as connection:
            connection.sendall(f"CONNECT {json.dumps({**secret, 'verbose': False})}\r\n".encode())
            with suppress(ConnectionError):
                connection.sendall(f"PUB {subjects[stage]} {LARGE}\r\n".encode() + bytes(LARGE) + b"\r\n")
            said = b""
            with suppress(ConnectionError):
                while got := connection.recv(4096):
                    said += got
        assert b"Maximum Payload Violation" in said or b"-ERR" not in said  # it hung up, and its word may be lost
        eventually(lambda: door.graph.text.count(TOO_LARGE) > before, f"NATS says {TOO_LARGE!r}")

    @pytest.mark.parametrize(
        "data",
        [b"", PICKLE, b"{}", b"[" * 200_000, b'{"id": 1}', b'{"x": ' + b"[" * 200_000, b'{"id": "\xff"}'],
        ids=lambda one: str(one)[:12],
    )
    def test_what_is_no_job_is_thrown_out_of_the_queue(self, door: Door, data: bytes) -> None:
        """Once, counted, and the next job is done."""
        place = 'place="job queue"'
        before = door.graph.metrics("ImageWorker").total(DROPPED, place)

        async def publish() -> int:
            async with await connected(door.graph) as connection:
                stream = connection.jetstream()
                await stream.publish("dynamo_image_jobs", data)
                left = 1
                for _ in range(200):
                    left = (await stream.stream_info("dynamo_image_jobs")).state.messages
                    if not left:
                        break
                    await asyncio.sleep(0.1)
                return left

        assert asyncio.run(publish()) == 0
        assert door.graph.metrics("ImageWorker").total(DROPPED, place) == before + 1
        accepted = door.post(JOBS, JOBS.body)
        assert accepted.status == 202, accepted.body
        ended = job_ended(door.graph, json.loads(accepted.body)["id"])
        assert ended["status"] == "completed", ended


def typed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


UNREADABLE: dict[str, Any] = {
    "pickle": PICKLE,
    "nothing": b"",
    "garbage": b"\xff" * 100,
    "a list 200 000 deep": b"\x91" * 200_000,
    "a length above every number": b"\xdd\xff\xff\xff\xff",
    "half a map": b"\x82\xa1a",
    "no field that is wanted": typed({"a": 1}),
    "the right fields of wrong types": typed({"request_id": 7, "token_ids": "x", "picture": [], "tenant": {}}),
    "an object of Python": typed(msgspec.msgpack.Ext(1, PICKLE)),
    "a number": 7,
    "nothing in JSON": None,
    "text": "x",
    "a list": [1],
    "text 50 000 deep": "[" * 50_000,
    "7 MB": bytes(7 << 20),
}
ENDPOINTS = (
    "processor/chat", "processor/validate", "encodeworker/encode", "prefillworker/prefill", "decodeworker/generate",
    "decodeworker/reject", "embedworker/embed", "embedworker/states", "imageworker/generate", "imageworker/check",
)  # fmt: skip


@pytest.fixture(scope="module")
def refusals(door: Door, dropped_before: Callable[[str], float]) -> dict[tuple[str, str], list[Any]]:
    """All are sent by one process: each that joins a graph costs inotify instances."""
    asked = [(endpoint, name) for endpoint in ENDPOINTS for name in UNREADABLE]
    answers = stranger.send(door.graph, [(f"dynamo/{endpoint}", UNREADABLE[name]) for endpoint, name in asked])
    return dict(zip(asked, answers, strict=True))


@pytest.fixture(scope="module")
def dropped_before(door: Door) -> Callable[[str], float]:
    """How many an endpoint had dropped before those above were sent to it."""
    found = {address: dropped_at(door.graph, address) for address in ENDPOINTS}
    return found.__getitem__


def dropped_at(graph: Graph, address: str) -> float:
    component, _, endpoint = address.partition("/")
    (stage,) = (one for one in STAGES if one.lower() == component)
    return graph.metrics(stage).total(DROPPED, f'place="{endpoint}"')


GOOD = Handle(
    "dynamo/EncodeWorker/1", "arena-0", "lease", 0, 4096, (16, 64), "float32", "0" * 32, 4e9, ends_on_read=True
)
HANDLES: dict[str, dict[str, Any]] = {
    "shape larger than length": {"shape": (1024, 1024)},
    "shape smaller than length": {"shape": (1,)},
    "no shape": {"shape": ()},
    "a negative side": {"shape": (-16, -64)},
    "a side of nothing": {"shape": (0, 64)},
    "nine dimensions": {"shape": (1,) * 8 + (1024,)},
    "more than there is memory": {"shape": (2**40,), "length": 2**42},
    "above every number": {"shape": (2**62,), "length": 2**63 - 4},
    "negative length": {"length": -4096},
    "negative offset": {"offset": -4096},
    "offset above every number": {"offset": 2**62},
    "an object's dtype": {"dtype": "object"},
    "a dtype of a path": {"dtype": "../float32"},
    "bytes in two dimensions": {"dtype": "bytes", "shape": (64, 64)},
    "a digest too short": {"digest": "0"},
    "a digest of a megabyte": {"digest": "0" * (1 << 20)},
    "no lease": {"lease": ""},
    "a lease of a megabyte": {"lease": "x" * (1 << 20)},
    "a lease without end": {"lease_end": math.inf},
    "a lease that is over": {"lease_end": 1.0},
    "an owner that is none": {"owner": "../../x"},
    "an owner of another graph": {"owner": "other/EncodeWorker/1"},
    "an instance that is none": {"owner": "dynamo/EncodeWorker/x"},
    "an instance that is gone": {"owner": "dynamo/EncodeWorker/1"},
    "no incarnation": {"incarnation": ""},
}


def changed(name: str) -> Handle:
    return msgspec.structs.replace(GOOD, **HANDLES[name])


@pytest.fixture(scope="module")
def handled(door: Door) -> dict[str, tuple[list[Any], list[Any]]]:
    """Each bad handle as a prompt's image and as a client's picture."""
    messages: list[tuple[str, Any]] = []
    for name in HANDLES:
        image = PromptImage("uuid", changed(name))
        messages.append(("dynamo/prefillworker/prefill", typed(PrefillRequest(name, [1, 2, 3], [image]))))
        messages.append(("dynamo/encodeworker/encode", typed(EncodeRequest(name, "", Picture(handle=changed(name))))))
    answers = stranger.send(door.graph, messages)
    return {name: (answers[2 * index], answers[2 * index + 1]) for index, name in enumerate(HANDLES)}


HAND_OFF = {"HandOffFailed", "StaleHandle", "LeaseExpired", "WorkerLost", "TransferTimeout", "StageUnavailable"}


@pytest.mark.usefixtures("neighbour")
class TestEndpoints:
    @pytest.mark.parametrize("endpoint", ENDPOINTS)
    @pytest.mark.parametrize("name", UNREADABLE)
    def test_what_is_no_message_is_refused(
        self, refusals: dict[tuple[str, str], list[Any]], endpoint: str, name: str
    ) -> None:
        (answer,) = refusals[endpoint, name]
        error = answer.get("error", answer)
        assert error["class"] == "InvalidRequest", answer
        assert len(json.dumps(answer)) < 2048

    @pytest.mark.parametrize("address", ENDPOINTS)
    def test_such_messages_are_counted(
        self, door: Door, dropped_before: Callable[[str], float], refusals: Any, address: str
    ) -> None:
        assert dropped_at(door.graph, address) - dropped_before(address) >= len(UNREADABLE)

    @pytest.mark.parametrize("name", HANDLES)
    def test_a_handle_that_disagrees_with_itself_or_its_owner_is_refused(
        self, handled: dict[str, tuple[list[Any], list[Any]]], name: str
    ) -> None:
        for frames in handled[name]:
            (answer,) = frames
            assert answer["class"] in HAND_OFF, answer

    def test_such_handles_are_counted(self, door: Door, handled: Any) -> None:
        for stage in ("PrefillWorker", "EncodeWorker"):
            assert door.graph.metrics(stage).total("epd_transfer_failures_total") >= len(HANDLES)

    def test_a_handle_within_an_arena_but_on_no_lease_is_refused(self, door: Door) -> None:
        """The bytes are there, their digest is not what was promised: nobody reads a neighbour's picture so."""
        ((card, _),) = stranger.send(door.graph, [("dynamo/frontend/arena_card", typed(CardQuery()))])
        found = Card.decode(msgspec.msgpack.decode(base64.b64decode(card))["card"])
        instance = owner_of(door.graph, "frontend")
        for offset, length in ((0, 4096), (found.nbytes - 4096, 4096), (found.nbytes, 4096), (0, found.nbytes + 1)):
            handle = msgspec.structs.replace(
                GOOD,
                owner=f"dynamo/Frontend/{instance}",
                incarnation=found.incarnation,
                offset=offset,
                length=length,
                shape=(length,),
                dtype="bytes",
            )
            request = EncodeRequest("x", "", Picture(handle=handle))
            ((answer,),) = stranger.send(door.graph, [("dynamo/encodeworker/encode", typed(request))])
            assert answer["class"] in HAND_OFF | {"DigestMismatch"}, answer

    @pytest.mark.parametrize(
        "url", ["file:///etc/passwd", "http://169.254.169.254/", "http://127.0.0.1:{port}/x", "", "data:,", "x" * 9000]
    )
    def test_an_encode_worker_judges_addresses_itself(self, door: Door, url: str) -> None:
        picture = Picture(url=url.replace("{port}", str(door.canary.port)))
        message = typed(EncodeRequest("x", "", picture))
        ((answer,),) = stranger.send(door.graph, [("dynamo/encodeworker/encode", message)])
        assert answer["class"] in ("UrlNotAllowed", "MediaError"), answer

    def test_what_makes_no_sense_ends_no_engine(self, door: Door) -> None:
        long = list(range(3, 100)) * 1000
        sampling = json.dumps({"temperature": 0.0, "max_tokens": 1})
        messages: list[tuple[str, Any]] = [
            ("prefillworker/prefill", PrefillRequest("a", [], [])),
            ("prefillworker/prefill", PrefillRequest("b", [-1], [])),
            ("prefillworker/prefill", PrefillRequest("c", [10**9], [])),
            ("prefillworker/prefill", PrefillRequest("d", [2**62], [])),
            ("prefillworker/prefill", PrefillRequest("e", long, [])),
            ("prefillworker/prefill", PrefillRequest("f" * 100_000, [1, 2], [])),
            ("prefillworker/prefill", PrefillRequest("g", [1, 2], [PromptImage("u")])),
            ("decodeworker/generate", DecodeRequest("h", [], [], sampling)),
            ("decodeworker/generate", DecodeRequest("i", [10**9], [], sampling)),
            ("decodeworker/generate", DecodeRequest("j", [-5], [], sampling)),
            ("decodeworker/generate", DecodeRequest("k", [1, 2], [], "no JSON")),
            ("decodeworker/generate", DecodeRequest("l", [1, 2], [], json.dumps({"max_tokens": -1}))),
            ("decodeworker/generate", DecodeRequest("m", [1, 2], [], json.dumps({"temperature": "x"}))),
            ("decodeworker/generate", DecodeRequest("n", [1, 2], [], json.dumps({"logits_processors": ["os.system"]}))),
            ("decodeworker/generate", DecodeRequest("o", [1, 2], [], sampling, kv={"do_remote_prefill": True})),
            ("decodeworker/generate", DecodeRequest("p", [1, 2], [], sampling, kv={"a": "b"})),
            ("decodeworker/reject", RejectRequest("q", {"a": "b"})),
            ("encodeworker/release", ReleaseRequest(["x"] * 10_000)),
            ("imageworker/release", ReleaseRequest(["../x", ""])),
            ("embedworker/states", StatesRequest("r", [], 0, masked=True)),
            ("embedworker/states", StatesRequest("s", [10**9], 1, masked=False)),
            ("embedworker/states", StatesRequest("t", [-1], 5, masked=False)),
            ("embedworker/states", StatesRequest("u", [1] * 100_000, 100_000, masked=True)),
        ]
        answers = stranger.send(door.graph, [(f"dynamo/{place}", typed(message)) for place, message in messages])
        for (place, message), frames in zip(messages, answers, strict=True):
            print(place, str(message)[:60], str(frames)[:150])
            assert stranger.ended(frames), f"{place} {str(message)[:200]}: {frames}"
        door.unharmed()
        door.neighbour.asks()
        assert door.post(EMBEDDINGS, EMBEDDINGS.body).status == 200
        assert door.post(IMAGES, IMAGES.with_(prompt=STAR)).status == 200


FUZZED = 120
"""Here; `tests/acceptance/test_fuzz.py` sends many."""


@pytest.mark.usefixtures("neighbour")
def test_drawn_messages_are_answered_or_refused(door: Door) -> None:
    sent = messages.drawn(FUZZED, 7, door.canary.port)
    answers = stranger.send(door.graph, sent)
    judged = [
        (address, messages.judged(frames), data[:300]) for (address, data), frames in zip(sent, answers, strict=True)
    ]
    faults = [one for one in judged if one[1]]
    assert not faults, faults[:5]


def test_a_seed_gives_the_same_messages_to_every_endpoint() -> None:
    first = messages.drawn(100, 7, 54321)
    assert first == messages.drawn(100, 7, 54321)
    assert {address for address, _ in first} == messages.ENDPOINTS.keys()
    assert {f"dynamo/{place}" for place in ENDPOINTS} <= messages.ENDPOINTS.keys()


def owner_of(graph: Graph, component: str) -> int:
    """The instance id under which a worker is in discovery: the last part of its files' names."""
    directory = Path(stranger.credentials(graph)["DYN_FILE_KV"])
    names = [unquote(path.name) for path in directory.rglob("*") if f"/{component}/" in unquote(path.name)]
    assert names, list(directory.rglob("*"))
    return int(names[0].rpartition("/")[2], 16)


def ports(graph: Graph) -> list[tuple[psutil.Process, str, int]]:
    """Every port that a process of the graph listens on."""
    found = []
    for process in graph.tree():
        with suppress(psutil.Error):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    host = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(one.laddr.ip, one.laddr.ip)
                    found.append((process, host, one.laddr.port))
    return found


def thrown(place: tuple[psutil.Process, str, int], data: bytes) -> bytes:
    """Writes what will go within a second and a half, and says what comes back at once."""
    _, host, port = place
    with suppress(OSError), socket.create_connection((host, port), timeout=1.5) as connection:
        with suppress(OSError):
            connection.sendall(data)
        connection.settimeout(0.3)
        return connection.recv(4096)
    return b""


def dropped(graph: Graph) -> float:
    """How many messages to its side channel the prefill worker's engine has dropped."""
    return graph.metrics("PrefillWorker").total(DROPPED, 'place="side channel"')


@pytest.mark.usefixtures("neighbour")
class TestPorts:
    @pytest.mark.parametrize(
        "data",
        [
            PICKLE,
            bytes(range(256)) * 64,
            bytes(100),
            b"GET / HTTP/1.1\r\n\r\n",
            framed(PICKLE, PICKLE),
            b"\xff" * LARGE,
        ],
        ids=["pickle", "garbage", "zeros", "HTTP", "a frame", "64 MB"],
    )
    def test_what_no_port_expects_ends_no_process(self, door: Door, data: bytes) -> None:
        """NIXL's agents, UCX, ZeroMQ, the streams of replies, metrics, NATS, HTTP: all that is open."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda place: thrown(place, data), ports(door.graph)))
        door.unharmed()

    def test_no_port_but_what_an_operator_opened_is_on_every_address(self, door: Door) -> None:
        """NIXL's own (UCX) are on the machine's addresses: other hosts READ through them."""
        everywhere = []
        for process in door.graph.tree():
            with suppress(psutil.Error):
                listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
                everywhere += [(process, one.laddr) for one in listening if one.laddr.ip in ("::", "0.0.0.0")]
        assert everywhere == []

    def test_the_side_channel_and_every_zmq_socket_drop_what_is_no_message(self, door: Door) -> None:
        """And the engines count it, each in a process of its own."""
        question = typed((b"get_meta_msg", 0, 0))
        before = dropped(door.graph)
        opened = ports(door.graph)
        with ThreadPoolExecutor(32) as pool:
            greetings = pool.map(lambda place: thrown(place, b""), opened)
        channels = [one for one, said in zip(opened, greetings, strict=True) if said[:1] == b"\xff"]  # as ZeroMQ does
        assert channels, "the prefill and decode engines have a side channel each"
        messages = [
            [b"", PICKLE], [PICKLE], [b""] * 50, [b"", b"\xff" * 100], [b"", b"\x91" * 3000], [b"", bytes(LARGE)],
            [b"", typed((b"get_meta_msg", 99, 99))], [b"", typed({"a": 1})], [b"", typed(7)], [question],
        ]  # fmt: skip
        with zmq.Context() as context:
            for _, host, port in channels:
                for message in messages:
                    with context.socket(zmq.DEALER) as channel:
                        channel.setsockopt(zmq.LINGER, 1000)
                        channel.connect(f"tcp://{host}:{port}")
                        channel.send_multipart(message)
                with context.socket(zmq.REQ) as channel:
                    channel.setsockopt(zmq.LINGER, 0)
                    channel.setsockopt(zmq.RCVTIMEO, 20_000)
                    channel.connect(f"tcp://{host}:{port}")
                    channel.send(question)
                    assert len(channel.recv_multipart()) == 2, "the side channel tells no decode engine any more"
        # The large one is not received, and the last one is a question, but for its missing delimiter.
        wanted = before + len(messages) - 1
        eventually(lambda: dropped(door.graph) >= wanted, f"{wanted:g} messages are counted")
        door.unharmed()

    def test_metrics_are_still_told(self, door: Door) -> None:
        for stage in STAGES:
            metrics: Metrics = door.graph.metrics(stage)
            assert metrics.names
