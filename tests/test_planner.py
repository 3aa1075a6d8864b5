# SPDX-License-Identifier: Apache-2.0
"""How the planner is configured, and that it does its work in a graph. For longer: acceptance/test_planner_load.py."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.planner import CONCURRENCY, PlannerConfig
from dynamo_epd.planning.policy import Limits
from dynamo_epd.sdk.config import ConfigError, Document, resolve
from dynamo_epd.sdk.graph import load_graph
from tests.serving import eventually
from tests.toys.calling import Callers, at_work, busy_worker, ready, workers
from tests.toys.running import ROOT, Served

GRAPH = "tests/toys/scaled.py:Front"
SETTINGS = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    "--Planner.stages.Busy={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
    "--Planner.stages.Calm={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
)
SHORT = (
    *SETTINGS[:2],
    "--Planner.stages.Busy={max: 2, cool-down: 8, window: 4, queue-target: 0.5}",
    "--Planner.stages.Calm={max: 2, cool-down: 8, window: 4, queue-target: 0.5}",
)
"""It goes up at once, and comes down once there has been time to give each worker something that it is to finish."""
LATE = 4
"""Requests that come while a worker leaves."""


def test_it_follows_a_load_that_comes_and_goes_and_leaves_nothing(tmp_path: Path) -> None:
    """Busy alone, which has one worker more and then no longer, and who goes still answers what it has."""
    home, go = tmp_path / "state", tmp_path / "go"
    held = {"seconds": 0, "until": str(go)}
    with Served(home, GRAPH, *SHORT) as served, ThreadPoolExecutor(2 + LATE) as pool:
        served.wait_until_up()
        assert set(served.workers("Planner")) == {0}
        with Callers(served, seconds=0.3) as callers:
            callers.number(4)
            eventually(lambda: ready(home)["Busy"] == 2, "the stage that is short has grown", 120)
            second = served.workers("Busy")[1]
            grown = len(callers.answers)
            eventually(lambda: {busy_worker(one) for one in callers.answers[grown:]} == {0, 1}, "both answer", 60)
        assert callers.lost == []
        try:
            # Each worker has one that lasts until the planner has done what this is about. Nothing else comes.
            asked = [pool.submit(served.post, "call", held, 300) for _ in range(2)]
            eventually(lambda: at_work(home) == {0: 1, 1: 1}, "one request on each worker", 60)
            served.wait_for("^Busy: 2 → 1 workers ", 120)
            changes = [line.partition(" (")[0] for line in served.lines if " workers (" in line]
            eventually(lambda: [one["leaving"] for one in workers(home, "Busy")] == [False, True], "it leaves", 60)
            assert at_work(home) == {0: 1, 1: 1}
            asked += [pool.submit(served.post, "call", {"seconds": 0}) for _ in range(LATE)]
        finally:
            go.touch()
        answers = [busy_worker(one.result()) for one in asked]
        assert set(answers[:2]) == {0, 1}, "nothing is lost on the way down"
        eventually(lambda: second not in served.workers("Busy").values(), "it has gone", 60)
        # What comes after is not looked at: requests that took as long are a reason to grow.
        assert changes == ["Busy: 1 → 2 workers", "Busy: 2 → 1 workers"], served.text
        assert not re.search("^(Calm|Front): .* workers", served.text, re.MULTILINE)
        assert not re.search("died|has not come up", served.text)
        assert served.stop() == 0
        assert served.leftovers() == []


def test_a_stage_that_the_graph_has_not_is_said_before_anything_is_planned(tmp_path: Path) -> None:
    with Served(tmp_path, GRAPH, *SETTINGS, "--Planner.stages.Bsy.max=2") as served:
        assert served.wait() == 2
        assert "unknown service 'Bsy'; did you mean Busy?" in served.text


def planner(*overrides: tuple[str, str]) -> PlannerConfig:
    document = Document()
    document.read(ROOT / "configs" / "tiny-agg.yaml")
    for key, value in overrides:
        document.override("Planner", key, value)
    settings = resolve(load_graph("graphs.agg:Frontend", str(ROOT)), document)["Planner"]
    assert settings.runs is not settings.config.no_operation
    found: PlannerConfig = settings.config
    return found


def test_it_rests_by_default_and_runs_when_told() -> None:
    assert planner().no_operation
    assert not planner(("no-operation", "false")).no_operation


def test_each_stage_has_its_own_limits_and_the_others_the_defaults() -> None:
    config = planner(("stages.EncodeWorker.queue-target", "0.1"), ("stages.EncodeWorker.max", "3"))
    assert config.limits("EncodeWorker") == Limits(max=3, queue_target=0.1, concurrency=CONCURRENCY["EncodeWorker"])
    assert config.limits("Mine") == Limits()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stages.EncodeWorker.que-target", "1", "Planner.stages.EncodeWorker has keys that nothing reads; it may have"),
        ("stages.EncodeWorker.max", "0", "Planner.stages.EncodeWorker: 0 <= min <= max"),
        ("stages.EncodeWorker.max", "1.5", "Planner.stages.EncodeWorker: max must be a whole number"),
        ("stages.EncodeWorker.max", "many", "Expected `float`, got `str`"),
        ("interval", "0", "Planner.interval must be from 0.1 to 60 seconds"),
    ],
)
def test_what_cannot_be_planned_by_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        planner((key, value))
