# SPDX-License-Identifier: Apache-2.0
"""KEDA's scalers: what they scale, and what their queries say of waits, asked of Prometheus' own engine (promtool)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from components.planner import PlannerConfig
from dynamo_epd.metrics import LABELS, Metrics
from tests.manifests import GRAPH, Object, kustomized, of_kind

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here")
STAGES = ("EncodeWorker", "PrefillWorker", "DecodeWorker", "ImageWorker", "EmbedWorker")
TRIGGER = {"serverAddress", "query", "threshold"}
"""Of the keys of KEDA's Prometheus scaler (pkg/scalers/prometheus_scaler.go) those that are used."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return kustomized("overlays/gpu", tmp_path_factory.mktemp("deploy"))


def triggers(objects: list[Object], stage: str) -> dict[str, Any]:
    """By name."""
    found = of_kind(objects, "ScaledObject")[f"epd-{stage.lower()}"]["spec"]["triggers"]
    return {one["name"]: one for one in found}


def trigger(objects: list[Object], stage: str) -> Any:
    return triggers(objects, stage)["queue"]


def test_one_scaler_per_stage_on_its_adapter(objects: list[Object]) -> None:
    """The operator names an adapter after deployment and component, in small letters."""
    scalers = of_kind(objects, "ScaledObject")
    assert scalers.keys() == {f"epd-{stage.lower()}" for stage in STAGES}
    graph = of_kind(objects, GRAPH)["epd"]
    adapted = {one["name"] for one in graph["spec"]["components"] if "scalingAdapter" in one}
    assert set(STAGES) <= adapted
    # two autoscalers on one stage would pull at each other
    assert "Planner" not in adapted and all(
        one["replicas"] == 0 for one in graph["spec"]["components"] if one["type"] == "planner"
    )
    for name, one in scalers.items():
        spec = one["spec"]
        assert spec["scaleTargetRef"] == {
            "apiVersion": "nvidia.com/v1beta1",
            "kind": "DynamoGraphDeploymentScalingAdapter",
            "name": name,
        }
        assert 1 == spec["minReplicaCount"] < spec["maxReplicaCount"]


def test_triggers_have_the_keys_that_keda_reads(objects: list[Object]) -> None:
    for stage in STAGES:
        found = trigger(objects, stage)
        assert (found["type"], found["metricType"]) == ("prometheus", "Value")
        assert found["metadata"].keys() == TRIGGER and all(isinstance(one, str) for one in found["metadata"].values())
        target = PlannerConfig().limits(stage).queue_target
        assert float(found["metadata"]["threshold"]) >= target
    names = {stage: set(triggers(objects, stage)) for stage in STAGES}
    assert names == {stage: {"queue"} for stage in STAGES} | {"ImageWorker": {"queue", "jobs"}}
    jobs = triggers(objects, "ImageWorker")["jobs"]
    assert (jobs["type"], jobs["metricType"]) == ("prometheus", "AverageValue")
    assert jobs["metadata"].keys() == TRIGGER and float(jobs["metadata"]["threshold"]) > 0


@pytest.fixture
def registry_as_before() -> Iterator[None]:
    """What a test makes of metrics is gone after it: a process has each once."""
    before = set(REGISTRY._collector_to_names)
    yield
    for made in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(made)


@pytest.mark.usefixtures("registry_as_before")
def test_the_metric_is_ours() -> None:
    stage = Metrics("dynamo-epd-epd", "EncodeWorker", "m").stage()
    with stage.visit() as visit:
        visit.waited = 1.5
    labels = dict(zip(LABELS, ("dynamo-epd-epd", "EncodeWorker", "m"), strict=True))
    assert REGISTRY.get_sample_value("epd_stage_queue_seconds_sum", labels) == 1.5
    with stage.visit():
        assert REGISTRY.get_sample_value("epd_stage_queue_depth", labels) == 1
        assert REGISTRY.get_sample_value("epd_stage_queue_seconds_count", labels) == 1  # a wait counts when it ended
    assert REGISTRY.get_sample_value("epd_stage_queue_seconds_count", labels) == 2


def answers(tmp_path: Path, series: list[dict[str, str]], asked: Sequence[tuple[str, str, float]]) -> None:
    """Has promtool compare: query, moment, and what it says then."""
    tests = [
        {"expr": query, "eval_time": moment, "exp_samples": [{"labels": "{}", "value": value}]}
        for query, moment, value in asked
    ]
    test = {
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}],
    }
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump(test))
    ran = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
def test_queries_say_the_mean_wait_and_never_nothing(objects: list[Object], tmp_path: Path) -> None:
    """Per stage: two workers with 2 requests a second together that wait 3 s each; then idle; then gone."""
    series, asked = [], []
    for stage in STAGES:
        for worker in ("a", "b"):
            labels = f'namespace="dynamo-epd",graph="epd",dynamo_component="{stage}",worker="{worker}"'
            # five minutes of load, five of rest, and then no sample any more
            series += [
                {"series": f"epd_stage_queue_seconds_sum{{{labels}}}", "values": "0+45x20 900x20 stale"},
                {"series": f"epd_stage_queue_seconds_count{{{labels}}}", "values": "0+15x20 300x20 stale"},
                {"series": f"epd_stage_queue_depth{{{labels}}}", "values": "4x20 0x20 stale"},
            ]
        other = f'namespace="other",graph="epd",dynamo_component="{stage}",worker="a"'
        series += [
            {"series": f"epd_stage_queue_seconds_sum{{{other}}}", "values": "0+900x60"},
            {"series": f"epd_stage_queue_seconds_count{{{other}}}", "values": "0+15x60"},
            {"series": f"epd_stage_queue_depth{{{other}}}", "values": "90x60"},
        ]
        query = trigger(objects, stage)["metadata"]["query"]
        asked += [(query, "4m", 3), (query, "9m", 0), (query, "14m", 0)]
    answers(tmp_path, series, asked)


@needs_promtool
def test_an_image_workers_pictures_have_waited_as_long_as_their_jobs_lay_in_the_queue(
    objects: list[Object], tmp_path: Path
) -> None:
    """One picture in 15 s that waits 3 s in its worker; then those of jobs that lay in the queue for 60 s before."""
    labels = 'namespace="dynamo-epd",graph="epd",dynamo_component="ImageWorker",worker="a"'
    series = [
        {"series": f"epd_stage_queue_seconds_sum{{{labels}}}", "values": "0+3x40"},
        {"series": f"epd_stage_queue_seconds_count{{{labels}}}", "values": "0+1x40"},
        {"series": f"epd_job_queue_seconds_sum{{{labels}}}", "values": "0x20 60+60x20"},
        {"series": f"epd_stage_queue_depth{{{labels}}}", "values": "1x40"},
    ]
    query = trigger(objects, "ImageWorker")["metadata"]["query"]
    answers(tmp_path, series, [(query, "4m", 3), (query, "9m", 63)])


@needs_promtool
def test_jobs_that_no_worker_has_taken_count_once_and_never_as_nothing(objects: list[Object], tmp_path: Path) -> None:
    """Both workers tell of the one queue, a moment apart; then it is empty; then nobody is there to tell."""
    series = []
    for worker, values in (("a", "40x20 0x20 stale"), ("b", "39x20 0x20 stale")):
        labels = f'namespace="dynamo-epd",graph="epd",dynamo_component="ImageWorker",worker="{worker}"'
        series.append({"series": f"epd_job_queue_depth{{{labels}}}", "values": values})
    other = 'namespace="other",graph="epd",dynamo_component="ImageWorker",worker="a"'
    series.append({"series": f"epd_job_queue_depth{{{other}}}", "values": "90x60"})
    query = triggers(objects, "ImageWorker")["jobs"]["metadata"]["query"]
    answers(tmp_path, series, [(query, "4m", 40), (query, "9m", 0), (query, "14m", 0)])


@needs_promtool
def test_a_stage_in_which_nothing_ends_is_left_as_it_is(objects: list[Object], tmp_path: Path) -> None:
    """Five requests are there and none ends; then all of them have, after three minutes each; then nobody is left."""
    series, asked = [], []
    for stage in STAGES:
        labels = f'namespace="dynamo-epd",graph="epd",dynamo_component="{stage}",worker="a"'
        series += [
            {"series": f"epd_stage_queue_seconds_sum{{{labels}}}", "values": "60x20 960x40"},
            {"series": f"epd_stage_queue_seconds_count{{{labels}}}", "values": "20x20 25x40"},
            {"series": f"epd_stage_queue_depth{{{labels}}}", "values": "5x20 0x40"},
        ]
        found = trigger(objects, stage)["metadata"]
        query = found["query"]
        # what the autoscaler multiplies by is then 1
        asked += [(query, "4m", float(found["threshold"])), (query, "5m30s", 180), (query, "9m", 0)]
    answers(tmp_path, series, asked)
