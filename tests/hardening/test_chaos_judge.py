# SPDX-License-Identifier: Apache-2.0
"""Each goal of `chaos` is missed by a run that is broken in that alone, and a good run meets them all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.hardening import chaos
from tests.hardening import report as report_module
from tests.hardening.chaos import (
    KILLS_A_MINUTE,
    MORE_DESCRIPTORS,
    MORE_FILES,
    MORE_THREADS,
    NATS_RECOVERED,
    RECOVERED_WITHIN,
    TOO_LATE,
    Faults,
    Keeping,
    Kept,
    judge,
    judge_rest,
    leaked,
    restarts_wanted,
)
from tests.hardening.load import NATS, STAGES, Fault, Seen
from tests.hardening.report import Report

MINUTES = 30
ENDED = MINUTES * 60.0
"""Seconds after the beginning, which is 0 here."""
EACH = int(KILLS_A_MINUTE * MINUTES) // len(STAGES) + 1
"""Kills of each stage."""
ASKED = 1000
"""By each kind of client."""


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Report]:
    monkeypatch.setattr(report_module, "DIRECTORY", tmp_path)
    monkeypatch.setattr(report_module, "ROOT", tmp_path)
    with Report("judged") as one:
        yield one


def good() -> Seen:
    seen = Seen(began=0.0)
    for who in ("patient", "impatient", "fresh", "prober"):
        seen.outcomes[who, "right"] = ASKED
    stages = [*STAGES * EACH, *[NATS] * restarts_wanted(MINUTES)]
    seen.faults = [Fault("kill", stage, 1.0 + turn, 1.5 + turn) for turn, stage in enumerate(stages)]
    return seen


def of(seen: Seen, *stages: str) -> list[Fault]:
    return [fault for fault in seen.faults if fault.stage in stages]


def kills_too_few(seen: Seen) -> None:
    for fault in of(seen, "DecodeWorker")[1:]:
        seen.faults.remove(fault)


def answers_wrongly(seen: Seen) -> None:
    seen.outcomes["prober", "wrong"] = 1


def repeats_itself_wrongly(seen: Seen) -> None:
    seen.outcomes["fresh", "wrong"] = 1


def ends_in_silence(seen: Seen) -> None:
    seen.outcomes["impatient", "silent end"] = 1


def breaks_a_stream_off(seen: Seen) -> None:
    seen.unexplained.append("a worker was lost")


def fails_a_patient_one(seen: Seen) -> None:
    seen.outcomes["patient", "failed (503)"] = 1


def has_no_patient_one(seen: Seen) -> None:
    del seen.outcomes["patient", "right"]


def fails_others(seen: Seen) -> None:
    seen.outcomes["impatient", "failed (503)"] = ASKED // 30


def fails_what_is_new(seen: Seen) -> None:
    seen.outcomes["fresh", "failed (503)"] = ASKED // 30


def recovers_slowly(seen: Seen) -> None:
    for fault in of(seen, *STAGES)[:2]:  # of 105: the second slowest is the 99th percentile
        fault.recovered = fault.at + RECOVERED_WITHIN + 0.1


def recovers_never(seen: Seen) -> None:
    for fault in of(seen, *STAGES)[:2]:
        fault.recovered = None


def restarts_slowly(seen: Seen) -> None:
    of(seen, NATS)[0].recovered = of(seen, NATS)[0].at + NATS_RECOVERED + 0.1


def restarts_never(seen: Seen) -> None:
    of(seen, NATS)[0].recovered = None


def judged(report: Report, seen: Seen) -> list[str]:
    judge(report, seen, MINUTES, ENDED)
    return report.missed


def test_a_good_run_meets_every_goal(report: Report) -> None:
    assert judged(report, good()) == []


@pytest.mark.parametrize(
    ("breaks", "goal"),
    [
        (kills_too_few, "enough was killed"),
        (answers_wrongly, "no answer is wrong"),
        (repeats_itself_wrongly, "no answer is wrong"),
        (ends_in_silence, "no stream ends in silence"),
        (breaks_a_stream_off, "no stream breaks off"),
        (fails_a_patient_one, "no request fails behind two retries"),
        (has_no_patient_one, "no request fails behind two retries"),
        (fails_others, "99% come without retries"),
        (fails_what_is_new, "99% come without retries"),
        (recovers_slowly, "from a kill to the next success"),
        (recovers_never, "from a kill to the next success"),
        (restarts_slowly, "NATS is started again"),
        (restarts_never, "NATS is started again"),
    ],
)
def test_what_breaks_one_goal_misses_that_one(report: Report, breaks: Callable[[Seen], None], goal: str) -> None:
    seen = good()
    breaks(seen)
    (missed,) = judged(report, seen)
    assert missed.startswith(goal)


def test_a_run_that_saw_nothing_meets_hardly_a_goal(report: Report) -> None:
    assert len(judged(report, Seen(began=0.0))) == 6, "but that no stream broke off"


def test_whoever_was_killed_just_before_the_end_need_not_have_been_asked_again(report: Report) -> None:
    seen = good()
    late = ENDED - TOO_LATE + 1
    seen.faults += [Fault("kill", stage, late) for stage in (*STAGES, NATS)]
    assert judged(report, seen) == []


def test_streams_that_were_asked_for_again_are_counted_beside_the_outcomes(report: Report) -> None:
    seen = good()
    seen.again["streamed chat: failed (error event)"] = 3
    assert judged(report, seen) == []
    assert report._found["asked_again"] == {"streamed chat: failed (error event)": 3}


WAS = Kept(descriptors=50, threads=20)


@pytest.mark.parametrize(
    ("descriptors", "threads", "files", "said"),
    [
        (MORE_DESCRIPTORS, MORE_THREADS, MORE_FILES, []),
        (-10, -10, -10, []),
        (MORE_DESCRIPTORS + 1, 0, 0, ["one: 50 → 83 descriptors"]),
        (0, MORE_THREADS + 1, 0, ["one: 20 → 37 threads"]),
        (0, 0, MORE_FILES + 1, ["11 more files in /dev/shm"]),
    ],
)
def test_what_is_beyond_its_allowance_has_leaked(descriptors: int, threads: int, files: int, said: list[str]) -> None:
    now = Kept(WAS.descriptors + descriptors, WAS.threads + threads)
    assert leaked({"one": (WAS, now)}, files) == said


@pytest.mark.parametrize(
    ("stages", "held", "throughout", "goal"),
    [
        (STAGES, "", {"supervisor": (WAS, WAS)}, None),
        (STAGES[1:], "", {"supervisor": (WAS, WAS)}, "every stage comes back whole"),
        (STAGES, "a lease", {"supervisor": (WAS, WAS)}, "nothing is held"),
        (STAGES, "", {"supervisor": (WAS, Kept(500, 20))}, "nothing leaks"),
        (STAGES, "", {}, "nothing leaks"),  # the supervisor at least is never killed
    ],
)
def test_what_is_left_misses_its_own_goal(
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    stages: tuple[str, ...],
    held: str,
    throughout: dict[str, tuple[Kept, Kept]],
    goal: str | None,
) -> None:
    monkeypatch.setattr(chaos, "whole", lambda graph: set(stages))
    monkeypatch.setattr(chaos, "BACK", 0.0)
    monkeypatch.setattr(chaos, "held_at_the_end", lambda *_: held)
    monkeypatch.setattr(chaos, "shared_files", lambda: {"one"})
    graph: Any = None
    keeping: Any = SimpleNamespace(files={"one"}, throughout=lambda: throughout)
    judge_rest(graph, report, keeping)
    assert [one.startswith(goal or "-") for one in report.missed] == [True] * bool(goal)


class ProcessDouble(psutil.Process):
    """This one, as if it kept so much."""

    descriptors = 0

    def num_fds(self) -> int:
        return self.descriptors

    def num_threads(self) -> int:
        return 3


def test_a_process_is_compared_with_the_most_that_it_had_in_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, supervisor, late = [0.0], ProcessDouble(), ProcessDouble(os.getppid())
    there: list[ProcessDouble] = [supervisor]
    monkeypatch.setattr(chaos.time, "monotonic", lambda: now[0])
    graph: Any = SimpleNamespace(tree=lambda: there, workers=lambda stage: {}, process=supervisor)
    keeping = Keeping(graph, seconds=60.0)
    for at, count in ((30.0, 70), (60.0, 55), (90.0, 200)):
        now[0], supervisor.descriptors = at, count
        keeping.look()
        there[1:] = [late]
    now[0] = 100.0
    was, is_now = Kept(70, 3), Kept(200, 3)
    assert keeping.throughout() == {f"supervisor ({os.getpid()})": (was, is_now)}, "the other one is too young"


def test_only_what_was_done_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, nobody, sent = Seen(), [False], []
    graph: Any = None
    faults = Faults(graph, seen, seed=7)

    def kill(pid: int, number: int) -> None:
        assert seen.lock.locked() or number == signal.SIGCONT, "somebody sees what comes of it, and no fault"
        sent.append(number)
        if nobody[0]:
            raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    faults._kill(1, "DecodeWorker")
    faults._stop(1, NATS, "cut", 0.0)
    assert [(one.what, one.stage) for one in seen.faults] == [("kill", "DecodeWorker"), ("cut", NATS)]
    nobody[0] = True
    faults._kill(1, "DecodeWorker")
    faults._stop(1, "DecodeWorker", "stop", 60.0)
    assert sent == [signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL, signal.SIGSTOP]
    assert len(seen.faults) == 2
