# SPDX-License-Identifier: Apache-2.0
"""vLLM's handshake over real sockets: answered as vLLM's decode engines ask, and by no message brought to an end."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import zmq

from dynamo_epd import dropped
from dynamo_epd.engine.side_channel import QUESTION_BYTES, answer_questions
from tests.serving import eventually

KNOWN = {(0, 0): b"first", (0, 1): b"second"}
QUESTION = msgspec.msgpack.encode((b"get_meta_msg", 0, 0))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    path = dropped.share(dropped.SIDE_CHANNEL)
    with open(path, "r+b", buffering=0) as file:
        dropped.write(file.fileno(), 0)  # what the test before has counted
    monkeypatch.setenv(dropped.SIDE_CHANNEL_FILE, path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=answer_questions, args=(KNOWN, ready, stop, "127.0.0.1", port))
    thread.start()
    assert ready.wait(10)
    yield port
    assert thread.is_alive()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def asked(port: int, raw: bytes = QUESTION) -> list[bytes]:
    """As vLLM's worker asks."""
    with zmq.Context() as context, context.socket(zmq.REQ) as channel:
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.RCVTIMEO, 10_000)
        channel.connect(f"tcp://127.0.0.1:{port}")
        channel.send(raw)
        return channel.recv_multipart()


def thrown(port: int, *messages: list[bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as channel:
        channel.setsockopt(zmq.LINGER, 10_000)
        channel.connect(f"tcp://127.0.0.1:{port}")
        for message in messages:
            channel.send_multipart(message)


def test_a_decode_engine_is_told_what_it_asks_for(port: int) -> None:
    reply, clock = asked(port)
    assert reply == b"first"
    assert 0 <= time.perf_counter() - msgspec.msgpack.decode(clock) < 60
    assert asked(port, msgspec.msgpack.encode((b"get_meta_msg", 0, 1)))[0] == b"second"


@pytest.mark.parametrize(
    "message",
    [
        [b"", pickle.dumps({"a": 1})],
        [b"", b"\xff" * 100],
        [b"", b""],
        [b""],
        [QUESTION],
        [b"", QUESTION, b"more"],
        [b"", msgspec.msgpack.encode((b"get_meta_msg", 7, 7))],
        [b"", msgspec.msgpack.encode((b"get_meta_msg", -1, 2**63))],
        [b"", msgspec.msgpack.encode((b"get_meta_msg", [0], {}))],
        [b"", msgspec.msgpack.encode((b"get_meta_msg", 0))],
        [b"", msgspec.msgpack.encode(7)],
        [b"", b"\x91" * 3000],
        [b""] * 500,
    ],
    ids=[
        "pickle", "garbage", "nothing", "one frame", "no delimiter", "a frame too many", "an unknown rank",
        "huge ranks", "other types", "too few", "a number", "nested", "many frames",
    ],
)  # fmt: skip
def test_what_is_no_question_is_dropped(port: int, message: list[bytes], caplog: Any) -> None:
    thrown(port, message, message)
    # Another connection's messages have no order beside these.
    eventually(lambda: asked(port)[0] == b"first" and "2 messages dropped" in caplog.text, "both are dropped")
    assert dropped.counts()[dropped.SIDE_CHANNEL] == 2


def test_a_large_message_is_not_received(port: int) -> None:
    thrown(port, [b"", bytes(QUESTION_BYTES + 1)], [b"", bytes(64 << 20)])
    assert asked(port)[0] == b"first"


def test_what_is_no_zmq_is_not_answered(port: int) -> None:
    for raw in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04cos\nsystem\n", bytes(1 << 20)):
        # That ZMQ hangs up while the rest is under way is as right as that it reads it and is silent.
        hung_up = suppress(ConnectionResetError, BrokenPipeError)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, hung_up:
            connection.sendall(raw)
    assert asked(port)[0] == b"first"


def test_vllm_takes_this_listener() -> None:
    """Its place in vLLM, and what vLLM hands it."""
    import inspect

    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler

    from dynamo_epd.engine import plugin

    theirs = inspect.signature(base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener)
    assert len(theirs.parameters) == len(inspect.signature(answer_questions).parameters)
    plugin._answer_who_is_no_engine()
    assert base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener is answer_questions
    assert base_scheduler.GET_META_MSG == b"get_meta_msg"
