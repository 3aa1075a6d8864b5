# SPDX-License-Identifier: Apache-2.0
"""The row of HARDENING.md about bytes of a hand-off of ours that are corrupt, at a graph: a right answer or 503.

That a READ notices them is in `tests/test_transfer.py`. Here they are changed in the memory of a running encode worker,
under an embedding that it keeps, between two questions about that picture.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from components.protocol import Encoded, EncodeRequest, Picture, ReleaseRequest
from dynamo_epd.exchange import CardQuery, CardReply
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.peers import Card
from tests.hardening import stranger
from tests.hardening.edge import CHAT, Door, refused_as_unavailable
from tests.picture_server import PictureServer
from tests.questions import Said, ask, chat, difference, picture, user

pytestmark = pytest.mark.usefixtures("open_unharmed", "open_neighbour")

ALL_BITS = 0xFF


class Embeddings:
    """Those of two pictures of one size, where they lie in the encode worker's memory."""

    def __init__(self, door: Door, urls: tuple[str, str]):
        requests = [uuid.uuid4().hex for _ in urls]  # one that was given back is never laid out again
        answers = stranger.send(
            door.graph,
            [
                *(
                    ("dynamo/encodeworker/encode", typed(EncodeRequest(request, "", Picture(url=url))))
                    for request, url in zip(requests, urls, strict=True)
                ),
                ("dynamo/encodeworker/arena_card", typed(CardQuery())),
                # Nobody READs these: given back, they are but a cache's.
                ("dynamo/encodeworker/release", typed(ReleaseRequest(request_ids=requests))),
            ],
        )
        self.handles = [
            msgspec.msgpack.decode(base64.b64decode(frames[0]), type=Encoded).handle for frames in answers[:2]
        ]
        card = msgspec.msgpack.decode(base64.b64decode(answers[2][0]), type=CardReply).card
        self._base = Card.decode(card).address
        self._memory = Path(f"/proc/{door.graph.pid('EncodeWorker')}/mem")

    def read(self, handle: Handle) -> bytes:
        with self._memory.open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), handle.length, self._base + handle.offset)

    @contextmanager
    def changed(self, handle: Handle, data: bytes) -> Iterator[None]:
        """Has other bytes in its place inside the block."""
        right = self.read(handle)
        assert len(data) == len(right) and data != right
        self._write(handle, data)
        try:
            yield
        finally:
            self._write(handle, right)

    def _write(self, handle: Handle, data: bytes) -> None:
        with self._memory.open("r+b", buffering=0) as memory:
            assert os.pwrite(memory.fileno(), data, self._base + handle.offset) == len(data)


def typed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def flipped(data: bytes) -> bytes:
    """One byte of it, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ ALL_BITS]) + data[middle + 1 :]


@pytest.mark.parametrize("how", ["a flipped byte", "a slot that another picture has"])
def test_bytes_that_changed_in_an_arena_are_a_right_answer_or_503(open_door: Door, how: str) -> None:
    graph = open_door.graph
    with PictureServer() as server:
        seeds = (93_000, 93_001) if how == "a flipped byte" else (93_002, 93_003)
        first, second = (server.put(f"{seed}.png", picture(seed)) for seed in seeds)
        question = chat(user("What is in this image?", first))
        right = ask(graph.url, question)
        other = ask(graph.url, chat(user("What is in this image?", second)))
        assert difference(right, other) is not None, "one would pass for the other"
        embeddings = Embeddings(open_door, (first, second))
        mine, others = embeddings.handles
        data = flipped(embeddings.read(mine)) if how == "a flipped byte" else embeddings.read(others)
        before = graph.metrics("PrefillWorker").total("epd_digest_failures_total")
        encoded = graph.metrics("EncodeWorker").total("epd_embedding_cache_misses_total")
        with embeddings.changed(mine, data):
            reply = open_door.post(CHAT, question)
        if reply.status == 200:
            assert difference(right, Said.of(msgspec.json.decode(reply.body))) is None
        else:
            refused_as_unavailable(reply)
        assert graph.metrics("PrefillWorker").total("epd_digest_failures_total") > before, "nobody has READ them"
        assert difference(right, ask(graph.url, question)) is None
        if reply.status != 200:  # what was changed and put right again is what was READ
            assert graph.metrics("EncodeWorker").total("epd_embedding_cache_misses_total") == encoded
