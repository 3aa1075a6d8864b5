# SPDX-License-Identifier: Apache-2.0
"""What the frontend does by itself, without stages; its answers are tested on running graphs."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.types import Message

from components import beside_chat, frontend
from components.frontend import Account, Admission, Frontend, events
from components.protocol import Generated, Handle, HttpReply, Stage, Validated
from dynamo_epd.errors import DeadlineExceeded, NotFound, StageUnavailable
from dynamo_epd.http.body import ImageRef
from dynamo_epd.http.held import HeldStream
from dynamo_epd.transfer.allocator import ALIGNMENT
from dynamo_epd.transfer.memory import Memory
from dynamo_epd.transfer.slots import Slots


class CountedDouble:
    """Stands where the metrics of requests are."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.duration = SimpleNamespace(observe=lambda _: None)

    def count(self, status: int) -> None:
        self.statuses.append(status)


class ProcessorDouble:
    """One that says how its stages are, when it is let to."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()

    def instances(self) -> list[int]:
        return [1]

    def health(self, _: Any) -> Any:
        return self

    async def only(self) -> Any:
        self.asked += 1
        await self.go.wait()
        return SimpleNamespace(stages={"DecodeWorker": self.asked})


class StageDouble:
    """One beside the chat chain, with so many workers and one model."""

    def __init__(self, name: str, workers: int):
        self.name, self.workers = name, workers

    def instances(self) -> list[int]:
        return list(range(self.workers))

    def models(self, _: Any) -> Any:
        return self

    async def only(self) -> Any:
        return SimpleNamespace(names=[f"model of {self.name}"])


class SilentStageDouble:
    """One whose workers say that they live, and never answer. ``asked`` and ``left`` count its calls."""

    instance = None

    def __init__(self) -> None:
        self.asked = self.left = 0

    def ask(self, _: Any) -> SilentStageDouble:
        self.asked += 1
        return self

    chat = complete = embed = generate = validate = ask

    def models(self, _: Any) -> Any:
        async def only() -> Any:
            return SimpleNamespace(names=["model"])

        return SimpleNamespace(only=only)

    def __aiter__(self) -> SilentStageDouble:
        return self

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    async def only(self) -> Any:
        try:
            await anext(self)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        self.left += 1


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Frontend:
    """A frontend with nothing behind it, on an app of its own."""
    monkeypatch.setattr(frontend, "app", FastAPI())
    made = Frontend()
    made.metrics = CountedDouble()  # type: ignore[assignment]
    return made


async def gone() -> Message:
    return {"type": "http.disconnect"}


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def passes(_: Message) -> None:
    await asyncio.sleep(0)


SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/", "headers": []}
LATER = 4e9
"""A deadline in Unix seconds."""


@pytest.mark.parametrize(
    "values",
    [
        *({"deadline": seconds} for seconds in (7200, 0, -1.0, float("nan"))),
        {"max_in_flight": 0},
        {"max_readers": 0},
    ],
)
def test_an_admission_that_cannot_work_is_refused_at_the_start(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^admission\."):
        Admission(**values)
    Admission(max_in_flight=1, deadline=3600)


def test_a_client_that_leaves_while_it_waits_for_room_is_noticed(one: Frontend) -> None:
    async def main() -> None:
        memory = Memory(2 * ALIGNMENT)
        slots = Slots(memory, max_waiters=8)
        one.arena = SimpleNamespace(reserve=slots.reserve)  # type: ignore[assignment]
        part = {"image_url": {"url": "data:image/png;base64," + base64.b64encode(b"picture").decode()}}
        with await slots.reserve([ALIGNMENT], 1), pytest.raises(ClientDisconnect):
            async with asyncio.timeout(20), one._pictures(Request(SCOPE, gone), (ImageRef(part, "image"),), LATER):
                raise AssertionError("there is no room")
        assert slots.waiters == 0
        slots.close()
        memory.close()

    asyncio.run(main())


def test_a_request_without_pictures_asks_for_no_room(one: Frontend) -> None:
    def reserve(*_: Any) -> Any:
        raise AssertionError("there is nothing to keep")

    async def main() -> None:
        one.arena = SimpleNamespace(reserve=reserve)  # type: ignore[assignment]
        async with one._pictures(Request(SCOPE, never), (), LATER) as pictures:
            assert pictures == []

    asyncio.run(main())


CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
PICTURE = {"prompt": "a star"}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat", CHAT),
        ("chat", CHAT | {"stream": True}),
        ("complete", {"prompt": "Hello"}),
        ("embed", {"input": "Hello"}),
        ("generate_images", PICTURE | {"n": 2}),
        ("generate_images", PICTURE | {"stream": True}),
        ("validate", PICTURE | {"n": 2}),
        ("validate", PICTURE | {"stream": True}),
        ("predict", {"instances": ["a text"]}),
    ],
)
def test_a_stage_that_does_not_say_that_the_time_is_up_is_not_waited_for(
    one: Frontend, monkeypatch: pytest.MonkeyPatch, route: str, body: dict[str, Any]
) -> None:
    """It is left, and the place is free. Stages that do say it: `tests/hardening/test_deadline.py`."""
    monkeypatch.setattr(beside_chat, "LAST_WORD_SECONDS", 0.05)
    one.config = replace(one.config, admission=Admission(deadline=0.05))
    stage: Any = SilentStageDouble()
    one.processor = one.image_worker = one.embed_worker = stage
    more = {"model": "model"} if route == "predict" else {}

    async def sent() -> AsyncGenerator[Message, None]:
        yield {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await asyncio.Event().wait()

    async def main() -> None:
        messages = sent()
        state = {"request_id": "id", "tenant": ""}
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded):
                await getattr(one, route)(Request(SCOPE | {"state": state}, messages.__anext__), **more)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert stage.asked == stage.left == body.get("n", 1)
    assert one.in_flight == 0
    assert one.metrics.statuses == [504]  # type: ignore[attr-defined]


def test_to_ask_who_serves_a_model_takes_of_the_time_that_a_prediction_has(one: Frontend) -> None:
    until: list[float] = []

    class SlowlyNamedDouble(SilentStageDouble):
        def models(self, _: Any) -> Any:
            async def only() -> Any:
                await asyncio.sleep(0.2)
                return SimpleNamespace(names=["model"])

            return SimpleNamespace(only=only)

        def generate(self, message: Any) -> SilentStageDouble:  # type: ignore[override]
            until.append(message.deadline)
            raise NotFound("enough is known")

    async def sent() -> AsyncGenerator[Message, None]:
        yield {"type": "http.request", "body": json.dumps({"instances": [PICTURE]}).encode(), "more_body": False}
        await asyncio.Event().wait()

    async def main() -> None:
        messages = sent()
        state = {"request_id": "id", "tenant": ""}
        with pytest.raises(NotFound, match="enough"):
            await one.predict(Request(SCOPE | {"state": state}, messages.__anext__), model="model")

    one.config = replace(one.config, admission=Admission(deadline=60.0))
    one.image_worker, one.embed_worker = SlowlyNamedDouble(), None  # type: ignore[assignment]
    began = time.time()
    asyncio.run(main())
    assert until[0] <= time.time() - 0.2 + 60.0
    assert until[0] >= began + 60.0


async def replies(count: int, error: Exception | None = None) -> AsyncIterator[HttpReply]:
    for number in range(count):
        yield HttpReply(event=f"data: {number}\n\n")
    if error is not None:
        raise error


async def answer(
    one: Frontend, receive: Any, call: AsyncIterator[Any], streamed: Callable[..., Any] = events
) -> list[Message]:
    """What a stream sends. The request is accounted and admitted until its end."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        await passes(message)
        sent.append(message)

    async with AsyncExitStack() as held:
        account = held.enter_context(one.accounted("id"))
        held.enter_context(one.admitted())
        account.status = 200
        stream = HeldStream(streamed(call, account), held.pop_all())
    assert one.in_flight == 1
    with suppress(ClientDisconnect):  # as `ErrorBoundary` does
        await stream(SCOPE, receive, send)
    return sent


def test_a_reader_that_takes_longer_than_its_request_may_is_not_waited_for(one: Frontend) -> None:
    async def main() -> Account:
        async def taken_by_nobody(_: Message) -> None:
            await asyncio.Event().wait()

        async with AsyncExitStack() as held:
            account = held.enter_context(one.accounted("id"))
            held.enter_context(one.admitted())
            stream = HeldStream(events(replies(2), account), held.pop_all(), seconds=0.05)
        with pytest.raises(ClientDisconnect):
            await stream(SCOPE, never, taken_by_nobody)
        assert one.in_flight == 0
        return account

    assert asyncio.run(main()).status == 499


@pytest.mark.parametrize(
    ("error", "status"), [(None, 200), (StageUnavailable("gone"), 503), (ZeroDivisionError("a defect"), 500)]
)
def test_a_stream_is_counted_and_logged_as_it_ended(
    one: Frontend, caplog: pytest.LogCaptureFixture, error: Exception | None, status: int
) -> None:
    caplog.set_level(logging.INFO, "dynamo_epd.request")
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(answer(one, never, replies(2, error)))
    else:
        sent = asyncio.run(answer(one, never, replies(2, error)))
        body = b"".join(message.get("body", b"") for message in sent)
        assert body.startswith(b"data: 0\n\ndata: 1\n\n")
        assert (b'"stage_unavailable"' in body) == (error is not None)
    assert one.metrics.statuses == [status]  # type: ignore[attr-defined]
    assert [record.getMessage().split()[:2] for record in caplog.records] == [["id", str(status)]]
    assert one.in_flight == 0


def test_what_came_with_the_status_is_sent_first(one: Frontend) -> None:
    sent = asyncio.run(answer(one, never, replies(1), lambda call, account: events(call, account, "data: first\n\n")))
    assert b"".join(message.get("body", b"") for message in sent) == b"data: first\n\ndata: 0\n\n"


def test_a_client_that_leaves_before_the_first_byte_gives_its_place_back(
    one: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dynamo_epd.request")
    assert asyncio.run(answer(one, gone, replies(2))) == []
    assert one.in_flight == 0
    assert "id 499 " in caplog.text


HANDLE = Handle("namespace/ImageWorker/1", "incarnation", "lease", 0, 4, (4,), "bytes", "", 0.0, ends_on_read=True)


async def reads(_: Generated) -> bytes:
    return b"file"


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", ["events", "_image_events", "_validation_events"])
def test_a_client_that_leaves_in_mid_stream_gives_its_place_back(
    one: Frontend, caplog: pytest.LogCaptureFixture, kind: str, waits: bool
) -> None:
    """While it is sent to, and while there is nothing to send."""
    caplog.set_level(logging.INFO, "dynamo_epd.request")
    front: Any = one
    front._file = reads
    wanted, message = SimpleNamespace(format="png", quality=None), SimpleNamespace(picture=SimpleNamespace(seed=1))
    reply, streamed = {
        "events": (HttpReply(event="data: x\n\n"), events),
        "_image_events": (
            Generated(1, 2, 8, 8, HANDLE),
            lambda call, account: front._image_events(call, wanted, account),
        ),
        "_validation_events": (
            Validated(Stage("caption", 0.0, 0.0), caption="x"),
            lambda call, account: front._validation_events(None, call, message, None, account),
        ),
    }[kind]

    async def endless() -> AsyncGenerator[Any, None]:
        while True:
            yield reply
            if waits:
                await asyncio.Event().wait()

    async def soon() -> Message:
        await asyncio.sleep(0.05)
        return await gone()

    assert len(asyncio.run(answer(one, soon, endless(), streamed))) > 1
    assert one.in_flight == 0
    assert one.metrics.statuses == [499]  # type: ignore[attr-defined]
    assert "id 499 " in caplog.text


def test_many_who_ask_for_health_are_one_question_and_its_answer_is_kept(one: Frontend) -> None:
    async def main() -> None:
        processor = ProcessorDouble()
        one.processor, one.embed_worker, one.image_worker = processor, None, None
        asked = [asyncio.create_task(one.health()) for _ in range(50)]
        await asyncio.sleep(0.01)
        processor.go.set()
        answers = [json.loads(bytes((await task).body)) for task in asked]
        stages = {"Frontend": 1, "Processor": 1, "DecodeWorker": 1}
        assert answers == [{"status": "ready", "stages": stages}] * 50
        assert processor.asked == 1
        one._looked += 60  # nothing is asked while an answer is young, ...
        assert (await one.health()).status_code == 200
        assert processor.asked == 1
        one._looked -= 120  # ... and again when it is not
        await one.health()
        assert processor.asked == 2

    asyncio.run(main())


def test_a_graph_without_a_chat_chain_is_ready_once_every_stage_is_there(one: Frontend) -> None:
    async def main() -> None:
        embed, image = StageDouble("EmbedWorker", 2), StageDouble("ImageWorker", 0)
        one.processor, one.embed_worker, one.image_worker = None, embed, image

        async def health() -> tuple[int, Any]:
            one._looked = -math.inf
            reply = await one.health()
            return reply.status_code, json.loads(bytes(reply.body))

        stages = {"Frontend": 1, "EmbedWorker": 2, "ImageWorker": 0}
        assert await health() == (503, {"status": "unavailable", "stages": stages})
        image.workers = 1
        assert await health() == (200, {"status": "ready", "stages": stages | {"ImageWorker": 1}})
        one.image_worker = None
        assert await health() == (200, {"status": "ready", "stages": {"Frontend": 1, "EmbedWorker": 2}})
        models = json.loads(bytes((await one.models()).body))
        assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["model of EmbedWorker"])
        for route in (one.chat, one.complete):
            with pytest.raises(NotFound, match="this graph has no chat model"):
                await route(Request(SCOPE, never))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("linked", "tabs"),
    [
        ("processor", ["chat"]),
        ("image_worker embed_worker", ["gallery"]),
        ("processor image_worker", ["chat", "gallery"]),
        ("processor image_worker embed_worker", ["validate", "chat", "gallery"]),
        ("embed_worker", []),
    ],
)
def test_the_page_has_the_tabs_for_which_there_are_stages(linked: str, tabs: list[str]) -> None:
    stages = {name: name in linked.split() for name in ("processor", "image_worker", "embed_worker")}
    assert Frontend._tabs(SimpleNamespace(**stages)) == tabs  # type: ignore[arg-type]
