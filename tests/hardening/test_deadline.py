# SPDX-License-Identifier: Apache-2.0
"""The time that a request has (`admission.deadline`), at every entry: who has no answer by then is told so, and what
the request held is free.

All that is asked here takes far longer on any machine: answers of thousands of tokens, captions that wait for a slot
which such an answer has, pictures of a thousand steps, two thousand texts, a picture on a server that is silent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import pytest

from tests.hardening.edge import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    IMAGES,
    PREDICT,
    PREDICT_TEXT,
    SHORT,
    STAR,
    VALIDATIONS,
    Entry,
    Reply,
    chat_with,
    send,
)
from tests.hardening.report import Clock
from tests.hardening.test_faults import at_work, stopped, who_fetches
from tests.picture_server import silent
from tests.questions import data_url, picture
from tests.serving import Graph, at_rest, eventually, serve, untrained
from tests.test_leaving import GIVEN_BACK

DEADLINE = 5.0
"""Seconds. A stopped worker is missed after half of them."""
LATE = 1.0
"""Seconds after it for the last word, beside those in which this process itself did not run."""
PLACES = 12
"""Of the frontend. All of them are taken after each test: one that is still held would be missed."""
LENGTH, TOKENS = 8192, 8000
SLOTS = 2
"""Of the decode worker. A chat and a completion have them, each until its time is up, which is when that of a
validation is that was asked a moment later: its caption waits for a slot, and then has no time for all it would say."""
PAUSE = 0.02
"""From one question to the next."""
STEPS = 1000
KV_CACHE = "vllm:kv_cache_usage_perc"
TIME_IS_UP = {
    "message": "the request's time is up",
    "type": "timeout_error",
    "param": None,
    "code": "deadline_exceeded",
}

ENDLESS = {"max_tokens": TOKENS, "ignore_eos": True}
SLOW = {"num_inference_steps": STEPS, "size": "128x128"}
LONG_CHAT = CHAT.with_(**chat_with(data_url(picture(120_000)))) | ENDLESS
TEXTS = [f"{STAR} " * 50] * 2048

NEVER_ANSWERED = (
    Entry("a chat", CHAT.path, LONG_CHAT),
    Entry("a completion", COMPLETIONS.path, COMPLETIONS.with_(**ENDLESS)),
    Entry("a validation in its caption", VALIDATIONS.path, VALIDATIONS.body),
    Entry("embeddings", EMBEDDINGS.path, EMBEDDINGS.with_(input=TEXTS)),
    Entry("pictures", IMAGES.path, IMAGES.with_(**SLOW, n=2)),
    Entry("predictions", PREDICT.path, PREDICT.with_(instances=[SHORT | SLOW])),
    Entry("a validation in its picture", VALIDATIONS.path, VALIDATIONS.with_(**SLOW)),
    Entry("a streamed validation in its picture", VALIDATIONS.path, VALIDATIONS.with_(**SLOW, stream=True)),
)
"""Beside these, whatever needs a picture that never comes."""
NEVER_ENDED = {
    Entry("a chat", CHAT.path, LONG_CHAT | {"stream": True}): "chat.completion.chunk",
    Entry("a completion", COMPLETIONS.path, COMPLETIONS.with_(**ENDLESS, stream=True)): "text_completion",
    Entry("a validation in its caption", VALIDATIONS.path, VALIDATIONS.with_(stream=True)): "validation.image",
    Entry("a picture", IMAGES.path, IMAGES.with_(**SLOW, stream=True)): None,
}
"""Streams, and what each has said when its time is up: of a picture's steps nothing is told."""
ANSWERED = (CHAT, COMPLETIONS, EMBEDDINGS, IMAGES, PREDICT, PREDICT_TEXT)
"""No validation, whose caption would take too long again: each of its stages is asked."""


@pytest.fixture(scope="module")
def graph() -> Iterator[Graph]:
    """Two workers of those stages of which one is stopped. A fetch has longer than a request."""
    with serve(
        "graphs.cova:Frontend",
        "configs/tiny-cova.yaml",
        f"--Common.max-model-len={LENGTH}",
        "--Common.media.allow-private=true",
        f"--Common.media.timeout={4 * DEADLINE}",
        f"--Frontend.admission.deadline={DEADLINE}",
        f"--Frontend.admission.max-in-flight={PLACES}",
        f"--Processor.validation.max-tokens={TOKENS}",
        f"--DecodeWorker.max-num-seqs={SLOTS}",
        f"--ImageWorker.max-steps={STEPS}",
        "--EncodeWorker.ServiceArgs.workers=2",
        "--ImageWorker.ServiceArgs.workers=2",
        model=untrained("llava"),
    ) as served:
        yield served


@pytest.fixture(autouse=True)
def free_again(graph: Graph) -> Iterator[None]:
    """After each test nothing is held, and every place is free for somebody who is answered."""
    before = graph.all_workers()
    yield
    at_rest(graph, GIVEN_BACK)
    eventually(lambda: not kv_blocks(graph), "no KV block is held", GIVEN_BACK)
    replies = at_once(graph, islice(cycle(ANSWERED), PLACES))
    assert [one.status for one in replies] == [200] * PLACES, [one.body[:300] for one in replies]
    assert graph.all_workers() == before


def kv_blocks(graph: Graph) -> float:
    """The share of the engines' KV caches that is in use."""
    return sum(graph.metrics(stage).total(KV_CACHE) for stage in ("PrefillWorker", "DecodeWorker"))


def at_once(graph: Graph, entries: Iterable[Entry]) -> list[Reply]:
    """In order, one after the other begun."""
    asked = list(entries)

    def ask(turn: int, entry: Entry) -> Reply:
        time.sleep(turn * PAUSE)
        return send(graph, "POST", entry.path, entry.body)

    with ThreadPoolExecutor(len(asked)) as clients:
        return list(clients.map(ask, range(len(asked)), asked))


def describing(url: str) -> Entry:
    return Entry("a chat whose picture never comes", CHAT.path, chat_with(url))


def in_time(reply: Reply, clock: Clock, name: str) -> None:
    print(f"{name}: {reply.status} and {len(events(reply))} events, its end after {reply.seconds:.2f} s")
    assert reply.seconds < DEADLINE + LATE + clock.late(), f"{name} after {reply.seconds:.2f} s"


def refused_in_time(reply: Reply, clock: Clock, name: str) -> None:
    """Fails unless this is the 504 of a request whose time is up, and came when it was."""
    assert reply.status == 504, f"{name}: {reply.status} {reply.body[:300]!r}"
    assert reply.headers["content-type"] == "application/json", name
    assert json.loads(reply.body) == {"error": TIME_IS_UP}, name
    in_time(reply, clock, name)


def events(reply: Reply) -> list[str]:
    lines = reply.body.decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_an_answer_that_is_not_there_in_time_is_a_504_at_every_entry(graph: Graph) -> None:
    """And a stream that has not begun, as any other refusal. Nobody goes on fetching a picture for it."""
    with silent() as (listener, url), Clock() as clock:
        chat = describing(url)
        streamed = Entry(f"{chat.name}, streamed", chat.path, chat.with_(stream=True))
        entries = (*NEVER_ANSWERED, chat, streamed)
        for entry, reply in zip(entries, at_once(graph, entries), strict=True):
            refused_in_time(reply, clock, entry.name)
        for _ in (chat, streamed):
            fetch, _ = listener.accept()
            with fetch:
                fetch.settimeout(GIVEN_BACK)
                while not fetch.recv(4096).endswith(b"\r\n\r\n"):
                    pass
                assert fetch.recv(1) == b""


def test_a_stream_that_is_not_whole_in_time_ends_in_one_error_event(graph: Graph) -> None:
    with Clock() as clock:
        for (entry, kind), reply in zip(NEVER_ENDED.items(), at_once(graph, NEVER_ENDED), strict=True):
            assert reply.status == 200, f"{entry.name}: {reply.body[:300]!r}"
            in_time(reply, clock, entry.name)
            *said, last = events(reply)
            assert "[DONE]" not in (*said, last), entry.name
            assert json.loads(last) == {"error": TIME_IS_UP}, entry.name
            kinds = {one.get("object") or one.get("type") for one in map(json.loads, said)}
            assert kinds == ({kind} if kind else set()), entry.name


def drawn(graph: Graph) -> dict[int, float]:
    """Steps that each image worker has taken."""
    steps = "epd_denoise_step_seconds_count"
    return {index: graph.metrics("ImageWorker", index).total(steps) for index in graph.workers("ImageWorker")}


def test_a_worker_that_is_lost_does_not_begin_the_time_again(graph: Graph) -> None:
    """One that encodes and one that draws are missed when half of it has gone. Others begin anew, and do not get to the
    end of it."""
    before = drawn(graph)
    with silent() as (listener, url), ThreadPoolExecutor(2) as clients, Clock() as clock:
        entries: tuple[Entry, ...] = (describing(url), Entry("a picture", IMAGES.path, IMAGES.with_(**SLOW)))
        asked: list[Any] = [clients.submit(send, graph, "POST", one.path, one.body) for one in entries]
        fetch, (_, port) = listener.accept()
        lost, pid = at_work(graph, "ImageWorker")
        with fetch, stopped(who_fetches(graph, port), pid):
            again, _ = listener.accept()
            with again:
                for entry, reply in zip(entries, asked, strict=True):
                    refused_in_time(reply.result(), clock, entry.name)
    after = drawn(graph)
    assert all(after[index] > before[index] for index in after if index != lost), "nobody else has begun the picture"
