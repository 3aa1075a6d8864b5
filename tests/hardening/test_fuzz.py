# SPDX-License-Identifier: Apache-2.0
"""A few hundred fuzzed bodies; `tests/acceptance/test_fuzz.py` sends 20 000, and the disaggregated graph 4 000."""

from __future__ import annotations

import re

import pytest

from tests.document import document
from tests.hardening.edge import CHAT, COMPLETIONS, Door, Reply
from tests.hardening.fuzz import RIGHT, Drawn, Fuzzer, document_of, judged, narrowed, shots

COUNT = 300
SEED = 7
PORT = 54321


@pytest.mark.usefixtures("unharmed")
def test_no_body_breaks_anything(door: Door) -> None:
    drawn = shots(COUNT, SEED, document_of(door.graph.url), door.canary.port)
    report = Fuzzer(door.graph.url, door.neighbour.asks).run(drawn)
    print(report)
    assert not report.faults, "\n".join(report.faults[:10])
    assert sum(report.statuses.values()) == COUNT
    assert report.statuses[400] > COUNT / 4 and report.statuses[200] > COUNT / 50, report


def test_a_seed_gives_the_same_bodies_again() -> None:
    first, again, other = (list(shots(50, number, document(), PORT)) for number in (3, 3, 4))
    assert first == again != other


def test_every_path_that_takes_a_post_is_shot_at() -> None:
    whole = document()
    posted = {path for path, operations in whole["paths"].items() if "post" in operations}
    drawn = Drawn(whole, PORT)
    assert drawn.paths == posted
    assert set(RIGHT) == {one for some in drawn.right.values() for one in some}
    found = list(shots(400, SEED, whole, PORT))
    hit = {path for path in posted for shot in found if re.fullmatch(pattern(path), shot.path.partition("?")[0])}
    assert hit == posted
    assert sum(str(PORT).encode() in shot.body for shot in found) > 40, "the canary's port is in many"


def test_of_a_narrowed_document_no_other_path_is_shot_at() -> None:
    found = list(shots(50, SEED, narrowed(document(), CHAT.path, COMPLETIONS.path), PORT))
    assert {shot.path for shot in found} == {CHAT.path, COMPLETIONS.path}


def pattern(path: str) -> str:
    """Of the paths that a template stands for."""
    return re.sub(r"\\\{\w+\\\}", "[^/]*", re.escape(path))


def stream(*lines: str) -> Reply:
    body = "".join(f"{line}\n\n" for line in lines).encode()
    return Reply(200, {"content-type": "text/event-stream; charset=utf-8"}, body, 0.1)


def answer(status: int, body: bytes) -> Reply:
    return Reply(status, {"content-type": "application/json"}, body, 0.1)


def said(kind: str, code: str) -> str:
    return f'{{"error": {{"message": "no", "type": "{kind}", "param": null, "code": "{code}"}}}}'


CHUNK = 'data: {"id": "x", "choices": []}'
DONE = "data: [DONE]"
REFUSED = "data: " + said("invalid_request_error", "invalid_image")
SOUND = {
    "an answer": answer(200, b'{"choices": []}'),
    "a job": answer(202, b'{"id": "job-1"}'),
    "a refusal": answer(400, said("invalid_request_error", "invalid_json").encode()),
    "a stream": stream(CHUNK, CHUNK, DONE),
    "a stream of a picture": stream('event: image_generation.completed\ndata: {"type": "image_generation.completed"}'),
    "a stream of stages": stream('data: {"type": "validation.image"}', 'data: {"type": "validation.similarity"}'),
    "a stream that ends in a refusal": stream(CHUNK, REFUSED),
    "a stream that ends in a full queue": stream("data: " + said("overloaded_error", "overloaded")),
}
UNSOUND = {
    "an internal error": answer(500, said("internal_error", "internal_error").encode()),
    "an answer that is none": answer(200, b"<html>"),
    "an answer with an error": answer(200, said("invalid_request_error", "invalid_json").encode()),
    "a refusal that is none": answer(400, b'{"detail": "no"}'),
    "an empty stream": stream(),
    "a stream without its end": stream(CHUNK, CHUNK),
    "a stream that breaks off within an event": Reply(200, stream().headers, b'data: {"id"', 0.1),
    "a stream of stages without its last": stream('data: {"type": "validation.image"}'),
    "a stream that goes on after an error": stream(REFUSED, CHUNK, DONE),
    "an error before the end": stream(CHUNK, REFUSED, DONE),
    "an internal error in a stream": stream(CHUNK, "data: " + said("internal_error", "internal_error")),
    "a lost stage in a stream": stream(CHUNK, "data: " + said("service_unavailable", "stage_unavailable")),
    "a deadline in a stream": stream(CHUNK, "data: " + said("timeout_error", "deadline_exceeded")),
    "an event that is no JSON": stream("data: nothing", DONE),
    "an error of another form in a stream": stream(CHUNK, 'data: {"error": "no"}'),
}


@pytest.mark.parametrize("reply", SOUND.values(), ids=SOUND)
def test_a_sound_reply_is_no_fault(reply: Reply) -> None:
    assert judged(reply) is None


@pytest.mark.parametrize("reply", UNSOUND.values(), ids=UNSOUND)
def test_anything_else_is_a_fault(reply: Reply) -> None:
    assert judged(reply)
