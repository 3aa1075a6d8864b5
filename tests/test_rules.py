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

RULES = sorted((DIRECTORY / "prometheus" / "rules").glob("*.yaml"))
UNIT_TESTS = DIRECTORY / "prometheus" / "tests" / "alerts.yaml"


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
