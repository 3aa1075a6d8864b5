# SPDX-License-Identifier: Apache-2.0
"""A process in a graph's NATS that is none of its workers, and sends their endpoints whatever it likes.

``python -m tests.hardening.stranger`` in a worker's environment: JSON from standard input, ``[[address, payload], …]``,
where an address is ``namespace/component/endpoint`` and a payload ``{"bytes": base64}`` or ``{"value": anything}``. Out
come as many answers: every frame that came back, at most `MOST`, bytes as base64, and where it broke off, or nothing
came for `SECONDS`, ``{"stranger": what was raised}``, which no worker has said.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_epd.sdk import wire
from tests.serving import Graph
from tests.toys.running import ROOT

MOST = 4
SECONDS = 30.0
PREFIXES = ("NATS_", "DYN_")


def send(graph: Graph, messages: Sequence[tuple[str, Any]]) -> list[list[Any]]:
    """What came back of each message, which is bytes or a plain value."""
    asked = [
        [address, {"bytes": base64.b64encode(one).decode()} if isinstance(one, bytes) else {"value": one}]
        for address, one in messages
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hardening.stranger"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | credentials(graph) | {"DYN_SYSTEM_PORT": "-1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def ended(frames: Sequence[Any]) -> bool:
    """Whether a worker has said all of this answer, or as much as is taken of it: it did not hang, nor break off."""
    if any(isinstance(frame, dict) and "stranger" in frame for frame in frames):
        return False
    return len(frames) == MOST or (bool(frames) and (frames[-1] is True or isinstance(frames[-1], dict)))


def shown(frame: Any) -> list[Any]:
    """As it goes into an answer: an item and the end that comes with it are two, a beat is none."""
    if not isinstance(frame, bytes):
        return [] if frame is wire.BEAT else [frame]
    item = base64.b64encode(frame.removeprefix(wire.LAST)).decode()
    return [item, wire.END] if frame.startswith(wire.LAST) else [item]


def credentials(graph: Graph) -> dict[str, str]:
    """How the graph's workers reach each other."""
    import psutil

    environment: Mapping[str, str] = psutil.Process(graph.pid("Frontend")).environ()
    return {name: value for name, value in environment.items() if name.startswith(PREFIXES)}


async def _main() -> None:
    from dynamo._core import Context, DistributedRuntime

    asked = json.loads(sys.stdin.read())
    plane, discovery = os.environ["DYN_REQUEST_PLANE"], os.environ["DYN_DISCOVERY_BACKEND"]
    runtime = DistributedRuntime(asyncio.get_running_loop(), discovery, plane)
    places = {address: runtime.endpoint(address.replace("/", ".")) for address in sorted({one[0] for one in asked})}
    clients = {}
    for address, place in places.items():
        clients[address] = await place.client()
        async with asyncio.timeout(SECONDS):
            await clients[address].wait_for_instances()
    answers = []
    for address, payload in asked:
        value = base64.b64decode(payload["bytes"]) if "bytes" in payload else payload["value"]
        frames: list[Any] = []
        try:
            async with asyncio.timeout(SECONDS):
                (instance, *_) = clients[address].instance_ids()
                stream = await clients[address].direct(value, instance, annotated=False, context=Context())
                async for frame in stream:
                    frames += shown(frame)
                    if len(frames) >= MOST or isinstance(frame, dict) or (frames and frames[-1] is wire.END):
                        break
        except Exception as error:  # the runtime's: whatever came is the answer
            frames.append({"stranger": f"{type(error).__name__}: {error}"[:300]})
        answers.append(frames)
    print(json.dumps(answers), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(_main())
    os._exit(0)
