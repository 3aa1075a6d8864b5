# SPDX-License-Identifier: Apache-2.0
"""Measures the service times of a running graph, and writes them into the trace's table.

``python -m benchmarks.planner.measure GRAPH`` asks for validations, one at a time, so that nothing waits: each goes
through every stage. The seconds are the stages' own, ``epd_stage_run_seconds``, looked at after every request for their
spread. Exit status 2 when there is no such graph.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import platform
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.planner.replay import HERE
from dynamo_epd.planning.doors import DoorClosed, SupervisorDoor
from dynamo_epd.planning.observing import Observer
from dynamo_epd.planning.policy import Observed
from dynamo_epd.planning.traces import ServiceTime, read_trace
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.control import find

PROMPTS = ("a large red star on a blue background", "a small green ring on a yellow background")
REST_SECONDS = 0.05
"""A stage may end a moment after the reply: from one look for that to the next, `REST_LOOKS` times at most."""
REST_LOOKS = 40


async def service_times(path: str, url: str, requests: int) -> dict[str, ServiceTime]:
    """Stage → mean and spread of one run. Raises DoorClosed, and what urllib raises for a request that is refused."""
    door, observer = SupervisorDoor(path), Observer()

    async def at_rest() -> dict[str, Observed]:
        for _ in range(REST_LOOKS):
            seen = await observer.look(await door.services())
            if not any(one.in_stage for one in seen.values()):
                break
            await asyncio.sleep(REST_SECONDS)
        return seen

    try:
        for warm_up in range(2):
            await asyncio.to_thread(_validate, url, -1 - warm_up)
        looks = [await at_rest()]
        for number in range(requests):
            await asyncio.to_thread(_validate, url, number)
            looks.append(await at_rest())
    finally:
        await observer.close()
    found = {stage: service_time([look[stage] for look in looks if stage in look]) for stage in looks[0]}
    return {stage: one for stage, one in found.items() if one is not None}


def service_time(looks: Sequence[Observed]) -> ServiceTime | None:
    """From looks at a stage at rest, a request between each and the next. None where fewer than two have run in it.

    Of a request that runs more than once only the mean is known. ``k`` runs have a mean that varies ``k`` times less
    than one run does: so it counts ``k`` times (the mean square between groups of an analysis of variance).
    """
    grown = [(b.finished - a.finished, b.run_seconds - a.run_seconds) for a, b in itertools.pairwise(looks)]
    ran = [(runs, seconds) for runs, seconds in grown if runs]
    if len(ran) < 2:
        return None
    mean = sum(seconds for _, seconds in ran) / sum(runs for runs, _ in ran)
    variance = sum(runs * (seconds / runs - mean) ** 2 for runs, seconds in ran) / (len(ran) - 1)
    return ServiceTime(mean, math.sqrt(variance) / mean if mean else 0.0)


def _validate(url: str, number: int) -> None:
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": 1000 + number}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/validations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        reply.read()


def written(trace: dict[str, Any], measured: dict[str, ServiceTime], how: str) -> dict[str, Any]:
    """The trace with new service times. Raises ValueError when a stage of it was not measured."""
    stages = trace["service_times"]["stages"]
    if missing := stages.keys() - measured.keys():
        raise ValueError(
            f"nothing ran in {', '.join(sorted(missing))}: serve the graph with all stages and their metrics"
        )
    table = {
        name: {"seconds": round(measured[name].seconds, 5), "spread": round(measured[name].spread, 3)}
        for name in stages
    }
    return trace | {"service_times": {"measured": True, "how": how, "stages": table}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.planner.measure", description=__doc__)
    parser.add_argument("graph", help="named as `dynamo serve` was told")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--trace", type=Path, default=HERE / "trace.json")
    arguments = parser.parse_args()
    try:
        socket = find(arguments.graph, [])["socket"]
        measured = asyncio.run(service_times(socket, arguments.url, arguments.requests))
        how = (
            f"Means and spreads of {arguments.requests} validations, one at a time, on {os.cpu_count()} cores "
            f"({platform.machine()}): `python -m benchmarks.planner.measure {arguments.graph}`."
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
