# SPDX-License-Identifier: Apache-2.0
"""Tells Prometheus which workers of this user's graphs there are: a file for its file-based service discovery.

``python deploy/observability/targets.py [FILE]`` asks every running graph through its control socket, as `dynamo scale`
does, and writes FILE whenever the answer changes, until it is interrupted. A worker is named once it has been ready
and no more once it drains, so that a scrape of a named one fails only when something is wrong with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dynamo_epd.sdk.control import ControlError, ask
from dynamo_epd.sdk.nats_server import state_dir

DEFAULT = Path(__file__).resolve().parents[2] / "build" / "prometheus" / "targets.json"
"""Where ``prometheus/prometheus.yml`` looks."""
SECONDS = 1.0

Group = dict[str, Any]


class Targets:
    """What was last known of each graph. One that is there and does not answer keeps its workers."""

    def __init__(self) -> None:
        self._graphs: dict[str, list[Group]] = {}
        self._seen_ready: set[tuple[str, str]] = set()

    async def look(self) -> list[Group]:
        """One group per worker, in the form of ``file_sd_config``."""
        records = {}
        for file in sorted((state_dir() / "graphs").glob("*.json")):
            try:
                records[file.stem] = json.loads(file.read_text())
                os.kill(int(file.stem), 0)
            except (OSError, ValueError):  # it ends, or was killed and has left this behind
                records.pop(file.stem, None)
        self._graphs = {pid: groups for pid, groups in self._graphs.items() if pid in records}
        for pid, record in records.items():
            try:
                services = (await ask(record["socket"], do="status"))["services"]
            except ControlError:
                continue
            self._graphs[pid] = self._groups(pid, record["graph"], services)
        return [group for groups in self._graphs.values() for group in groups]

    def _groups(self, pid: str, graph: str, services: dict[str, list[dict[str, Any]]]) -> list[Group]:
        workers = {
            f"{service}-{one['index']}": (service, one)
            for service, those in services.items()
            for one in those
            if one["metrics"] is not None and not one["leaving"]
        }
        before = {worker for graph_pid, worker in self._seen_ready if graph_pid == pid}
        named = {worker for worker, (_, one) in workers.items() if one["ready"] or worker in before}
        self._seen_ready = {key for key in self._seen_ready if key[0] != pid} | {(pid, worker) for worker in named}
        return [
            {
                "targets": [workers[worker][1]["metrics"].removeprefix("http://").removesuffix("/metrics")],
                "labels": {"graph": graph, "dynamo_component": workers[worker][0], "worker": worker},
            }
            for worker in sorted(named)
        ]


async def keep(file: Path) -> None:
    """Writes ``file`` until cancelled. It is replaced as a whole: Prometheus never reads half of it."""
    targets, written = Targets(), ""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        text = json.dumps(await targets.look(), indent=2) + "\n"
        if text != written:
            whole = file.with_suffix(".new")
            whole.write_text(text)
            whole.replace(file)
            written = text
        await asyncio.sleep(SECONDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the workers of running graphs for Prometheus.")
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(keep(parser.parse_args().file))
