# SPDX-License-Identifier: Apache-2.0
"""The planner in a running graph: the stage that is short grows, the others stay, and no request is lost."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.planner import CONCURRENCY, PlannerConfig
from dynamo_epd.planning.policy import Limits
from dynamo_epd.sdk.config import ConfigError, Document, resolve
from dynamo_epd.sdk.control import ask
from dynamo_epd.sdk.graph import load_graph
from tests.test_worker import eventually
from tests.toys.calling import Callers, busy_worker, door, ready
from tests.toys.running import ROOT, Served

GRAPH = "tests/toys/scaled.py:Front"
WORK = 0.3
SETTINGS = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    "--Planner.stages.Busy={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
    "--Planner.stages.Calm={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
)


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    with Served(home, GRAPH, *SETTINGS) as graph:
        yield graph.wait_until_up()


def test_a_load_that_doubles_and_halves_moves_the_stage_that_is_short_and_no_other(served: Served, home: Path) -> None:
    # One client is a quarter of a worker's work, four are all of it: far apart, for a machine that others use too.
    with Callers(served, seconds=WORK, think=3 * WORK) as callers:
        callers.number(1)
        eventually(lambda: len(callers.answers) >= 10, "a steady load", 60)
        assert ready(home)["Busy"] == 1, served.text
        for doubled in (2, 4):
            callers.number(doubled)
            time.sleep(2)
        eventually(lambda: ready(home)["Busy"] >= 2, "the stage that is short has grown", 60)
        grown = len(callers.answers)
        eventually(lambda: len(callers.answers) > grown + 20, "answers of more workers than one", 60)
        assert {busy_worker(one) for one in callers.answers[grown:]} > {0}
        for halved in (2, 1):
            callers.number(halved)
            time.sleep(1)
        eventually(lambda: len(served.workers("Busy")) == 1, "it has shrunk again", 240)
        answered = len(callers.answers)
        eventually(lambda: len(callers.answers) > answered + 3, "answers of the one that is left", 60)
    assert callers.lost == []
    changes = [match for line in served.lines if (match := re.match(r"(\w+): (\d+) → (\d+) workers \((.+)\)$", line))]
    assert {one[1] for one in changes} == {"Busy"}, served.text
    assert int(changes[-1][3]) == 1
    assert all("at once" in one[4] or "wait" in one[4] for one in changes), "each says why"
    ups = [int(one[2]) < int(one[3]) for one in changes]
    assert ups[0] and ups == sorted(ups, reverse=True), f"first up, then down, and not again: {changes}"
    assert "died" not in served.text
    said = planners_metrics(home)
    for direction, rise in (("grow", True), ("shrink", False)):
        assert said["epd_planner_decisions_total", "Busy", direction] == ups.count(rise), served.text
        assert said["epd_planner_decisions_total", "Calm", direction] == 0
    for stage in ("Busy", "Calm"):
        assert said["epd_planner_replicas", stage, ""] == said["epd_planner_target_replicas", stage, ""] == 1
        assert 0 <= said["epd_planner_queue_seconds", stage, ""] < WORK
    assert {stage for _, stage, _ in said} == {"Busy", "Calm"}, "Front reports no stage"


def planners_metrics(home: Path) -> dict[tuple[str, str, str], float]:
    """(name, stage, direction) → what the planner's own metrics say."""
    (planner,) = asyncio.run(ask(door(home), do="status"))["services"]["Planner"]
    with urllib.request.urlopen(planner["metrics"], timeout=20) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    samples = [one for family in families for one in family.samples if one.name.startswith("epd_planner_")]
    for one in samples:
        labels = {"dynamo_namespace", "dynamo_component", "model", "stage"}
        assert one.name.endswith("_created") or one.labels.keys() - {"direction"} == labels
    return {
        (one.name, one.labels["stage"], one.labels.get("direction", "")): one.value
        for one in samples
        if not one.name.endswith("_created")
    }


def test_it_goes_with_the_graph_and_leaves_nothing(served: Served) -> None:
    assert set(served.workers("Planner")) == {0}
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
