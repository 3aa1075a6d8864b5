# SPDX-License-Identifier: Apache-2.0
"""The planner in a real `dynamo serve`: a toy graph of two stages that sleep, and clients that double and halve.

``python -m benchmarks.planner.live`` writes ``live.json`` and ``live.png``: processes, metrics and drains are real.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.planner.replay import HERE
from tests.toys.calling import Callers, ready
from tests.toys.running import Served

WORK_SECONDS = 0.3
PHASES = ((1, 20), (2, 20), (4, 40), (2, 20), (1, 40))
"""(clients, seconds)"""
LOOK_SECONDS = 1.0
STAGES = ("Busy", "Calm")
LIMITS = "{max: 4, cool-down: 5, window: 8, queue-target: 0.5}"
SETTINGS = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    *(f"--Planner.stages.{stage}={LIMITS}" for stage in STAGES),
)


def run(home: Path) -> dict[str, Any]:
    """What ``live.json`` has: samples of clients and of the workers that serve, and how the requests went."""
    samples = []
    with Served(home, "tests/toys/scaled.py:Front", *SETTINGS) as graph:
        graph.wait_until_up()
        began = time.monotonic()
        with Callers(graph, seconds=WORK_SECONDS, think=WORK_SECONDS) as callers:
            for clients, seconds in PHASES:
                callers.number(clients)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    workers = ready(home)
                    sample = {"seconds": round(time.monotonic() - began, 1), "clients": clients}
                    samples.append(sample | {stage: workers[stage] for stage in STAGES})
                    time.sleep(LOOK_SECONDS)
        graph.stop()
        changes = [line for line in graph.lines if "→" in line]
    return {
        "requests": len(callers.answers),
        "failed": len(callers.lost),
        "settings": SETTINGS,
        "changes": changes,
        "samples": samples,
    }


def draw(found: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    seconds = [one["seconds"] for one in found["samples"]]
    axes.step(seconds, [one["clients"] for one in found["samples"]], ":", color="0.4", where="post", label="clients")
    for stage in STAGES:
        axes.step(seconds, [one[stage] for one in found["samples"]], where="post", label=f"workers of {stage}")
    axes.set_xlabel("seconds")
    axes.set_ylim(0, 4.4)
    axes.legend(loc="upper right")
    figure.suptitle(f"dynamo serve with the planner on: {found['requests']} requests, {found['failed']} failed")
    figure.savefig(file)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="epd") as home:
        found = run(Path(home))
    (HERE / "live.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    draw(found, HERE / "live.png")
    print("\n".join([*found["changes"], f"{found['requests']} requests, {found['failed']} failed"]))


if __name__ == "__main__":
    main()
