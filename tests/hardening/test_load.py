# SPDX-License-Identifier: Apache-2.0
"""How the long runs judge what they see: a run whose judge is lenient proves nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.hardening import report as report_module
from tests.hardening.chaos import KILLS_A_MINUTE, enough
from tests.hardening.load import (
    KINDS,
    NATS,
    STAGES,
    STANDS_STILL,
    CutOff,
    Fault,
    Kind,
    Seen,
    SilentEnd,
    outcome_of,
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
        (raising(openai.OpenAIError("error event")), "failed (OpenAIError: error event)"),
        (raising(KeyError("choices")), "failed (KeyError: 'choices')"),
    ],
)
def test_each_outcome_has_its_name(ask: Callable[[], str], outcome: str) -> None:
    assert came_of(Seen(), ask) == outcome


def test_a_stream_that_is_cut_off_is_no_silent_end_where_its_frontend_was_lost() -> None:
    seen, now = Seen(), time.monotonic()
    seen.faults += [Fault("kill", "Processor", now), Fault("kill", "Frontend", now - 2 * STANDS_STILL)]
    assert came_of(seen, raising(CutOff())) == "silent end"
    seen.faults.append(Fault("stop", "Frontend", now))
    assert came_of(seen, raising(CutOff())) == "failed (cut off with its frontend)"


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
