# SPDX-License-Identifier: Apache-2.0
"""The planner in a running toy graph: the stage that is short grows, the others stay, and no request is lost."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_epd.sdk.control import ask
from tests.serving import eventually
from tests.test_planner import GRAPH, SETTINGS
from tests.toys.calling import Callers, busy_worker, door, ready
from tests.toys.running import Served

WORK = 0.3


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
    assert served.stop() == 0
    assert served.leftovers() == [], "nothing of those that were added either"


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
