# SPDX-License-Identifier: Apache-2.0
"""Measures the service times of a running graph, and writes them into the trace's table.

``python -m benchmarks.planner.measure GRAPH`` asks for validations, one at a time, so that nothing waits: each goes
through every stage. The seconds are the stages' own, ``epd_stage_run_seconds`` over what was asked here. Exit status 2
when there is no such graph.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.planner.replay import HERE
from dynamo_epd.planning.doors import DoorClosed, SupervisorDoor
from dynamo_epd.planning.observing import Observer
from dynamo_epd.planning.policy import Observed
from dynamo_epd.planning.traces import read_trace
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.control import find

PROMPTS = ("a large red star on a blue background", "a small green ring on a yellow background")


async def run_seconds(path: str, url: str, requests: int) -> dict[str, float]:
    """Stage → mean seconds of one run. Raises DoorClosed, and what urllib raises for a request that is refused."""
    door, observer = SupervisorDoor(path), Observer()
    try:
        for warm_up in range(2):
            await asyncio.to_thread(_validate, url, -1 - warm_up)
        before = await observer.look(await door.services())
        for number in range(requests):
            await asyncio.to_thread(_validate, url, number)
        after = await observer.look(await door.services())
    finally:
        await observer.close()
    return {stage: seconds for stage in before if (seconds := _mean(before[stage], after[stage])) is not None}


def _mean(before: Observed, after: Observed) -> float | None:
    runs = after.finished - before.finished
    return (after.run_seconds - before.run_seconds) / runs if runs else None


def _validate(url: str, number: int) -> None:
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": 1000 + number}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/validations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()


def written(trace: dict[str, Any], measured: dict[str, float], how: str) -> dict[str, Any]:
    """The trace with new service times. Raises ValueError when a stage of it was not measured."""
    stages = trace["service_times"]["stages"]
    if missing := stages.keys() - measured.keys():
        raise ValueError(
            f"nothing ran in {', '.join(sorted(missing))}: serve the graph with all stages and their metrics"
        )
    table = {name: {**one, "seconds": round(measured[name], 5)} for name, one in stages.items()}
    return trace | {"service_times": {"measured": True, "how": how, "stages": table}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.measure", description=__doc__)
    parser.add_argument("graph", help="named as `dynamo serve` was told")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--trace", type=Path, default=HERE / "trace.json")
    arguments = parser.parse_args()
    try:
        measured = asyncio.run(run_seconds(find(arguments.graph, [])["socket"], arguments.url, arguments.requests))
        how = (
            f"Means of {arguments.requests} validations, one at a time, on {os.cpu_count()} cores "
            f"({platform.machine()}): `python -m benchmarks.planner.measure {arguments.graph}`. Spreads are assumed."
        )
        trace = written(json.loads(arguments.trace.read_text()), measured, how)
    except (ConfigError, DoorClosed, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.trace.write_text(json.dumps(trace, indent=2) + "\n")
    read_trace(arguments.trace)
    print(json.dumps(trace["service_times"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
