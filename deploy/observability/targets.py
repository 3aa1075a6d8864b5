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

    async def look(self) -> list[Group]:
        """One group per worker, in the form of ``file_sd_config``."""
        records = _records()
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
        before = {group["labels"]["worker"] for group in self._graphs.get(pid, [])}
        named = {worker for worker, (_, one) in workers.items() if one["ready"] or worker in before}
        return [
            {
                "targets": [workers[worker][1]["metrics"].removeprefix("http://").removesuffix("/metrics")],
                "labels": {"graph": graph, "dynamo_component": workers[worker][0], "worker": worker},
            }
            for worker in sorted(named)
        ]


def _records() -> dict[str, dict[str, str]]:
    """Process → ``graph`` and ``socket`` of every graph that is there. Nothing is removed: that is `dynamo serve`'s."""
    found = {}
    try:
        files = sorted((state_dir() / "graphs").glob("*.json"))
    except OSError:  # a volume that this process may only read, and in which no graph has been served yet
        return {}
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # it ends, or was killed and has left this behind
            os.kill(int(file.stem), 0)
            found[file.stem] = json.loads(file.read_text())
    return found


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
