# SPDX-License-Identifier: Apache-2.0
"""How the long runs judge what they see: a run whose judge is lenient proves nothing."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from tests.hardening import load as load_module
from tests.hardening import report as report_module
from tests.hardening.chaos import KILLS_A_MINUTE, enough
from tests.hardening.load import (
    CANDIDATES,
    KINDS,
    NATS,
    QUESTIONS,
    RETRIES,
    STAGES,
    STANDS_STILL,
    Answers,
    CutOff,
    ErrorEvent,
    Fault,
    Fresh,
    Kind,
    Load,
    Seen,
    SilentEnd,
    client_of,
    numbers_of,
    outcome_of,
    streamed_chat,
    told_apart,
)
from tests.hardening.report import Clock, Report


def came_of(seen: Seen, ask: Callable[[], str]) -> str:
    kind = Kind("streamed chat", STAGES, lambda client, number: ask())
    client: Any = None
    return outcome_of(kind, client, 0, "a red star", seen)


def raising(error: BaseException) -> Callable[[], str]:
    def ask() -> str:
        raise error

    return ask


@pytest.mark.parametrize(
    ("ask", "outcome"),
    [
        (lambda: "a red star", "right"),
        (lambda: "a blue star", "wrong"),
        (lambda: "", "wrong"),
        (raising(SilentEnd()), "silent end"),
        (raising(CutOff()), "silent end"),
        (raising(ErrorEvent("a worker was lost")), "failed (error event: a worker was lost)"),
        (raising(openai.OpenAIError("no")), "failed (OpenAIError: no)"),
        (raising(KeyError("choices")), "failed (KeyError: 'choices')"),
    ],
)
def test_each_outcome_has_its_name(ask: Callable[[], str], outcome: str) -> None:
    assert came_of(Seen(), ask) == outcome


def test_a_stream_that_is_cut_off_is_no_silent_end_where_its_frontend_was_lost() -> None:
    seen, now = Seen(), time.monotonic()
    seen.faults += [Fault("kill", "Processor", now + 9), Fault("stop", "Frontend", now - 2 * STANDS_STILL)]
    seen.faults.append(Fault("kill", "Frontend", now - 5))
    assert came_of(seen, raising(CutOff())) == "silent end", "who was killed before it began did not cut it"
    seen.faults.append(Fault("stop", "Frontend", now - 5))
    assert came_of(seen, raising(CutOff())) == "failed (cut off with its frontend)"


@pytest.mark.parametrize(
    ("what", "stage", "after", "explained"),
    [
        ("kill", "Processor", 1.0, True),
        ("kill", "Frontend", 1.0, True),
        ("kill", NATS, -1.0, True),
        ("cut", NATS, -1.0, True),
        ("stop", "Processor", -5.0, True),
        ("kill", "Processor", -1.0, False),
        ("stop", "Processor", -2 * STANDS_STILL, False),
        ("kill", "DecodeWorker", 1.0, False),
        ("kill", "PrefillWorker", 1.0, False),
    ],
)
def test_a_stream_may_end_only_with_what_it_cannot_go_on_without(
    what: str, stage: str, after: float, explained: bool
) -> None:
    seen = Seen()
    seen.faults.append(Fault(what, stage, time.monotonic() + after))
    assert came_of(seen, raising(ErrorEvent("a worker was lost"))) == "failed (error event: a worker was lost)"
    assert (not seen.unexplained) is explained


def test_a_stage_is_back_with_the_first_request_that_began_later_crossed_it_and_was_right() -> None:
    seen, now = Seen(), time.monotonic()
    chat, embedding = KINDS[0], KINDS[4]
    seen.faults += [Fault("kill", "DecodeWorker", now), Fault("kill", NATS, now)]
    for kind, outcome, began in (
        (chat, "right", now - 1),
        (chat, "wrong", now + 1),
        (chat, "failed (503)", now + 1),
    ):
        seen.note("patient", kind, outcome, began)
    assert [one.recovered for one in seen.faults] == [None, None]
    seen.note("patient", embedding, "right", now + 1)
    assert seen.faults[0].recovered is None, "it does not cross that stage"
    assert seen.faults[1].recovered is not None, "everything crosses NATS"
    seen.note("patient", chat, "right", now + 1)
    assert seen.faults[0].recovered is not None
    assert len(seen.said) == 2


def test_enough_is_every_stage_and_nats_too() -> None:
    minutes = 30

    def killed(**of: int) -> Seen:
        seen = Seen()
        seen.faults = [Fault("kill", stage, 0.0) for stage, count in of.items() for _ in range(count)]
        return seen

    even = dict.fromkeys(STAGES, int(KILLS_A_MINUTE * minutes) // len(STAGES) + 1)
    assert enough(killed(**even, nats=10), minutes)
    assert not enough(killed(**even, nats=9), minutes)
    assert not enough(killed(**even | {"DecodeWorker": 1, "EmbedWorker": 40}, nats=10), minutes)
    assert not enough(killed(**even | {"DecodeWorker": 9}, nats=10), minutes), "99 kills"
    stopped = killed(**even, nats=10)
    stopped.faults[-1].what = "cut"
    assert not enough(stopped, minutes), "a NATS that stood still was not restarted"


def test_a_report_is_written_though_its_run_breaks_off(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "DIRECTORY", tmp_path)
    monkeypatch.setattr(report_module, "ROOT", tmp_path)

    def break_off() -> None:
        with Report("try", seed=7) as report:
            assert report.goal("one", True, {"a": ("tuple",)})
            assert not report.goal("two", False)
            assert report.missed == ["two: NOT MET"]
            report.note(found=3)
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError):
        break_off()
    whole = json.loads((tmp_path / "try.json").read_text())
    assert [one["met"] for one in whole["goals"]] == [True, False]
    assert (whole["seed"], whole["found"], whole["error"]) == (7, 3, "ZeroDivisionError: a defect")
    assert "two: NOT MET" in (tmp_path / "try.log").read_text()


def test_a_clock_tells_when_its_process_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "USUAL", -1.0)  # as if every turn came late
    with Clock() as clock:
        end = time.monotonic() + 20
        while not clock.late() and time.monotonic() < end:
            time.sleep(0.01)
    assert clock.late() > 0


NOWHERE: Any = SimpleNamespace(url="http://127.0.0.1:9")
"""A graph that nobody asks."""
WORD = b'data: {"choices": [{"delta": {"content": "red"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "a worker was lost"}}\n\n'
WHOLE, BROKEN, REFUSED = "whole", "broken", "refused"


@contextmanager
def streams(*replies: tuple[bytes, str]) -> Iterator[tuple[Any, list[Any]]]:
    """A graph that gives these replies, one after the other, and the bodies that it was asked with."""
    left, asked = iter(replies), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            body, how = next(left)
            self.send_response(503 if how == REFUSED else 200)
            self.send_header("retry-after-ms", "1")
            self.send_header("content-length", str(len(body) + (how == BROKEN)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = how == BROKEN

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.daemon_threads = True
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}"), asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("body", "how", "raised"),
    [
        (WORD + ERROR, WHOLE, ErrorEvent),
        (WORD, WHOLE, SilentEnd),
        (WORD, BROKEN, CutOff),
        (WORD + b'data: {"choices"', BROKEN, CutOff),
        (b"{}", REFUSED, openai.InternalServerError),
    ],
)
def test_what_becomes_of_a_stream_is_told(body: bytes, how: str, raised: type[Exception]) -> None:
    with streams((body, how)) as (graph, _), client_of(graph, retries=0) as client, pytest.raises(raised):
        streamed_chat(client, 0)


def test_the_openai_client_asks_again_until_a_stream_begins() -> None:
    replies = [(b"{}", REFUSED)] * RETRIES + [(WORD + WORD + DONE, WHOLE)]
    with streams(*replies) as (graph, asked), client_of(graph, RETRIES) as client:
        assert streamed_chat(client, 0) == "redred"
    assert [one["stream"] for one in asked] == [True] * (RETRIES + 1)


STREAM = KINDS[1]
RIGHT: Answers = {(STREAM.name, 0): "red"}


@pytest.mark.parametrize(
    ("patient", "errors", "outcome", "again"),
    [
        (True, 1, "right", 1),
        (True, RETRIES, "right", RETRIES),
        (True, RETRIES + 1, "failed (error event: a worker was lost)", RETRIES),
        (False, 1, "failed (error event: a worker was lost)", 0),
    ],
)
def test_a_patient_user_asks_again_for_a_stream_that_broke_off(
    patient: bool, errors: int, outcome: str, again: int
) -> None:
    seen = Seen()
    with streams(*[(WORD + ERROR, WHOLE)] * errors, (WORD + DONE, WHOLE)) as (graph, _):
        assert Load(graph, RIGHT, seen, patient, "seed", [STREAM]).asked(STREAM, 0)[0] == outcome
    assert seen.again.total() == again
    assert not seen.outcomes, "what came of it in the end is one outcome, by whoever notes it"


def test_a_patient_user_does_not_ask_again_after_a_silent_end() -> None:
    seen = Seen()
    with streams((WORD, WHOLE)) as (graph, asked):
        assert Load(graph, RIGHT, seen, True, "seed", [STREAM]).asked(STREAM, 0)[0] == "silent end"
    assert (len(asked), seen.again.total()) == (1, 0)


def saying(*answers: str) -> Kind:
    """A kind without tokens that is answered so, one after the other."""
    left = iter(answers)
    return Kind("image", STAGES, lambda client, number: next(left))


def test_what_is_new_is_right_if_it_is_answered_twice_alike() -> None:
    seen = Seen()
    fresh = Fresh(NOWHERE, seen, 7)
    assert fresh.asked(saying("red", "red"), 0) == "right"
    assert fresh.asked(saying("red", "blue"), 0) == "wrong"
    assert [(one["got"], one["expected"]) for one in seen.wrong] == [("blue", "red")]
    assert fresh.asked(Kind("image", STAGES, lambda client, number: raising(SilentEnd())()), 0) == "silent end"


@pytest.mark.parametrize(
    ("decided", "outcome"),
    [(lambda *_: True, "wrong"), (lambda *_: False, "right"), (lambda *_: raising(KeyError("choices"))(), "wrong")],
    ids=["decided", "undecided", "nobody says"],
)
def test_a_chat_may_differ_only_where_the_model_is_undecided(
    decided: Callable[..., bool], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "decided", decided)
    answers = iter(["red", "blue"])
    chat = Kind("chat", STAGES, lambda client, number: next(answers), tokens=4)
    assert Fresh(NOWHERE, Seen(), 7).asked(chat, 0) == outcome


NOBODY: Any = None


def test_questions_are_told_apart() -> None:
    """The model says the same of the pictures 1 and 2: the second one is passed over."""
    said = Kind("chat", STAGES, lambda client, number: "the same" if number in (1, 2) else f"{number}", tokens=4)
    made = Kind("image", STAGES, lambda client, number: f"picture {number}")
    answers = told_apart(NOBODY, range(CANDIDATES), [said, made])
    assert len(numbers_of(answers)) == QUESTIONS
    assert 1 in numbers_of(answers)
    assert 2 not in numbers_of(answers)
    for kind in (said, made):
        assert len({answer for (name, _), answer in answers.items() if name == kind.name}) == QUESTIONS


def test_two_pictures_that_are_alike_are_no_answers() -> None:
    made = Kind("image", STAGES, lambda client, number: "the same" if number in (1, 3) else f"{number}")
    with pytest.raises(AssertionError, match="image 1 and 3 have the same answer, 'the same'"):
        told_apart(NOBODY, range(CANDIDATES), [made])


def test_a_model_that_always_says_the_same_has_no_questions() -> None:
    said = Kind("chat", STAGES, lambda client, number: "a star", tokens=4)
    with pytest.raises(AssertionError, match=re.escape("chat 0 and 1 have the same answer, 'a star'")):
        told_apart(NOBODY, range(CANDIDATES), [said])
