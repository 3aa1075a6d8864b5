# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus over running graphs: it finds every worker, sees one die, and has data for every panel."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.observability.dashboards import DASHBOARDS, dashboard
from dynamo_epd.sdk.control import ask
from tests.prometheus_server import Prometheus, needs_prometheus
from tests.questions import chat, data_url, picture, post, user
from tests.serving import START_SECONDS, Graph, eventually
from tests.toys.calling import Callers, door
from tests.toys.running import Served

pytestmark = needs_prometheus

TOY = "tests/toys/scaled.py:Front"
PLANNED = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    "--Planner.stages.Busy={max: 2, cool-down: 600, window: 8, queue-target: 0.2}",
    "--Planner.stages.Calm={max: 2, cool-down: 600}",
)
STAGES = {"Frontend", "EncodeWorker", "PrefillWorker", "DecodeWorker", "ImageWorker", "EmbedWorker"}
PROMPTS = ("a red star that the panels are to show", "a green ring that the panels are to show")
"""Nobody else's: the image worker keeps what it has lately READ of a prompt's token states."""
MAY_BE_ZERO = {
    # what fails, is given up, or begins again
    "graph:epd_requests_failed:ratio_rate5m",
    "ALERTS",
    "epd_worker_restarts_total",
    "epd_transfer_failures_total",
    "epd_digest_failures_total",
    "epd_arena_leases_expired_total",
    "vllm:nixl_num_failed_transfers_total",
    "vllm:num_preemptions_total",
    # what is there at the moment of a look, and at rest is not
    "stage:epd_stage_queue_depth:sum",
    "epd_stage_queue_depth",
    "graph:epd_job_queue_depth:max",
    "epd_planner_queue_seconds",
    "epd_arena_leases",
    "epd_arena_used_bytes",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    # what comes a day later
    "epd_images_expired_total",
}
"""Metrics that are 0 in a graph that does all it should. Of any other, 0 after traffic means that nothing was done."""
NAME = re.compile(r"[\w:]+(?={)")
"""A metric in a query: every one has labels."""


@pytest.fixture(scope="module")
def toy(home: Path) -> Iterator[Served]:
    with Served(home, TOY, *PLANNED) as graph:
        graph.wait_for(r"^http://", START_SECONDS)
        yield graph


@pytest.fixture(scope="module")
def prometheus(toy: Served, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), home) as one:
        yield one


def answering(prometheus: Prometheus) -> set[str]:
    return {labels["worker"] for labels, value in prometheus.query("up") if value}


def died(prometheus: Prometheus) -> set[str]:
    return {worker for alert, worker in prometheus.firing() if alert == "DynamoWorkerDied"}


def without_data(prometheus: Prometheus, names: list[str]) -> list[str]:
    """Queries of panels that have none, or no number above 0 where there must be one, for every choice of every
    variable."""
    empty = []
    for name in names:
        board = dashboard(name)
        stages = [""]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
                found = prometheus.values(label, selector.replace("$graph", ".+"))
                empty += [] if found else [f"{name}: ${variable['name']}"]
                stages = found if variable["name"] == "stage" else stages
        for panel in board["panels"]:
            for target in panel["targets"]:
                for stage in stages:
                    expression = target["expr"].replace("$__rate_interval", "1m").replace("$graph", ".+")
                    values = [value for _, value in prometheus.query(expression.replace("$stage", stage))]
                    idle = MAY_BE_ZERO.isdisjoint(NAME.findall(expression)) and not any(value > 0 for value in values)
                    if not values or idle:
                        said = "only 0" if values else "nothing"
                        empty.append(f"{name}: {panel['title']}: {target['expr']} {stage}: {said}")
    return empty


def has_data(prometheus: Prometheus, names: list[str], seconds: float = 30) -> None:
    """Fails with the queries that have none within ``seconds``."""
    end = time.monotonic() + seconds
    while empty := without_data(prometheus, names):
        assert time.monotonic() < end, "\n".join(empty)
        time.sleep(0.5)


def test_what_may_be_zero_is_on_a_panel() -> None:
    queries = [query for _, panels in DASHBOARDS.values() for panel in panels for query, _ in panel.queries]
    assert {name for query in queries for name in NAME.findall(query)} >= MAY_BE_ZERO
    assert all(NAME.search(query) for query in queries)


def test_it_finds_workers_that_the_planner_adds_and_the_planners_panels_have_data(
    toy: Served, prometheus: Prometheus
) -> None:
    eventually(lambda: answering(prometheus) == {"Front-0", "Busy-0", "Calm-0", "Planner-0"}, "all are found", 30)
    with Callers(toy, seconds=0.3) as callers:
        callers.number(4)
        eventually(lambda: "Busy-1" in answering(prometheus), "the added one is found", 60)
        has_data(prometheus, ["planner"])
        increased = 'increase(epd_planner_decisions_total{stage="Busy", direction="grow"}[1h]) > 0'
        eventually(lambda: prometheus.query(increased), "the decision is counted", 30)
    assert callers.lost == []


def test_a_killed_worker_is_seen_and_its_alert_fires(toy: Served, prometheus: Prometheus) -> None:
    eventually(lambda: answering(prometheus) >= {"Busy-0", "Calm-0"}, "both are found", 30)
    assert prometheus.firing() == set()
    os.kill(toy.workers("Calm")[0], signal.SIGKILL)
    eventually(lambda: prometheus.query('up{worker="Calm-0"} == 0'), "it does not answer", 30, 0.02)
    eventually(lambda: died(prometheus), "the alert fires", 120)
    assert died(prometheus) == {"Calm-0"}, "nobody else has died"
    assert prometheus.query('up{worker="Calm-0"} == 1'), "it is back"
    restarts = {labels["worker"]: value for labels, value in prometheus.query("epd_worker_restarts_total")}
    assert restarts.pop("Calm-0") == 1 and {"Front-0", "Busy-0"} <= restarts.keys() and set(restarts.values()) == {0}


def test_a_worker_that_is_let_go_is_no_alert(toy: Served, prometheus: Prometheus, home: Path) -> None:
    asyncio.run(ask(door(home), do="scale", service="Busy", workers=2))
    eventually(lambda: "Busy-1" in answering(prometheus), "it is found", 60)
    asyncio.run(ask(door(home), do="scale", service="Busy", workers=1))
    eventually(lambda: not prometheus.query('up{worker="Busy-1"}'), "it is no longer looked for", 30)
    assert "Busy-1" not in {worker for _, worker in prometheus.firing()}


def test_every_panel_has_data_after_traffic(seeing: Graph, tmp_path: Path) -> None:
    with Prometheus(tmp_path, seeing.state) as prometheus:
        eventually(lambda: answering(prometheus) >= {f"{name}-0" for name in STAGES}, "every stage is found", 60)
        boards = [name for name in DASHBOARDS if name != "planner"]
        ask_everything(seeing, 0)
        eventually(lambda: prometheus.query("epd_images_stored_total > 0"), "the first turn is seen", 30)
        ask_everything(seeing, 1)  # a rate is of what came after the first look
        has_data(prometheus, boards)
        assert prometheus.values("dynamo_component", "epd_stage_queue_depth") == sorted(STAGES - {"Frontend"})
        # Dynamo's own metrics too
        assert prometheus.query('dynamo_component_requests_total{dynamo_component="EncodeWorker"} > 0')
        assert set(prometheus.values("dynamo_component", '{dynamo_component!=""}')) == STAGES | {"Processor"}
        assert prometheus.values("exported_dynamo_component", '{dynamo_component!=""}') == []


def ask_everything(graph: Graph, turn: int) -> None:
    """So that every stage and every hand-off is used; the chat's picture and its first question come again."""
    # Only whole blocks of a KV cache are found again. They have 128 tokens at most, and a sentence four at least.
    seen = user("Describe the picture. " * 40, data_url(picture(71_000)))
    post(f"{graph.url}/v1/chat/completions", chat(seen, user(f"And turn {turn}?")))
    post(f"{graph.url}/v1/validations", {"prompt": PROMPTS[turn], "seed": turn})
    post(f"{graph.url}/v1/embeddings", {"model": "tiny-t5", "input": list(PROMPTS)})
    drawn = {"model": "tiny-image", "prompt": PROMPTS[turn], "size": "64x64", "response_format": "url"}
    post(f"{graph.url}/v1/images/generations", drawn)
    post(f"{graph.url}/v1/images/jobs", {"model": "tiny-image", "prompt": PROMPTS[turn], "size": "64x64"})
