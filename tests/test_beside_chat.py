# SPDX-License-Identifier: Apache-2.0
"""How the routes beside chat read their bodies, and how a stream that breaks off is counted. Without any stage."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from components import beside_chat
from components.beside_chat import BesideChat
from components.frontend import Account
from components.giving_back import drawing
from components.protocol import Generated, ReleaseRequest, Validated
from dynamo_epd.errors import EpdError, InvalidRequest, NotFound, Overloaded, StageUnavailable
from dynamo_epd.http.held import HeldStream
from dynamo_epd.http.strict_json import LARGE_BODY

ROUTES = {
    "embed": "check_embeddings",
    "generate_images": "check_images",
    "validate": "check_validations",
    "predict": "check_predict",
}
"""Each with the check of its body."""


class FakeFrontend(BesideChat):
    """With stages that nobody asks, and room for a request or none."""

    def __init__(self, *, full: bool = False):
        self.embed_worker = self.image_worker = self.processor = object()
        self.full = full

    @contextmanager
    def accounted(self, request_id: str) -> Iterator[Account]:  # type: ignore[override]
        yield Account()

    @contextmanager
    def admitted(self) -> Iterator[None]:  # type: ignore[override]
        if self.full:
            raise Overloaded("full")
        yield


class FakeRequest:
    """A body, and no client."""

    def __init__(self, body: Any):
        self.state = SimpleNamespace(request_id="r", tenant="")
        self.raw = json.dumps(body).encode()
        self.read = False

    async def body(self) -> bytes:
        self.read = True
        return self.raw


def call(frontend: FakeFrontend, route: str, request: Any) -> Any:
    asked = getattr(frontend, route)
    return asked(request, "model") if route == "predict" else asked(request)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [10, LARGE_BODY])
def test_a_large_body_is_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch, route: str, size: int) -> None:
    threads = []

    def check(body: dict[str, Any]) -> None:
        threads.append(threading.current_thread())
        raise InvalidRequest(f"{len(body['text'])} characters")

    monkeypatch.setattr(beside_chat, ROUTES[route], check)
    with pytest.raises(InvalidRequest, match=f"^{size} characters"):
        asyncio.run(call(FakeFrontend(), route, FakeRequest({"text": "x" * size})))
    assert (threads[0] is threading.current_thread()) == (size == 10)


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_is_not_read_before_there_is_room(route: str) -> None:
    request = FakeRequest({})
    with pytest.raises(Overloaded):
        asyncio.run(call(FakeFrontend(full=True), route, request))
    assert not request.read


async def broken(error: EpdError | None) -> AsyncIterator[Any]:
    if error is not None:
        raise error
    return
    yield


@pytest.mark.parametrize(("error", "status"), [(StageUnavailable("gone"), 503), (None, 200)])
@pytest.mark.parametrize("kind", [Generated, Validated])
def test_a_stream_is_counted_as_it_ended(kind: type, error: EpdError | None, status: int) -> None:
    counted = []

    async def read() -> list[bytes]:
        held, account = AsyncExitStack(), Account(status=200)
        held.callback(lambda: counted.append(account.status))
        frontend: Any = FakeFrontend()
        message: Any = SimpleNamespace(picture=SimpleNamespace(keep=None))
        if kind is Generated:
            stream = frontend._image_events(broken(error), None, account, held)
        else:
            stream = frontend._validation_events(None, broken(error), message, None, account, held)
        return [event async for event in stream]

    events = asyncio.run(read())
    assert counted == [status]
    assert [b"stage_unavailable" in event for event in events] == ([True] if error else [])


@pytest.mark.parametrize("kind", ["_image_events", "_validation_events"])
def test_a_stream_that_never_begins_gives_back_what_it_holds(kind: str) -> None:
    """Its client leaves before the first byte: the generator that holds all of it is never run."""

    async def gone(message: Any) -> None:
        raise OSError

    async def main() -> list[str]:
        freed: list[str] = []
        held = AsyncExitStack()
        held.callback(freed.append, "held")
        replies: Any = None
        arguments: dict[str, tuple[Any, ...]] = {
            "_image_events": (replies, None, Account(), held),
            "_validation_events": (None, replies, None, None, Account(), held),
        }
        stream = getattr(FakeFrontend(), kind)(*arguments[kind])
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            await HeldStream(stream, held)(scope, gone, gone)  # type: ignore[arg-type]
        return freed

    assert asyncio.run(main()) == ["held"]


def test_a_picture_of_a_stream_that_never_begins_is_given_back() -> None:
    """As uvicorn has it, who says that the client is gone, and fails nothing that is sent."""

    class ImageWorkerDouble:
        instance = 7

        def __init__(self) -> None:
            self.released: list[str] = []

        async def aclose(self) -> None:
            """Of the call for the picture."""

        def release(self, request: ReleaseRequest, *, instance: int) -> Any:
            self.released += request.request_ids
            return self

        async def only(self) -> None:
            """Of the release."""

    async def main() -> list[str]:
        worker, held = ImageWorkerDouble(), AsyncExitStack()

        async def never() -> AsyncIterator[bytes]:
            yield b""

        async def stuck(message: Any) -> None:
            await asyncio.Event().wait()

        async def gone() -> dict[str, str]:
            return {"type": "http.disconnect"}

        await held.enter_async_context(drawing(worker, worker, "r"))  # type: ignore[arg-type]
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        with pytest.raises(ClientDisconnect):
            await HeldStream(never(), held)(scope, gone, stuck)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return worker.released

    assert asyncio.run(main()) == ["r"]


@pytest.mark.parametrize("stage", ["processor", "image_worker", "embed_worker"])
def test_validations_need_all_three_models(stage: str) -> None:
    frontend = FakeFrontend()
    setattr(frontend, stage, None)
    with pytest.raises(NotFound, match="lacks the model"):
        asyncio.run(frontend.validate(FakeRequest({"prompt": "a star"})))  # type: ignore[arg-type]
