# SPDX-License-Identifier: Apache-2.0
"""How the reply of ``/v1/embeddings`` is written. Without any stage."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.frontend import Admission
from components.protocol import Embedded
from dynamo_epd.http.embeddings import PIECE, embeddings_reply
from tests.test_beside_chat import FakeFrontend, FakeRequest

WIDTH = 1024


def drawn(count: int) -> np.ndarray:
    """float32 (count, WIDTH), with the ends of what float32 can say."""
    found = np.random.default_rng(5).standard_normal((count, WIDTH)).astype(np.float32)
    found[0, :4] = (0.0, 1e-45, -3.4028235e38, 1.0)
    return found


class OneReply(FakeFrontend):
    """With an embed worker that has its answer, and a count of those who were let in."""

    in_flight = 0

    def __init__(self, vectors: np.ndarray):
        super().__init__()
        self.config = SimpleNamespace(admission=Admission(deadline=60.0))  # type: ignore[assignment]
        self.reply = Embedded([row.tobytes() for row in vectors], [3] * len(vectors), 'a "model"', 0.0, 0.0)
        self.embed_worker = SimpleNamespace(embed=lambda message: self)

    async def only(self) -> Embedded:
        return self.reply

    @contextmanager
    def admitted(self) -> Iterator[None]:  # type: ignore[override]
        self.in_flight += 1
        yield
        self.in_flight -= 1


class Asking(FakeRequest):
    """A request whose client stays."""

    async def receive(self) -> Any:
        await asyncio.Event().wait()


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("count", [1, 200])
def test_the_reply_is_openais_and_others_have_their_turns_while_it_is_written(count: int, form: str) -> None:
    vectors = drawn(count)
    frontend = OneReply(vectors)
    sent: list[Any] = []
    turns = [0]

    async def beside() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def send(message: Any) -> None:
        """Of a client that keeps up: no send waits."""
        assert frontend.in_flight == 1, "what is being written still has its place"
        sent.append((message, turns[0]))

    async def main() -> None:
        other = asyncio.create_task(beside())
        request: Any = Asking({"input": ["a star"] * count, "encoding_format": form})
        response = await frontend.embed(request)
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, request.receive, send)
        other.cancel()

    asyncio.run(main())
    assert frontend.in_flight == 0
    (start, _), *pieces = sent
    assert start["status"] == 200
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    bodies = [message["body"] for message, _ in pieces]
    found = json.loads(b"".join(bodies))
    assert found == {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": row.tolist() if form == "float" else base64.b64encode(row.tobytes()).decode(),
            }
            for index, row in enumerate(vectors)
        ],
        "model": 'a "model"',
        "usage": {"prompt_tokens": 3 * count, "total_tokens": 3 * count},
    }
    assert max(map(len, bodies)) <= PIECE + WIDTH * 32, "a piece is no longer than one vector more"
    assert len(bodies) >= sum(map(len, bodies)) // (PIECE + WIDTH * 32)
    moments = [at for _, at in pieces[:-1]]  # the last is empty, and ends the body
    assert all(earlier < later for earlier, later in pairwise(moments))
    assert (len(moments) > 10) == (count == 200)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_json_is_an_error_before_the_first_piece(value: float) -> None:
    vectors = drawn(2)
    vectors[1, 7] = value
    request: Any = Asking({"input": ["a star"] * 2})
    frontend = OneReply(vectors)
    with pytest.raises(ValueError, match="no number in JSON"):
        asyncio.run(frontend.embed(request))
    embeddings_reply(frontend.reply.vectors, [3, 3], "a model", encoded=True)  # base64 says all of float32
