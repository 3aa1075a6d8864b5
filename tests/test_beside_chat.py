# SPDX-License-Identifier: Apache-2.0
"""How the routes beside chat read their bodies, and how a stream that breaks off is counted. Without any stage."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from components import beside_chat
from components.beside_chat import BesideChat, first_drawn
from components.frontend import Account
from components.giving_back import drawing
from components.protocol import Done, Generated, GenerateRequest, Handle, ReleaseRequest, Validated
from dynamo_epd.errors import (
    EpdError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    Overloaded,
    StageUnavailable,
    TransferTimeout,
    WorkerLost,
)
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
    account = Account(status=200)

    async def read() -> list[bytes]:
        frontend: Any = FakeFrontend()
        message: Any = SimpleNamespace(picture=SimpleNamespace(keep=None))
        if kind is Generated:
            stream = frontend._image_events(broken(error), None, account)
        else:
            stream = frontend._validation_events(None, broken(error), message, None, account)
        return [event async for event in stream]

    events = asyncio.run(read())
    assert account.status == status
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
            "_image_events": (replies, None, Account()),
            "_validation_events": (None, replies, None, None, Account()),
        }
        stream = getattr(FakeFrontend(), kind)(*arguments[kind])
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect):
            await HeldStream(stream, held)(scope, gone, gone)  # type: ignore[arg-type]
        return freed

    assert asyncio.run(main()) == ["held"]


HANDLE = Handle("namespace/ImageWorker/7", "incarnation", "lease", 0, 4, (4,), "bytes", "", 0.0, ends_on_read=True)
MADE = Generated(1, 1, 8, 8, HANDLE, done=Done("m", 1, 1, 0.0, 0.0))


class ImageWorkerDouble:
    """One that is asked, the call for a picture, and that of the release."""

    instance = 7

    def __init__(self) -> None:
        self.released: list[str] = []
        """Leases and ids of requests."""
        self.asked = 0

    def generate(self, message: GenerateRequest) -> ImageWorkerDouble:
        self.asked += 1
        return self

    def __aiter__(self) -> ImageWorkerDouble:
        return self

    async def __anext__(self) -> Generated:
        return MADE

    async def aclose(self) -> None:
        """Nothing waits."""

    def release(self, request: ReleaseRequest, *, instance: int) -> Any:
        assert instance == self.instance
        self.released += [*request.leases, *request.request_ids]
        return self

    async def only(self) -> None:
        """Of the release."""


class ArenaDouble:
    """One whose READs fail, as long as there are ``errors``."""

    def __init__(self, *errors: EpdError):
        self.errors = [*errors]

    @asynccontextmanager
    async def read(self, handles: list[Handle], timeout: float) -> AsyncIterator[list[bytes]]:
        if self.errors:
            raise self.errors.pop(0)
        yield [b"file"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_picture_of_a_stream_that_is_left_is_given_back(begun: bool) -> None:
    """As uvicorn has it, who says that the client is gone, and fails nothing that is sent."""

    async def main() -> list[str]:
        worker, held, sent = ImageWorkerDouble(), AsyncExitStack(), asyncio.Event()
        frontend: Any = FakeFrontend()
        frontend.arena = ArenaDouble()

        async def stuck(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.set()
            if message["type"] == "http.response.body" or not begun:
                await asyncio.Event().wait()

        async def gone() -> dict[str, str]:
            if begun:
                await sent.wait()
            return {"type": "http.disconnect"}

        wanted: Any = SimpleNamespace(format="png", quality=None)
        stream = frontend._image_events(worker, wanted, Account())
        await held.enter_async_context(drawing(worker, worker, "r"))  # type: ignore[arg-type]
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        with pytest.raises(ClientDisconnect):
            await HeldStream(stream, held)(scope, gone, stuck)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return worker.released

    assert asyncio.run(main()) == ["r"]


def test_what_a_first_reply_would_hand_over_is_given_back_where_its_client_left_before_it() -> None:
    """A partial picture may be in it, which the runtime drops with the reply."""

    class Silent(ImageWorkerDouble):
        async def __anext__(self) -> Generated:
            return await asyncio.Event().wait()  # type: ignore[return-value]

    async def main() -> list[str]:
        worker: Any = Silent()
        waiting = asyncio.ensure_future(first_drawn(worker, GenerateRequest("r", "a red circle", 1)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        return list(worker.released)

    assert asyncio.run(main()) == ["r"]


def test_a_stream_is_asked_for_elsewhere_where_its_first_worker_is_lost_and_held_until_it_ends() -> None:
    class Mortal(ImageWorkerDouble):
        async def __anext__(self) -> Generated:
            if self.asked == 1:
                raise WorkerLost("gone")
            return MADE

    async def main() -> tuple[int, list[str], list[str]]:
        worker: Any = Mortal()
        around, call, head = await first_drawn(worker, GenerateRequest("r", "a red circle", 1))
        assert call is worker and head is MADE
        before = list(worker.released)
        with pytest.raises(ClientDisconnect):
            async with around:
                raise ClientDisconnect
        await asyncio.sleep(0)
        return worker.asked, before, list(worker.released)

    assert asyncio.run(main()) == (2, [], ["r"])


@pytest.mark.parametrize(
    ("error", "released"),
    [
        (Overloaded("the arena is full"), ["r"]),
        (InvalidRequest("no such size"), ["r"]),
        (ZeroDivisionError("a defect"), ["r"]),
        (WorkerLost("gone"), []),
        (TransferTimeout("asked again"), []),
    ],
)
def test_what_is_laid_out_for_a_picture_that_fails_is_given_back(error: Exception, released: list[str]) -> None:
    async def main() -> list[str]:
        worker: Any = ImageWorkerDouble()
        with pytest.raises(type(error)):
            async with drawing(worker, worker, "r"):
                raise error
        await asyncio.sleep(0)
        return list(worker.released)

    assert asyncio.run(main()) == released


def test_nothing_is_given_back_where_no_worker_was_asked() -> None:
    async def main() -> list[str]:
        worker: Any = ImageWorkerDouble()
        worker.instance = None
        with pytest.raises(StageUnavailable):
            async with drawing(worker, worker, "r"):
                raise StageUnavailable("no ImageWorker is running")
        await asyncio.sleep(0)
        return list(worker.released)

    assert asyncio.run(main()) == []


REQUEST = GenerateRequest("r", "a star", 1)


@pytest.mark.parametrize(
    ("errors", "raised", "released", "asked"),
    [
        ([], None, [], 1),
        ([TransferTimeout("slow")], None, ["lease"], 2),  # and not by the id, by which the second is asked for
        ([TransferTimeout("slow"), LeaseExpired("over")], StageUnavailable, ["lease", "lease"], 2),
        ([Overloaded("full")], Overloaded, ["lease", "r"], 1),
    ],
)
def test_a_picture_that_cannot_be_read_is_given_back(
    errors: list[EpdError], raised: type[EpdError] | None, released: list[str], asked: int
) -> None:
    async def main() -> None:
        frontend: Any = FakeFrontend()
        frontend.image_worker, frontend.arena = worker, ArenaDouble(*errors)
        if raised is None:
            assert await frontend._picture(None, REQUEST) == ({"b64_json": "ZmlsZQ=="}, MADE)
        else:
            with pytest.raises(raised):
                await frontend._picture(None, REQUEST)
        await asyncio.sleep(0)

    worker = ImageWorkerDouble()
    asyncio.run(main())
    assert sorted(worker.released) == released
    assert worker.asked == asked


def test_a_picture_that_a_stream_cannot_read_is_given_back() -> None:
    """The stream ends in an error event, of which nobody hears who holds the call."""

    async def main() -> list[bytes]:
        frontend: Any = FakeFrontend()
        frontend.image_worker, frontend.arena = worker, ArenaDouble(Overloaded("full"))
        events = [one async for one in frontend._image_events(worker, None, Account())]
        await asyncio.sleep(0)
        return events

    worker = ImageWorkerDouble()
    events = asyncio.run(main())
    assert [b"overloaded" in one for one in events] == [True]
    assert worker.released == ["lease"]


@pytest.mark.parametrize("stage", ["processor", "image_worker", "embed_worker"])
def test_validations_need_all_three_models(stage: str) -> None:
    frontend = FakeFrontend()
    setattr(frontend, stage, None)
    with pytest.raises(NotFound, match="lacks the model"):
        asyncio.run(frontend.validate(FakeRequest({"prompt": "a star"})))  # type: ignore[arg-type]
