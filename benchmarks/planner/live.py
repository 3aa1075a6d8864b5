# SPDX-License-Identifier: Apache-2.0
"""The planner in a real `dynamo serve`: clients that double and halve, and the workers that follow.

``python -m benchmarks.planner.live`` writes ``live.json`` and ``live.png``: a toy graph of two stages that sleep, in
processes, with real metrics and drains. ``--graph cova`` writes ``live-cova.json`` and ``live-cova.png``: content
validation on the tiny models, with clients that want pictures, and one that chats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.planner.replay import HERE
from tests import planned
from tests.toys.calling import Callers, Sampling
from tests.toys.running import Served

WORK_SECONDS = 0.3
PHASES = ((1, 20), (2, 20), (4, 40), (2, 20), (1, 40))
"""(clients, seconds)"""
COVA_PHASES = ((1, 40), (2, 40), (4, 180), (2, 60), (1, 90))
"""An image worker takes far longer to start than one that sleeps."""
STAGES = ("Busy", "Calm")
LIMITS = "{max: 4, cool-down: 5, window: 8, queue-target: 0.5}"
SETTINGS = (
    "--Planner.no-operation=false",
    "--Planner.interval=0.5",
    *(f"--Planner.stages.{stage}={LIMITS}" for stage in STAGES),
)


def toy() -> dict[str, Any]:
    """What ``live.json`` has: samples of clients and of the workers that serve, and how the requests went."""
    with (
        tempfile.TemporaryDirectory(prefix="epd") as home,
        Served(Path(home), "tests/toys/scaled.py:Front", *SETTINGS) as graph,
    ):
        graph.wait_until_up()
        with Callers(graph, seconds=WORK_SECONDS, think=WORK_SECONDS) as callers:
            samples = sampled(graph, callers, STAGES, PHASES)
        graph.stop()
        return found(graph, callers, SETTINGS, samples)


def cova() -> dict[str, Any]:
    """The same of the real engines."""
    with planned.planned() as graph:
        with planned.Chatting(graph) as chatting, planned.Painters(graph) as painters:
            samples = sampled(graph, painters, planned.STAGES, COVA_PHASES)
        return found(graph, painters, planned.SETTINGS, samples) | {"chats": len(chatting.texts)}


def sampled(
    graph: Served, callers: Callers, stages: Sequence[str], phases: Sequence[tuple[int, int]]
) -> list[dict[str, float]]:
    with Sampling(graph.state, callers, stages) as sampling:
        for clients, seconds in phases:
            callers.number(clients)
            time.sleep(seconds)
    return sampling.samples


def found(graph: Served, callers: Callers, settings: Sequence[str], samples: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "requests": len(callers.answers),
        "failed": len(callers.lost),
        "settings": settings,
        "changes": [line for line in graph.lines if "→" in line],
        "samples": samples,
    }


def draw(found: dict[str, Any], stages: Sequence[str], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    seconds = [one["seconds"] for one in found["samples"]]
    axes.step(seconds, [one["clients"] for one in found["samples"]], ":", color="0.4", where="post", label="clients")
    for stage in stages:
        axes.step(seconds, [one[stage] for one in found["samples"]], where="post", label=f"workers of {stage}")
    axes.set_xlabel("seconds")
    axes.set_ylim(0, 4.4)
    axes.legend(loc="upper right")
    figure.suptitle(f"dynamo serve with the planner on: {found['requests']} requests, {found['failed']} failed")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.live", description=__doc__)
    parser.add_argument("--graph", choices=("toy", "cova"), default="toy")
    graph = parser.parse_args().graph
    run, stages, name = (toy, STAGES, "live") if graph == "toy" else (cova, planned.STAGES, "live-cova")
    result = run()
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    draw(result, stages, HERE / f"{name}.png")
    print("\n".join([*result["changes"], f"{result['requests']} requests, {result['failed']} failed"]))


if __name__ == "__main__":
    main()
