# SPDX-License-Identifier: Apache-2.0
"""The routes of what stays, without a graph: admission, files in pieces, what is gone, and the sweep."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.types import Message

from components.frontend import Admission, Frontend, FrontendConfig
from components.results import Results
from dynamo_epd.errors import InternalError, NotFound, Overloaded
from dynamo_epd.http.errors import answer_errors
from dynamo_epd.store import Store, StoreConfig, new_id
from dynamo_epd.store.store import PIECE

DATA = bytes(range(256)) * (PIECE // 256) * 2 + b"the end"


class Alone(Results):
    """What a `Frontend` has of it, around a store."""

    admitted = Frontend.admitted

    def __init__(self, root: Path):
        store = StoreConfig(str(root), sweep_seconds=0.01)
        self.config = FrontendConfig(store=store, admission=Admission(max_in_flight=4, max_readers=2))
        self.store = Store(store)
        self.signer = None
        self.image_worker = "a graph has one"
        self.in_flight = 0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def scope_of(method: str, path: str, tenant: str = "", **headers: str) -> dict[str, Any]:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    address = {"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http"}
    return {"type": "http", "method": method, "headers": raw, "state": {"tenant": tenant}} | address


async def answered(app: Any, scope: dict[str, Any], stays: bool = True) -> list[Message]:
    """What ``app`` sends to a client, which ``stays`` or has left when it is first looked for."""
    sent: list[Message] = []

    async def receive() -> Message:
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        await asyncio.sleep(0)

    await app(scope, receive, send)
    return sent


def body_of(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


def test_a_picture_is_sent_in_pieces_and_has_a_reader_until_its_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        stored = await results.store.put("", new_id(), DATA, "image/png", {})
        for asked, expected in (({}, DATA), ({"range": "bytes=5-1500000"}, DATA[5:1500001])):
            scope = scope_of("GET", f"/v1/images/{stored.id}", **asked)
            reply = await results.picture(Request(scope), stored.id)
            assert (results.readers, results.in_flight) == (1, 0), "a reader until its end, and never a request"
            sent = await answered(reply, scope)
            assert results.readers == 0
            headers = dict(sent[0]["headers"])
            assert headers[b"content-length"] == str(len(expected)).encode()
            assert headers[b"content-type"] == b"image/png"
            assert body_of(sent) == expected
            assert max(len(message.get("body", b"")) for message in sent) <= PIECE

    run(scenario)


def test_a_client_that_leaves_before_the_first_piece_is_no_reader_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        stored = await results.store.put("", new_id(), DATA, "image/png", {})
        scope = scope_of("GET", f"/v1/images/{stored.id}")
        reply = await results.picture(Request(scope), stored.id)
        with pytest.raises(ClientDisconnect):
            await answered(reply, scope, stays=False)
        assert results.readers == 0

    run(scenario)


@pytest.mark.parametrize("position", [0, len(DATA) - 1])
def test_a_damaged_picture_never_looks_whole(tmp_path: Path, position: int) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        stored = await results.store.put("", new_id(), DATA, "image/png", {})
        (path,) = (tmp_path / "data" / "everyone").iterdir()
        path.write_bytes(DATA[:position] + b"?" + DATA[position + 1 :])
        scope = scope_of("GET", f"/v1/images/{stored.id}")
        reply = await results.picture(Request(scope), stored.id)
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            await asyncio.Event().wait()
            return {}

        with pytest.raises(InternalError):
            await reply(scope, receive, send)
        assert len(body_of(sent)) < len(DATA), "the connection is cut before the length that was promised"
        assert results.readers == 0

    run(scenario)


def test_what_stays_is_refused_when_too_much_is_asked_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        results.in_flight = 4
        request = Request(scope_of("GET", "/"))
        for ask in (results.job, results.result, results.remove_picture):
            with pytest.raises(Overloaded):
                await ask(request, "img-1")
        with pytest.raises(Overloaded):
            await results.pictures(request)

    run(scenario)


def test_who_reads_pictures_slowly_keeps_readers_out_and_nobody_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        stored = await results.store.put("", new_id(), DATA, "image/png", {})
        scope = scope_of("GET", f"/v1/images/{stored.id}")
        held = [await results.picture(Request(scope), stored.id) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 pictures are being sent"):
            await results.picture(Request(scope), stored.id)
        assert json.loads(bytes((await results.pictures(Request(scope))).body))["data"], "others are answered"
        await answered(held[0], scope)
        held.append(await results.picture(Request(scope), stored.id))
        for one in held[1:]:
            await answered(one, scope)
        with pytest.raises(NotFound):
            await results.picture(Request(scope), new_id())
        assert results.readers == 0

    run(scenario)


def test_a_pictures_time_is_over_for_its_tenant_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        app = FastAPI()
        app.add_api_route("/v1/images/{id}", results.picture, methods=["GET"], response_model=None)
        answer_errors(app)
        stored = await results.store.put("ann", new_id(), b"x", "image/png", {}, ttl=0.2)
        await asyncio.sleep(0.3)

        async def error(tenant: str, id: str) -> tuple[int, dict[str, Any]]:
            sent = await answered(app, scope_of("GET", f"/v1/images/{id}", tenant))
            return sent[0]["status"], json.loads(body_of(sent))["error"]

        for swept in (0, 1):
            while swept and not await results.store.sweep():
                await asyncio.sleep(0.1)
            status, gone = await error("ann", stored.id)
            foreign, guessed = await error("bob", stored.id), await error("ann", new_id())
            assert (status, gone["code"]) == (410, "expired")
            assert foreign[0] == 404
            assert foreign == guessed
            assert set(gone) == set(guessed[1]) == {"message", "type", "param", "code"}
        assert results.in_flight == 0

    run(scenario)


def test_a_sweep_that_breaks_off_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        results = Alone(tmp_path)
        sweep, calls = results.store.sweep, []
        again = asyncio.Event()

        async def broken_once() -> int:
            calls.append(1)
            if len(calls) == 1:
                raise ValueError("a defect")
            again.set()
            return await sweep()

        monkeypatch.setattr(results.store, "sweep", broken_once)
        sweeping = asyncio.create_task(results._sweep())
        waiting = asyncio.create_task(again.wait())
        await asyncio.wait({sweeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert again.is_set()
        for task in (sweeping, waiting):
            task.cancel()

    run(scenario)
