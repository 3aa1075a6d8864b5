# SPDX-License-Identifier: Apache-2.0
"""The dashboards' form. That each panel has data: test_observability.py."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from deploy.observability.dashboards import COLUMNS, DASHBOARDS, DIRECTORY, text

PANELS = [(name, panel) for name, (_, panels) in DASHBOARDS.items() for panel in panels]


def test_what_is_committed_is_what_the_script_writes() -> None:
    assert {file.stem: file.read_text() for file in DIRECTORY.iterdir()} == {name: text(name) for name in DASHBOARDS}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_provisioned(name: str) -> None:
    """As Grafana's JSON model has it: an identifier of at most 40 characters, panels side by side on its grid."""
    board: dict[str, Any] = json.loads(text(name))
    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"])
    variables = {one["name"] for one in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and all(x < COLUMNS for x, _ in cells)
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        used = {found for target in panel["targets"] for found in re.findall(r"\$(\w+)", target["expr"])}
        assert used - {"__rate_interval"} <= variables
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=[f"{name}: {panel.title}" for name, panel in PANELS])
def test_a_panel_says_what_it_shows_and_what_to_do(name: str, panel: Any) -> None:
    assert panel.unit and panel.queries
    assert len(panel.description.split()) >= 5, "what to do with the number"
    assert panel.kind == "stat" or all(legend for _, legend in panel.queries)
    for expression, _ in panel.queries:
        for histogram in re.findall(r"histogram_quantile\((.*)\)", expression):
            assert "_bucket{" in histogram and re.search(r"by \([\w, ]*\ble\)", histogram)


def test_provisioning_names_what_the_dashboards_need() -> None:
    provisioning = DIRECTORY.parent / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/dynamo.yaml").read_text())["providers"]
    readme = (DIRECTORY.parents[1] / "README.md").read_text()
    assert source["type"] == "prometheus"
    for value in (source["url"], provider["options"]["path"]):
        assert f"{value.removeprefix('$')}=" in readme, "Grafana takes it from its environment"
