# SPDX-License-Identifier: Apache-2.0
"""Calls of Dynamo's runtime with nothing of ours around them: what each call between a graph's stages costs at least.

One process serves an endpoint that answers with a word, another one calls it, over NATS and found by files, as the
stages of a graph on one machine do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.arms import free_port
from benchmarks.obedient import Obedient
from benchmarks.owners import ordered, say
from dynamo_epd.sdk.nats_server import nats_binary

ADDRESS = "benchmarks.bare.generate"
ROLES = ("endpoint", "caller")
WARM_UP = 50


def calls(count: int) -> list[float]:
    """Seconds of each of ``count`` calls, one after the other, from the request to the end of its stream. Raises
    RuntimeError where one of the processes has ended."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = os.environ | {"NATS_SERVER": stack.enter_context(_nats(place)), "DYN_FILE_KV": str(place / "kv")}
        environment |= {"DYN_LOG": "error", "DYN_RUNTIME_NUM_WORKER_THREADS": "1"}  # as a graph's workers have it
        for role in ROLES:
            command = [sys.executable, "-m", "benchmarks.bare", role]
            # The runtime has a line for each call, whatever its log is told.
            one = Obedient(f"the bare {role}", command, environment=environment, log=place / f"{role}.log")
            stack.callback(one.close)
            one.answer()
        seconds: list[float] = one.ask("call", count=count)["seconds"]
        return seconds


@contextmanager
def _nats(place: Path) -> Iterator[str]:
    """Its address."""
    port = free_port()
    with (place / "nats.log").open("wb") as log:
        server = subprocess.Popen([nats_binary(), "-a", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


async def obey(role: str) -> None:
    from dynamo._core import DistributedRuntime

    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "nats")
    endpoint = runtime.endpoint(ADDRESS)
    if role == "endpoint":
        serving = asyncio.ensure_future(endpoint.serve_endpoint(_word))
        say({})
        await ordered()
        serving.cancel()
    else:
        client = await endpoint.client()
        await client.wait_for_instances()
        say({})
        while (order := await ordered()) is not None:
            took = [await _call(client) for _ in range(WARM_UP + order["count"])]
            say({"seconds": took[WARM_UP:]})
    runtime.shutdown()


async def _word(_request: Any) -> AsyncIterator[str]:
    yield "word"


async def _call(client: Any) -> float:
    began = time.perf_counter()
    async for _ in await client.round_robin("question"):
        """Its one word."""
    return time.perf_counter() - began


if __name__ == "__main__":
    asyncio.run(obey(sys.argv[1]))
