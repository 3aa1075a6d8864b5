# SPDX-License-Identifier: Apache-2.0
"""How the planner is configured, and that it goes with its graph. Under load: acceptance/test_planner_load.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from components.planner import CONCURRENCY, PlannerConfig
from dynamo_epd.planning.policy import Limits
from dynamo_epd.sdk.config import ConfigError, Document, resolve
from dynamo_epd.sdk.graph import load_graph
from tests.toys.running import ROOT, Served

GRAPH = "tests/toys/scaled.py:Front"
SETTINGS = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    "--Planner.stages.Busy={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
    "--Planner.stages.Calm={max: 4, cool-down: 5, window: 8, queue-target: 0.5}",
)


def test_it_goes_with_the_graph_and_leaves_nothing(tmp_path: Path) -> None:
    with Served(tmp_path, GRAPH, *SETTINGS) as served:
        served.wait_until_up()
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
