# SPDX-License-Identifier: Apache-2.0
"""How a prefill engine tells decode engines where its KV cache lies: vLLM's protocol, in a thread that nobody can end.

vLLM 0.31's own thread ends at the first message that is not one of its decode engines', and with it the engine (see
`plugin`). Here such a message is dropped and counted, and a large one is not even received.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping

import msgspec
import zmq

from dynamo_epd import dropped

QUESTION_BYTES = 4096
"""Of one frame. A decode engine's question has 20; who sends more is disconnected."""
TURN_MILLISECONDS = 200
"""How often it is looked whether the engine ends."""

log = logging.getLogger(__name__)


def _file() -> int | None:
    """Where the worker that started this engine looks for the number of dropped messages; None where nobody does."""
    path = os.environ.get(dropped.SIDE_CHANNEL_FILE)
    try:
        return os.open(path, os.O_WRONLY) if path else None
    except OSError as error:
        log.warning("what is dropped here is not counted: %s", error)
        return None


class Question(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Which worker of the engine is asked about."""

    word: bytes
    stage: int
    """Of pipeline parallelism."""
    rank: int
    """Of tensor parallelism."""


def answer_questions(
    known: Mapping[tuple[int, int], bytes], ready: threading.Event, stop: threading.Event, host: str, port: int
) -> None:
    """Answers until ``stop``, from ``ready`` on. ``known``: what to say by stage and rank.

    Raises zmq.ZMQError where ``host`` and ``port`` cannot be had.
    """
    number = 0
    shown = _file()
    decoder = msgspec.msgpack.Decoder(Question)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as channel:
        channel.setsockopt(zmq.LINGER, 0)
        channel.setsockopt(zmq.MAXMSGSIZE, QUESTION_BYTES)
        channel.setsockopt(zmq.IPV6, int(":" in host))
        channel.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        ready.set()
        while not stop.is_set():
            if not channel.poll(TURN_MILLISECONDS):
                continue
            frames = channel.recv_multipart()
            try:
                sender, _, raw = frames
                question = decoder.decode(raw)
                reply = known[question.stage, question.rank]
            except (ValueError, msgspec.MsgspecError, KeyError):
                number += 1
                if shown is not None:
                    dropped.write(shown, number)
                if number & (number - 1) == 0:  # the 1st, 2nd, 4th, 8th: a flood of them does not flood the log
                    log.warning("%d messages dropped that are no decode engine's", number)
                continue
            # The clock of this process, by which the engine's leases end.
            channel.send_multipart((sender, b"", reply, msgspec.msgpack.encode(time.perf_counter())))
