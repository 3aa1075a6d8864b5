# SPDX-License-Identifier: Apache-2.0
"""The planner over the real engines: pictures move the image worker and no other stage, and Prometheus sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.planned import MOVED, STAGES, Chatting, Painters, planned
from tests.prometheus_server import Prometheus, needs_prometheus
from tests.serving import START_SECONDS, Graph, eventually
from tests.test_observability import answering, died, has_data
from tests.toys.calling import Sampling, ready
from tests.toys.running import ROOT

FOUND = ROOT / "build" / "planner" / "cova.json"
"""Workers of each stage, second by second, and each change with its reason: to look at when the test has failed."""


@pytest.fixture(scope="module")
def graph() -> Iterator[Graph]:
    with planned() as served:
        yield served


@pytest.fixture(scope="module")
def prometheus(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), graph.state) as one:
        yield one


def changes(graph: Graph) -> list[tuple[str, int, int]]:
    """Stage, workers before, and after, in the order in which the graph said so."""
    found = [re.match(r"(\w+): (\d+) → (\d+) workers \(.+\)$", line) for line in graph.lines]
    return [(one[1], int(one[2]), int(one[3])) for one in found if one]


def made(graph: Graph) -> list[float]:
    """Pictures of each image worker."""
    return [graph.metrics(MOVED, index).total("epd_images_generated_total") for index in sorted(graph.workers(MOVED))]


def test_pictures_that_double_and_halve_move_the_image_worker_alone(graph: Graph) -> None:
    with Chatting(graph) as chatting, Painters(graph) as painters, Sampling(graph.state, painters, STAGES) as sampling:
        try:
            painters.number(1)
            eventually(lambda: len(painters.answers) >= 5 and len(graph.workers(MOVED)) == 1, "a steady load", 300, 0.5)
            before, answered = len(changes(graph)), len(painters.answers)
            eventually(lambda: len(painters.answers) > answered + 10, "a steady load", 300)
            assert len(changes(graph)) == before, "which one worker bears"
            for doubled in (2, 4):
                painters.number(doubled)
                time.sleep(2)
            eventually(lambda: ready(graph.state)[MOVED] == 2, "the stage that is short has grown", START_SECONDS)
            eventually(lambda: len(made(graph)) == 2 and min(made(graph)) > 0, "pictures of both workers", 300)
            for halved in (2, 1):
                painters.number(halved)
                time.sleep(2)
            eventually(lambda: len(graph.workers(MOVED)) == 1, "it has shrunk again", 300, 0.5)
            answered = len(painters.answers)
            eventually(lambda: len(painters.answers) > answered + 3, "pictures of the one that is left", 300)
        finally:
            FOUND.parent.mkdir(parents=True, exist_ok=True)
            said = [line for line in graph.lines if "→" in line]
            FOUND.write_text(json.dumps({"changes": said, "samples": sampling.samples}, indent=1, ensure_ascii=False))
    assert painters.lost == []
    assert len(chatting.texts) > 10 and len(set(chatting.texts)) == 1, chatting.texts
    assert changes(graph)[before:] == [(MOVED, 1, 2), (MOVED, 2, 1)], "up, then down, and not again"
    assert {stage for stage, _, _ in changes(graph)} == {MOVED}, "nobody else"
    assert "died" not in graph.text


@needs_prometheus
def test_the_planners_panels_have_data(graph: Graph, prometheus: Prometheus) -> None:
    everyone = {f"{name}-0" for name in ("Frontend", "Processor", "Planner", *STAGES)}
    eventually(lambda: answering(prometheus) >= everyone, "every worker is found", 60)
    with Painters(graph) as painters:
        painters.number(4)
        eventually(lambda: f"{MOVED}-1" in answering(prometheus), "the added one is found", START_SECONDS)
        has_data(prometheus, ["planner"])
        increased = f'increase(epd_planner_decisions_total{{stage="{MOVED}", direction="grow"}}[1h]) > 0'
        eventually(lambda: prometheus.query(increased), "the decision is counted", 30)
    assert painters.lost == []


@needs_prometheus
def test_a_killed_worker_of_a_real_stage_is_seen_and_its_alert_fires(graph: Graph, prometheus: Prometheus) -> None:
    eventually(lambda: "EncodeWorker-0" in answering(prometheus), "it is found", 60)
    assert died(prometheus) == set()
    os.kill(graph.pid("EncodeWorker"), signal.SIGKILL)
    eventually(lambda: prometheus.query('up{worker="EncodeWorker-0"} == 0'), "it does not answer", 60, 0.02)
    eventually(lambda: died(prometheus), "the alert fires", 300)
    assert died(prometheus) == {"EncodeWorker-0"}, "nobody else has died"
    eventually(lambda: prometheus.query('up{worker="EncodeWorker-0"} == 1'), "it is back", START_SECONDS)
