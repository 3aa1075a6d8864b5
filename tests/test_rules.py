# SPDX-License-Identifier: Apache-2.0
"""Recording rules and alerts, by Prometheus' own tools. Over running graphs: test_observability.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus_server import DIRECTORY, needs_prometheus
from tests.toys.running import ROOT

RULES = sorted((DIRECTORY / "prometheus" / "rules").glob("*.yaml"))
UNIT_TESTS = DIRECTORY / "prometheus" / "tests" / "alerts.yaml"
MONITOR = ROOT / "deploy" / "kubernetes" / "base" / "monitor.yaml"


def rules(kind: str) -> list[dict[str, Any]]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def promtool(*arguments: str | Path) -> str:
    ran = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@needs_prometheus
def test_configuration_and_rules_are_valid() -> None:
    said = promtool("check", "config", DIRECTORY / "prometheus" / "prometheus.yml")
    assert "SUCCESS: 2 rule files found" in said
    promtool("check", "rules", *RULES)


@needs_prometheus
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", UNIT_TESTS)


@needs_prometheus
def test_the_unit_tests_would_notice_another_threshold(tmp_path: Path) -> None:
    text = UNIT_TESTS.read_text()
    for file in RULES:
        changed = file.read_text().replace("ratio_rate5m > 0.05", "ratio_rate5m > 0.5")
        (tmp_path / file.name).write_text(changed)
        text = text.replace(f"../rules/{file.name}", file.name)
    (tmp_path / "tests.yaml").write_text(text)
    with pytest.raises(AssertionError, match="alertname: DynamoRequestsFail"):
        promtool("test", "rules", tmp_path / "tests.yaml")


def test_each_alert_is_tried_in_both_ways() -> None:
    tried = [one for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for one in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules("alert")}
    assert {one["alertname"] for one in tried if one["exp_alerts"]} == names
    assert {one["alertname"] for one in tried if not one["exp_alerts"]} == names


def test_each_alert_says_what_it_is_and_where_to_read_what_to_do() -> None:
    headings = re.findall(r"(?m)^### (\w+)$", (DIRECTORY / "README.md").read_text())
    assert headings == [rule["alert"] for rule in rules("alert")]
    for rule in rules("alert"):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
        assert rule["annotations"]["runbook_url"] == f"deploy/observability/README.md#{rule['alert'].lower()}"


def test_each_recording_rule_says_level_metric_and_operation() -> None:
    names = [rule["record"] for rule in rules("record")]
    assert names
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"(stage|graph):\w+:\w+", name)


@needs_prometheus
def test_on_a_cluster_a_stage_without_ready_pods_and_a_container_that_died_are_alerts(tmp_path: Path) -> None:
    """There a pod that is not ready is no target: its series end, and no scrape fails."""
    objects = list(yaml.safe_load_all(MONITOR.read_text()))
    (pods,) = [one["spec"] for one in objects if one["kind"] == "PrometheusRule"]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump(pods))
    series = {
        # one of two pods leaves for good at 5m; the only one of its stage at 10m; a container dies and is back
        'up{graph="g", dynamo_component="Left", worker="a"}': "1x20 stale",
        'up{graph="g", dynamo_component="Left", worker="b"}': "1x400",
        'up{graph="g", dynamo_component="Lost", worker="c"}': "1x40 stale",
        'up{graph="g", dynamo_component="Died", worker="d"}': "1x39 stale 1x400",
        'process_start_time_seconds{graph="g", dynamo_component="Left", worker="b"}': "7x400",
        'process_start_time_seconds{graph="g", dynamo_component="Died", worker="d"}': "7x39 stale 900x400",
        # what `dynamo serve` has started again and counted is another alert's
        'process_start_time_seconds{graph="g", dynamo_component="Left", worker="e"}': "7x40 900x400",
        'epd_worker_restarts_total{graph="g", dynamo_component="Left", worker="e"}': "0x40 1x400",
    }
    at = {
        "DynamoStageNotReady": {"9m": [], "10m30s": [], "12m": ["Lost"], "60m": ["Lost"], "75m": []},
        "DynamoContainerDied": {"9m": [], "12m": ["Died"], "30m": []},
    }
    alerts = [rule for group in pods["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in alerts} == at.keys()
    runbooks = {rule["annotations"]["runbook_url"] for rule in rules("alert")}
    assert {rule["annotations"]["runbook_url"] for rule in alerts} < runbooks
    tests = [
        {"expr": f'sum by (dynamo_component) (ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": moment}
        | {"exp_samples": [{"labels": f'{{dynamo_component="{stage}"}}', "value": 1} for stage in stages]}
        for name, moments in at.items()
        for moment, stages in moments.items()
    ]
    inputs = [{"series": one, "values": values} for one, values in series.items()]
    test = {
        "rule_files": ["pods.yaml", *map(str, RULES)],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": tests}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "test.yaml")
