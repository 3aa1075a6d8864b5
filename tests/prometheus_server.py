# SPDX-License-Identifier: Apache-2.0
"""Debian's Prometheus over the graphs of one state directory, with the configuration and the rules that we ship."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serving import eventually
from tests.toys.running import ROOT, clean_environment, free_port

DIRECTORY = ROOT / "deploy" / "observability"
INTERVAL = "500ms"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Debian's prometheus is not installed",
)


class Prometheus:
    """``with Prometheus(home, state) as prometheus``. ``state``: the graphs' ``XDG_STATE_HOME``.

    Only paths and intervals differ from ``prometheus.yml``. ``targets.py`` runs beside it, as its README says.
    """

    def __init__(self, home: Path, state: Path):
        self.url = f"http://127.0.0.1:{free_port()}"
        self._home, self._state = home, state
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Prometheus:
        config = yaml.safe_load((DIRECTORY / "prometheus" / "prometheus.yml").read_text())
        for key in ("scrape_interval", "scrape_timeout", "evaluation_interval"):
            config["global"][key] = INTERVAL
        config["rule_files"] = [str(DIRECTORY / "prometheus" / path) for path in config["rule_files"]]
        (job,) = config["scrape_configs"]
        (discovery,) = job["file_sd_configs"]
        targets = self._home / "targets.json"
        discovery |= {"files": [str(targets)], "refresh_interval": "1s"}
        file = self._home / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._run(sys.executable, str(DIRECTORY / "targets.py"), str(targets), XDG_STATE_HOME=str(self._state))
        self._run(
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={self._home / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            "--log.level=warn",
        )
        eventually(self._is_ready, "Prometheus is ready", 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _run(self, *command: str, **environment: str) -> None:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment() | environment)
        self._running.callback(process.wait, 20)
        self._running.callback(process.terminate)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
            return True
        return False

    def _get(self, path: str, **query: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as refused:
            raise AssertionError(f"{query}: {refused.read().decode()}") from refused

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample that there is now; those that are no number are none."""
        samples = [(one["metric"], float(one["value"][1])) for one in self._get("query", query=expression)["result"]]
        return [(labels, value) for labels, value in samples if not math.isnan(value)]

    def values(self, label: str, selector: str) -> list[str]:
        """Of a label in the series that match, as Grafana's ``label_values``."""
        found: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return found

    def firing(self) -> set[tuple[str, str]]:
        """Alert and worker."""
        alerts = [one for one in self._get("alerts")["alerts"] if one["state"] == "firing"]
        return {(one["labels"]["alertname"], one["labels"].get("worker", "")) for one in alerts}
