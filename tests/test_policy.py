# SPDX-License-Identifier: Apache-2.0
"""The planner's decision: what it does with a load that it can see, and above all what it leaves alone."""

from __future__ import annotations

import math
import random

import pytest

from dynamo_epd.planning.policy import SETTLE, Decision, Limits, Observed, State, decide, mean_wait, replicas_for


class Stage:
    """A stage that serves each request at once, for ``run`` seconds, and is looked at every second."""

    def __init__(self, limits: Limits, *, replicas: int = 1, run: float = 1.0, seed: int = 1):
        self.limits, self.replicas, self.run = limits, replicas, run
        self.state, self.now, self.random = State(), 0.0, random.Random(seed)
        self.finished = self.queue_seconds = 0.0
        self.decisions: list[tuple[float, Decision]] = []

    def look(self, *, act: bool = True, in_stage: float = 0.0) -> Decision | None:
        observed = Observed(
            self.replicas,
            self.replicas,
            in_stage,
            self.finished,
            self.finished * self.run,
            self.finished,
            self.queue_seconds,
        )
        self.state, decision = decide(self.state, observed, self.now, self.limits)
        if decision is not None:
            self.decisions.append((self.now, decision))
            if act:
                self.replicas = decision.replicas
        return decision

    def _poisson(self, mean: float) -> int:
        count, left = 0, self.random.expovariate(1)
        while left < mean:
            count, left = count + 1, left + self.random.expovariate(1)
        return count

    def steady(self, rate: float, seconds: int, *, poisson: bool = False, queue: float = 0.0) -> None:
        for _ in range(seconds):
            self.now += 1
            done = self._poisson(rate) if poisson else rate
            self.finished += done
            self.queue_seconds += done * queue
            self.look()


def test_erlangs_delay_formula_at_known_points() -> None:
    assert mean_wait(0.5, 1, 2.0) == pytest.approx(2.0)  # M/M/1: rho / (1 - rho) times the service time
    assert mean_wait(2.0, 3, 1.0) == pytest.approx(4 / 9)  # Erlang C(3, 2) = 4/9, over 3 - 2
    assert mean_wait(3.0, 3, 1.0) == math.inf


def test_enough_keeps_headroom_and_queue_target_and_one_less_does_not() -> None:
    limits = Limits(max=100, headroom=0.3, queue_target=0.05)
    for load in (0.3, 1.0, 4.0, 20.0):
        count = replicas_for(load, 1.0, limits)
        assert load / count <= 0.7 + 1e-9 and mean_wait(load, count, 1.0) <= 0.05
        assert load / (count - 1 or 1e-9) > 0.7 or mean_wait(load, count - 1, 1.0) > 0.05
    assert replicas_for(20.0, 1.0, Limits(max=100, concurrency=8, headroom=0.3)) == 4
    assert replicas_for(20.0, 1.0, limits) > 20 / 0.7  # the target asks for more than the headroom


def test_a_stage_without_requests_stays_at_its_minimum() -> None:
    stage = Stage(Limits(cool_down=30))
    stage.steady(0, 200)
    assert stage.decisions == []


def test_a_burst_is_acted_on_at_the_second_look() -> None:
    stage = Stage(Limits(max=40), replicas=5)
    stage.steady(3, 120, poisson=True)
    began, before = stage.now, stage.replicas
    assert before <= 8
    stage.decisions.clear()
    stage.steady(15, 60, poisson=True)
    first, decision = stage.decisions[0]
    assert first - began <= 2 and decision.replicas > before
    assert first - decision.cause <= 1
    assert 21 <= stage.replicas <= 30  # 15 at once, with headroom, and not much more


def test_the_cause_of_a_growth_is_the_last_look_at_which_there_were_enough() -> None:
    """However often it is decided: somebody may not be able to carry it out."""
    stage = Stage(Limits(max=100), replicas=5)
    stage.steady(3, 120)
    assert stage.decisions == []
    last = stage.now
    for _ in range(10):
        stage.now += 1
        stage.finished += 30
        stage.look(act=False)
    assert [one.cause for _, one in stage.decisions] == [last] * len(stage.decisions)
    assert stage.decisions[0][0] == last + 1 and stage.decisions[-1][0] == last + 10
    stage.replicas = 60  # somebody else has seen to it
    stage.steady(30, 100)
    stage.decisions.clear()
    stage.replicas = 2
    stage.steady(30, 1)
    assert [one.cause for _, one in stage.decisions] == [last + 110]


@pytest.mark.parametrize(("in_stage", "patience"), [(0.0, SETTLE), (20.0, SETTLE + 30)])
@pytest.mark.parametrize("changed", [0, 75])
def test_a_growth_for_requests_that_wait_comes_as_soon_as_the_stage_has_settled(
    in_stage: float, patience: float, changed: int
) -> None:
    """That much after its last change, or as soon as they are late by the mean of ten seconds, whichever comes later.
    That is its cause too."""
    stage = Stage(Limits(concurrency=8, queue_target=0.5, catch_up=30, max=40))
    late_at = 0.0
    for second in range(1, 300):
        if second == changed:
            stage.replicas = 2
        stage.now = second
        stage.finished += 1
        waits = 3.0 if second > 80 else 0.0
        stage.queue_seconds += waits
        # by the test's own reckoning
        if not late_at and waits * min(10, second - 80) / 10 > 0.55:
            late_at = second
        if stage.look(act=False, in_stage=in_stage) is not None:
            break
    due = max(late_at, changed + patience)
    ((made, decision),) = stage.decisions
    assert decision.reason.startswith("requests wait")
    assert due <= made <= due + 2
    assert made - 1 <= decision.cause <= made


def test_it_shrinks_only_after_the_cool_down_and_says_since_when() -> None:
    stage = Stage(Limits(max=40, cool_down=100), replicas=5)
    stage.steady(3, 120)
    stage.steady(12, 120)
    high, ended = stage.replicas, stage.now
    stage.steady(3, 95)
    assert stage.replicas == high
    stage.steady(3, 200)
    shrunk = [(at, one) for at, one in stage.decisions if at > ended]
    assert stage.replicas == 5
    assert shrunk[0][0] >= ended + 100
    assert all(at - one.cause <= 1 for at, one in shrunk)


@pytest.mark.parametrize("rate", [0.5, 2.1, 3.5, 7.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_steady_poisson_load_does_not_make_it_flap(rate: float, seed: int) -> None:
    stage = Stage(Limits(max=40), replicas=replicas_for(rate, 1.0, Limits(max=40)) + 1, seed=seed)
    stage.steady(rate, 3600, poisson=True)
    grown = [one.replicas for _, one in stage.decisions]
    turns = sum((b > a) != (c > b) for a, b, c in zip(grown, grown[1:], grown[2:], strict=False))
    assert turns <= 6, stage.decisions  # an hour has twelve cool-downs


def test_limits_hold() -> None:
    stage = Stage(Limits(min=2, max=4, cool_down=10), replicas=3)
    stage.steady(50, 100)
    assert stage.replicas == 4
    stage.steady(0, 200)
    assert stage.replicas == 2


def test_it_never_takes_the_last_worker_and_leaves_a_stage_without_any_alone() -> None:
    stage = Stage(Limits(min=0, cool_down=10), replicas=3)
    stage.steady(1, 30)
    stage.steady(0, 120)
    assert stage.replicas == 1
    stage.replicas = 0  # by hand
    stage.steady(0, 30)
    assert stage.replicas == 0


def test_a_backlog_counts_beside_the_rate() -> None:
    stage = Stage(Limits(max=40, catch_up=10), replicas=5)
    stage.steady(3, 120)
    stage.now += 1
    stage.finished -= 60  # they came within the same minute and are not served yet
    stage.finished += 3
    assert stage.look(in_stage=60.0) is not None
    assert stage.replicas >= 3 + (60 - 5) / 10


def test_jobs_that_nobody_has_taken_are_a_backlog_of_which_a_worker_clears_one_at_a_time() -> None:
    """One job runs, for 5 s, and is all that the stage has: for its load one worker is enough."""

    def looks(jobs: float, concurrency: int = 4) -> Decision | None:
        limits, state, decision = Limits(max=40, concurrency=concurrency, cool_down=10), State(), None
        for second in range(60):
            observed = Observed(2, 2, 1.0, second / 5, second, second / 5, 0.0, jobs=jobs)
            state, decision = decide(state, observed, float(second), limits)
        return decision

    few, many = looks(0), looks(60)
    assert few is not None and few.replicas == 1
    assert many is not None and many.replicas == 11, "60 of 5 s each in 30 s, and the one that runs"
    assert many.reason.endswith(", 60 wait")
    assert looks(1) is None, "no reason to grow, and none to shrink"
    alone = looks(60, concurrency=1)
    assert alone is not None and alone.replicas == 12


def test_it_grows_by_one_when_requests_wait_although_there_is_a_server_for_each() -> None:
    """``concurrency`` promises 8 at once, and the worker takes them one by one."""
    stage = Stage(Limits(concurrency=8, queue_target=0.5), replicas=1)
    stage.steady(1, 60, queue=0.1)
    assert stage.replicas == 1
    stage.steady(1, 15, queue=2.0)
    assert stage.replicas == 2
    stage.steady(1, 5, queue=2.0)
    assert stage.replicas == 2, "the first one has not been seen to help yet"
    stage.steady(1, 20, queue=2.0)
    assert stage.replicas == 3
    stage.steady(1, 250, queue=0.6)
    assert stage.replicas >= 3, "it does not shrink while the target is missed"


class Unsaid(Stage):
    """A stage whose ``concurrency`` promises 8, while requests come in time only with two workers to each."""

    def __init__(self) -> None:
        super().__init__(Limits(concurrency=8, queue_target=0.5, cool_down=100))

    def serve(self, rate: float, seconds: int) -> None:
        for _ in range(seconds):
            self.steady(rate, 1, queue=2.0 if self.replicas < 2 * rate else 0.0)


def test_what_was_proved_too_few_is_not_gone_back_to_with_the_next_cool_down() -> None:
    stage = Unsaid()
    stage.serve(3, 300)
    assert stage.replicas == 6, "one at a time"
    assert replicas_for(3.0, 1.0, stage.limits) == 1, "what the model alone would go back to"
    stage.decisions.clear()
    stage.serve(3, 3000)
    assert stage.decisions == []
    stage.serve(3, 3 * 3600)
    assert [one.replicas for _, one in stage.decisions] == [5, 6] * 3, "one fewer is tried, once an hour"


def test_what_was_proved_too_few_is_held_in_proportion_to_the_load() -> None:
    stage = Unsaid()
    stage.serve(3, 300)
    stage.serve(1.4, 300)
    assert stage.replicas == 3
    stage.serve(0, 300)
    assert stage.replicas == 1


@pytest.mark.parametrize(("most", "grown"), [(60, [41]), (40, [])])
def test_late_requests_at_the_end_of_a_burst_hold_none_of_its_workers(most: int, grown: list[int]) -> None:
    """They waited for workers that were all busy. Little comes by then, and it is no measure for so many of them."""
    stage = Stage(Limits(max=most, cool_down=100, catch_up=300), replicas=40)
    for left in range(70, 0, -1):  # its last ones are done more than a window after it came
        stage.look(in_stage=left * 40.0)
        stage.now += 1
        stage.finished += 40.5
        stage.queue_seconds += 40.5 * 20.0
    stage.steady(0.5, 20)
    assert [one.replicas for _, one in stage.decisions] == grown, "late, and nothing waits any more"
    stage.steady(0.5, 300)
    assert stage.replicas == 2


def test_a_backlog_that_enough_workers_do_not_clear_is_a_sign_too_that_they_are_not_enough() -> None:
    """``concurrency`` promises 8, and the worker takes them one by one: 20 wait, and the model asks for nobody."""
    stage = Stage(Limits(concurrency=8, catch_up=30), replicas=1)

    def serve(seconds: int) -> None:
        for _ in range(seconds):
            stage.now += 1
            stage.finished += 1
            stage.queue_seconds += 20
            stage.look(in_stage=20.0)

    serve(45)
    assert stage.replicas == 1, "there was no time yet to catch up in"
    serve(15)
    assert stage.replicas == 2


def test_nothing_more_is_asked_for_while_workers_start() -> None:
    limits, state = Limits(max=20), State()
    asked = []
    for second in range(30):
        observed = Observed(6, 2, 2.0, 3.0 * second, 3.0 * second, 3.0 * second, 9.0 * second)
        state, decision = decide(state, observed, float(second), limits)
        asked.append(decision)
    assert asked == [None] * 30


def test_nothing_is_done_before_the_first_request_has_finished() -> None:
    stage = Stage(Limits(cool_down=5), replicas=2)
    for _ in range(30):
        stage.now += 1
        assert stage.look(in_stage=3.0) is None, "how long one takes is not known, and some wait"
    stage.finished += 3
    stage.now += 1
    stage.look(in_stage=0.0)
    assert stage.state.run_seconds == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"min": 3, "max": 2},
        {"max": 0, "min": 0},
        {"concurrency": 0},
        {"headroom": 1.0},
        {"queue_target": 0},
        {"min": 1.5},
    ],
)
def test_limits_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Limits(**wrong)  # type: ignore[arg-type]
