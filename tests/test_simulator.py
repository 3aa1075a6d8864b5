# SPDX-License-Identifier: Apache-2.0
"""The replay of traces: that it counts right, and what the planner's policy makes of the recorded trace."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.planner.measure import service_time, service_times, written
from benchmarks.planner.replay import HERE, replay, summary, table
from benchmarks.recorded import put
from dynamo_epd.planning.doors import Staffed
from dynamo_epd.planning.policy import Observed, State, decide, mean_wait
from dynamo_epd.planning.simulator import LOOK_SECONDS, Replay, Simulator, static_peak
from dynamo_epd.planning.traces import ServiceTime, Trace, arrivals, read_trace
from tests.exporters import Exporters


def small(**changed: Any) -> Trace:
    """One stage, one kind, no day and no burst: 0.6 requests at once on average."""
    fields: dict[str, Any] = {
        "seed": 3,
        "seconds": 6000,
        "period_seconds": 6000,
        "amplitude": 0.0,
        "replica_start_seconds": 40,
        "burst": {"from_seconds": 3000, "seconds": 300, "factor": 1, "kinds": ["ask"]},
        "service_times": {"measured": False, "how": "a test's", "stages": {"Only": {"seconds": 0.5, "spread": 1.0}}},
        "kinds": {"ask": {"route": ["Only"], "load": {"stage": "Only", "workers": 0.6}, "limit_seconds": 5}},
        "limits": {"Only": {"max": 20, "queue_target": 0.5}},
    }
    return msgspec.convert(fields | changed, Trace)


@pytest.fixture(scope="module")
def recorded() -> Trace:
    return read_trace(HERE / "trace.json")


@pytest.fixture(scope="module")
def replayed(recorded: Trace) -> tuple[Replay, Replay]:
    return replay(recorded)


def test_a_trace_is_the_same_every_time_and_its_rate_is_the_recorded_one(recorded: Trace) -> None:
    first = list(itertools.islice(arrivals(recorded), 500))
    assert first == list(itertools.islice(arrivals(recorded), 500))
    assert [one.time for one in first] == sorted(one.time for one in first)
    trace = small(amplitude=0.8)
    half = Counter(one.time < 1500 or one.time > 4500 for one in arrivals(trace))
    assert sum(half.values()) == pytest.approx(6000 * 0.6 / 0.5, rel=0.05)
    assert half[False] > 2.5 * half[True]  # the day: (pi + 2 * 0.8) / (pi - 2 * 0.8) = 3.1


def test_a_burst_is_of_its_kinds_alone_and_of_its_time() -> None:
    trace = small(burst={"from_seconds": 3000, "seconds": 300, "factor": 5, "kinds": ["ask"]})
    inside = sum(3000 <= one.time < 3300 for one in arrivals(trace))
    before = sum(2700 <= one.time < 3000 for one in arrivals(trace))
    assert 4 < inside / before < 6
    assert trace.rate("ask", 2999) * 5 == pytest.approx(trace.rate("ask", 3000))


@pytest.mark.parametrize(("workers", "load"), [(1, 0.6), (3, 2.1)])
def test_waits_are_those_of_erlangs_formula(workers: int, load: float) -> None:
    kinds = {"ask": {"route": ["Only"], "load": {"stage": "Only", "workers": load}, "limit_seconds": 5}}
    done = Simulator(small(kinds=kinds, seconds=20000), {"Only": workers}).run()
    waited = sum(done.seconds["ask"]) / len(done.seconds["ask"]) - 0.5
    assert waited == pytest.approx(mean_wait(load, workers, 0.5), rel=0.15)  # a spread of 1 is the formula's own


def test_every_request_ends_and_every_worker_is_paid_for() -> None:
    trace = small()
    done = Simulator(trace, {"Only": 2}).run()
    assert done.finished["ask"] == sum(1 for _ in arrivals(trace))
    assert done.replica_seconds["Only"] == pytest.approx(2 * 6000)
    assert done.decisions == []


def test_a_worker_takes_its_time_to_start_and_leaves_when_its_requests_have_ended() -> None:
    stages = {"Only": {"seconds": 20.0, "spread": 0.1}}
    times = {"measured": False, "how": "a test's", "stages": stages}
    kinds = {"ask": {"route": ["Only"], "load": {"stage": "Only", "workers": 2.0}, "limit_seconds": 100}}
    burst = {"from_seconds": 600, "seconds": 300, "factor": 8, "kinds": ["ask"]}
    limits = {"Only": {"max": 40, "queue_target": 20.0, "cool_down": 60}}
    trace = small(service_times=times, kinds=kinds, burst=burst, limits=limits, seconds=3000)
    simulator = Simulator(trace)
    done = simulator.run()
    assert done.finished["ask"] == sum(1 for _ in arrivals(trace))
    shrunk = [one for one in done.decisions if one.after < one.before]
    assert shrunk, done.decisions
    paid = sum(len_ for sample in done.samples.values() for len_, _ in sample.values())
    assert done.replica_seconds["Only"] == pytest.approx(paid, rel=0.02)
    # those that leave are there after the decision: they run what they have
    assert any(done.samples[one.time + 1]["Only"][0] > one.after for one in shrunk)


def test_the_recorded_trace_is_two_hours_with_a_five_fold_burst_and_workers_that_take_40_s_to_start(
    recorded: Trace,
) -> None:
    assert (recorded.seconds, recorded.replica_start_seconds) == (2 * 60 * 60, 40)
    assert (recorded.burst.factor, recorded.burst.seconds) == (5, 300)
    assert recorded.burst.from_seconds + recorded.burst.seconds < recorded.seconds


def test_the_planner_holds_the_attainment_of_static_peak_with_far_fewer_workers(
    recorded: Trace, replayed: tuple[Replay, Replay]
) -> None:
    """99 % of it over all requests, most of which are chats. Of pictures 98 %, and of validations 97 %, whose burst it
    is: what is missed came before a worker could start."""
    planned, static = replayed
    assert recorded.service_times.measured
    assert static.attainment() > 0.999
    assert planned.attainment() >= 0.99 * static.attainment()
    bursting = {"picture": 0.98, "validation": 0.97}
    assert set(recorded.burst.kinds) == bursting.keys()
    for kind in recorded.kinds:
        share = bursting.get(kind, 0.999)  # the burst of others is not theirs to suffer
        assert planned.attainment(kind) >= share * static.attainment(kind), kind
    missed = [arrived - recorded.burst.from_seconds for arrived, well in planned.ends if not well]
    assert all(0 <= after < recorded.replica_start_seconds for after in missed)
    assert planned.replica_seconds.total() <= 0.6 * static.replica_seconds.total()


def test_each_decision_is_within_two_seconds_of_its_cause(recorded: Trace, replayed: tuple[Replay, Replay]) -> None:
    planned, _ = replayed
    assert planned.decisions
    assert all(0 <= one.time - one.cause <= LOOK_SECONDS <= 2 for one in planned.decisions)
    begin = recorded.burst.from_seconds  # nobody told the planner: this is when the rate really changes
    made = [one for one in planned.decisions if begin < one.time <= begin + 2]
    assert {one.stage for one in made} == {"ImageWorker"}
    assert made[-1].after > 3 * made[0].before


class Watched(Simulator):
    """A replay with somebody beside the planner who looks ten times as often, by the same policy, and asks for nothing.

    ``short``: stage → since when there have been fewer workers than that one wants. ``longest``: such times, seconds.
    """

    def __init__(self, trace: Trace):
        super().__init__(trace)
        self.states = {stage: State() for stage in trace.limits}
        self.short: dict[str, float] = {}
        self.longest: dict[str, float] = dict.fromkeys(trace.limits, 0.0)

    def run(self) -> Replay:
        for tenth in range(1, int(self.trace.seconds * 10)):
            self._at(tenth / 10, self._watch)
        return super().run()

    def _watch(self, now: float) -> None:
        for name, stage in self.stages.items():
            observed = stage.observed()
            self.states[name], decision = decide(self.states[name], observed, now, stage.limits)
            if decision is None or decision.replicas < observed.replicas:
                self.short.pop(name, None)
            else:
                self.longest[name] = max(self.longest[name], now - self.short.setdefault(name, now))


def test_nobody_who_looks_ten_times_as_often_wants_more_workers_for_longer_than_two_seconds(recorded: Trace) -> None:
    """A cause by another clock than the policy's own, in the trace until its burst is over. What looks like a cause for
    less than a second was chance."""
    watched = Watched(msgspec.structs.replace(recorded, seconds=3000))
    done = watched.run()
    assert watched.longest.keys() == recorded.limits.keys()
    assert 0 < max(watched.longest.values()) <= 2, watched.longest
    grown = {one.stage for one in done.decisions if one.after > one.before}
    assert grown and all(watched.longest[stage] > 0 for stage in grown), "it has seen what made them grow"


@pytest.mark.parametrize("seed", range(40))
def test_a_step_of_the_load_is_answered_within_two_seconds_of_the_step_itself(seed: int) -> None:
    """Whenever it comes, between two looks too: by at least half of the workers that the new load keeps busy.

    Steps that one second tells from chance: of six requests a second to 48 and more.
    """
    chance = random.Random(seed)
    begin, factor = chance.uniform(120, 180), chance.uniform(8, 20)
    trace = stepped(seed, begin, factor, 10)
    enough = trace.load("Only", begin) / 2
    made = Simulator(trace).run().decisions
    assert not [one for one in made if one.time < begin and one.after >= enough]
    assert next(one.time for one in made if one.after >= enough) - begin <= 2


def stepped(seed: int, begin: float, factor: float, seconds: float) -> Trace:
    """Six requests a second, each of half a second, and ``factor`` times as many for the last ``seconds``."""
    kinds = {"ask": {"route": ["Only"], "load": {"stage": "Only", "workers": 3}, "limit_seconds": 5}}
    burst = {"from_seconds": begin, "seconds": seconds, "factor": factor, "kinds": ["ask"]}
    limits = {"Only": {"max": 200, "queue_target": 0.5}}
    return small(seed=seed, seconds=begin + seconds, kinds=kinds, burst=burst, limits=limits)


def first_growth(seed: int, factor: float) -> float:
    """Seconds from a step of the load to the first decision for more workers; never where chance had asked for enough
    of them before."""
    begin = random.Random(seed).uniform(120, 180)
    made = Simulator(stepped(seed, begin, factor, 60)).run().decisions
    return next((one.time - begin for one in made if one.time >= begin and one.after > one.before), math.inf)


@pytest.mark.parametrize("factor", [2, 5])
def test_the_readme_says_how_long_smaller_steps_take(factor: int) -> None:
    took = sorted(first_growth(seed, factor) for seed in range(40))
    row = f"| {6 * factor} | {statistics.median(took):.0f} s | {took[35]:.0f} s |"
    assert row in (HERE / "README.md").read_text().splitlines(), row


def test_it_does_not_flap(replayed: tuple[Replay, Replay]) -> None:
    planned, _ = replayed
    for stage in ("EncodeWorker", "PrefillWorker", "DecodeWorker", "ImageWorker", "EmbedWorker"):
        ups = [one.after > one.before for one in planned.decisions if one.stage == stage]
        assert sum(a != b for a, b in itertools.pairwise(ups)) <= 4, stage


def test_what_is_published_is_what_the_replay_gives(recorded: Trace, replayed: tuple[Replay, Replay]) -> None:
    published = json.loads((HERE / "results.json").read_text())
    assert published == json.loads(json.dumps(summary(recorded, *replayed)))


def test_the_readme_says_of_each_kind_what_is_published(tmp_path: Path) -> None:
    lines = list(table(json.loads((HERE / "results.json").read_text())))
    assert [line.split()[1] for line in lines[2:7]] == ["all", "chat", "picture", "validation", "embedding"]
    copied = tmp_path / "README.md"
    copied.write_text((HERE / "README.md").read_text())
    put("replay", "\n".join([*lines, ""]), copied)
    assert copied.read_text() == (HERE / "README.md").read_text()


def test_static_peak_is_enough_for_the_highest_load(recorded: Trace) -> None:
    for stage, count in static_peak(recorded).items():
        assert recorded.peak_load(stage) / count <= 0.7 + 1e-9


def test_service_times_that_are_measured_anew_leave_the_load_as_it_was(recorded: Trace) -> None:
    doubled = {
        stage: ServiceTime(one.seconds * 2, one.spread * 3) for stage, one in recorded.service_times.stages.items()
    }
    table = msgspec.to_builtins(recorded)
    trace = msgspec.convert(written(table, doubled, "a test's"), Trace)
    assert trace.service_times.measured
    decode = recorded.service_times.stages["DecodeWorker"]
    assert trace.service_times.stages["DecodeWorker"] == ServiceTime(2 * decode.seconds, round(3 * decode.spread, 3))
    assert trace.mean_rate("picture") == pytest.approx(recorded.mean_rate("picture") / 2)
    for stage in recorded.limits:
        assert trace.load(stage, 2500.0) == pytest.approx(recorded.load(stage, 2500.0))
    with pytest.raises(ValueError, match="nothing ran in ImageWorker"):
        written(table, {stage: one for stage, one in doubled.items() if stage != "ImageWorker"}, "a test's")


def looks_at(runs: Sequence[Sequence[float]]) -> list[Observed]:
    """A stage at rest before and after requests that ran in it so often and so long."""
    found = [Observed(1, 1, 0, 7, 30.0, 7, 0.0)]
    for request in runs:
        last = found[-1]
        found.append(
            dataclasses.replace(
                last, finished=last.finished + len(request), run_seconds=last.run_seconds + sum(request)
            )
        )
    return found


@pytest.mark.parametrize("times", [1, 2])
def test_service_times_are_measured_with_their_spread(times: int) -> None:
    """However often a request runs in the stage, of which it tells only the sum."""
    drawn = random.Random(5)
    runs = [[drawn.gammavariate(1 / 0.49, 0.1 * 0.49) for _ in range(times)] for _ in range(4000)]
    found = service_time(looks_at(runs))
    assert found is not None
    assert found.seconds == pytest.approx(0.1, rel=0.05)
    assert found.spread == pytest.approx(0.7, rel=0.05)


def test_a_spread_is_the_standard_deviation_over_the_mean_and_takes_two_requests() -> None:
    seconds = [0.2, 0.5, 0.3]
    found = service_time(looks_at([[0.2], [], [0.5], [0.3]]))
    assert found is not None
    assert found.seconds == pytest.approx(statistics.mean(seconds))
    assert found.spread == pytest.approx(statistics.stdev(seconds) / statistics.mean(seconds))
    assert service_time(looks_at([[0.2], []])) is None
    assert service_time(looks_at([])) is None


def test_a_graph_is_looked_at_after_every_request_once_it_rests(
    exporters: Exporters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stage ends a look later than the reply: what it ran is the request's all the same."""
    took = iter([9.0, 9.0, 0.2, 0.5, 0.3])  # two to warm up
    asked: list[int] = []
    ended = [0, 0.0]

    def says(depth: int) -> None:
        counts = {"queue_depth": depth, "queue_seconds_sum": 0, "queue_seconds_count": ended[0]}
        counts |= {"run_seconds_count": ended[0], "run_seconds_sum": ended[1]}
        exporters.texts["/a"] = "".join(f"epd_stage_{name} {value}\n" for name, value in counts.items())

    class Door:
        def __init__(self, path: str) -> None:
            says(0)

        async def services(self) -> dict[str, Staffed]:
            if exporters.texts["/a"].startswith("epd_stage_queue_depth 1"):  # type: ignore[union-attr]
                looked.append(len(asked))
                if looked.count(len(asked)) == 2:
                    ended[:] = ended[0] + 1, ended[1] + next(took)
                    says(0)
            return {"A": Staffed(1, (exporters.worker("a"),))}

    def validate(url: str, number: int) -> None:
        asked.append(number)
        if number < 0:
            ended[:] = ended[0] + 1, ended[1] + next(took)
            says(0)
        else:
            says(1)

    looked: list[int] = []
    monkeypatch.setattr("benchmarks.planner.measure.SupervisorDoor", Door)
    monkeypatch.setattr("benchmarks.planner.measure._validate", validate)
    found = asyncio.run(service_times("", "", 3))
    assert asked == [-1, -2, 0, 1, 2]
    seconds = [0.2, 0.5, 0.3]
    assert found["A"].seconds == pytest.approx(statistics.mean(seconds))
    assert found["A"].spread == pytest.approx(statistics.stdev(seconds) / statistics.mean(seconds))


def test_a_trace_with_names_that_do_not_fit_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="limits must name every stage"):
        small(limits={})
