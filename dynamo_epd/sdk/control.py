# SPDX-License-Identifier: Apache-2.0
"""The door of a running graph: a Unix socket for its user alone, and the record by which `dynamo scale` finds it.

One connection is one question: a JSON object on a line in, one on a line out, and the end.

    {"do": "status"}                                        → {"services": {"Name": [{"index", "ready", ...}]}}
    {"do": "scale", "service": "Name", "workers": 3}        → {"before": 1}; "why": "one line" may be said too
    what cannot be                                          → {"error": "one line"}
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.nats_server import state_dir
from dynamo_epd.sdk.scaling import Scaling, ScalingRefused, split_assignments
from dynamo_epd.sdk.serve import Plan

SOCKET = "DYNAMO_CONTROL"
"""Environment of the planner: the door's path."""
LINE_BYTES = 64 * 1024
AT_ONCE = 16
WHY_CHARACTERS = 200
ANSWER_SECONDS = 10.0
POLL_SECONDS = 0.5


class ControlError(Exception):
    """The graph refused, or did not answer as it should. The message is one line."""


class Control:
    """The door, open from `open` to `close`; its socket lies in ``directory``, which no other user may enter."""

    def __init__(self, plan: Plan, directory: Path, scaling: Scaling):
        self.path = directory / "control"
        self._plan, self._scaling = plan, scaling
        self._record: Path | None = None
        self._places = asyncio.Semaphore(AT_ONCE)
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=LINE_BYTES)
        self.path.chmod(0o600)
        _running()  # it removes the records of graphs that were killed
        self._record = _records() / f"{os.getpid()}.json"
        record = {"graph": self._plan.spec, "services": self._plan.services, "pid": os.getpid()}
        self._record.write_text(json.dumps(record | {"socket": str(self.path)}))

    def close(self) -> None:
        """Nothing is let in any more; the socket itself goes with its directory."""
        if self._record is not None:
            self._record.unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # the caller may be gone, too slow, or have sent too much: then there is nobody to answer
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            try:
                async with asyncio.timeout(ANSWER_SECONDS), self._places:
                    answer = await self._answer(await reader.readline())
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
            finally:
                writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
        except ValueError:
            return {"error": "that is not JSON"}
        match asked:
            case {"do": "status"}:
                return {"services": self._scaling.status()}
            case {"do": "scale", "service": str(service), "workers": int(workers)} if not isinstance(workers, bool):
                try:
                    # a caller that goes must not leave half of the workers started
                    why = " ".join(str(asked.get("why", "by hand")).split())[:WHY_CHARACTERS]
                    return {"before": await asyncio.shield(self._scaling.resize(service, workers, why))}
                except ScalingRefused as refused:
                    return {"error": str(refused)}
        return {"error": "nothing of that kind can be asked"}


async def ask(path: str | Path, **question: Any) -> dict[str, Any]:
    """One answer. Raises ControlError for a refusal, and when nobody answers within `ANSWER_SECONDS`."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_BYTES)
            try:
                writer.write(json.dumps(question).encode() + b"\n")
                await writer.drain()
                answer: dict[str, Any] = json.loads(await reader.readline())
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise ControlError(f"the graph does not answer: {error or type(error).__name__}") from error
    if "error" in answer:
        raise ControlError(answer["error"])
    return answer


def scale(arguments: argparse.Namespace) -> int:
    """``dynamo scale GRAPH [Service=N ...]``: changes numbers of workers, waits until it is so, and prints them.

    Exit status 0; 1 when the graph refuses, or is not there within ``--timeout``. Raises ConfigError for a graph that
    does not run.
    """
    wanted = split_assignments(arguments.workers)
    path = find(arguments.graph, list(wanted), arguments.pid)["socket"]
    try:
        return asyncio.run(_scale(path, wanted, arguments.timeout if arguments.wait else 0.0))
    except ControlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def _scale(path: str, wanted: dict[str, int], timeout: float) -> int:
    for service, count in wanted.items():
        answer = await ask(path, do="scale", service=service, workers=count)
        print(f"{service}: {answer['before']} → {count} workers", flush=True)
    end = time.monotonic() + timeout
    while True:
        services = (await ask(path, do="status"))["services"]
        if time.monotonic() > end or not any(_underway(services[name], count) for name, count in wanted.items()):
            break
        await asyncio.sleep(POLL_SECONDS)
    for name in wanted or services:
        ready = sum(one["ready"] for one in services[name])
        rest = len(services[name]) - ready
        print(f"{name}: {ready} ready" + (f", {rest} starting or leaving" if rest else ""))
    reached = all(sum(one["ready"] for one in services[name]) == count for name, count in wanted.items())
    return 0 if reached or not timeout else 1


def _underway(workers: list[dict[str, Any]], count: int) -> bool:
    """Whether the number is on its way: it is not when a worker was taken back, or another one asked for others."""
    staying = [one for one in workers if not one["leaving"]]
    return len(staying) == count and not (len(workers) == count and all(one["ready"] for one in workers))


def find(graph: str | None, services: list[str], pid: int | None = None) -> dict[str, Any]:
    """The record of the graph that was served as ``graph``, or of the only one, and runs now.

    Keys ``graph``, ``services``, ``pid``, and ``socket``: its door. Raises ConfigError for none, or several.
    """
    running = _running()
    found = [one for one in running if _same(one["graph"], graph or one["graph"]) and pid in (None, one["pid"])]
    if not found:
        others = ", ".join(sorted({one["graph"] for one in running})) or "none"
        raise ConfigError(f"no graph {graph or ''}".rstrip() + f" runs for this user; running: {others}")
    if len(found) > 1:  # terminals with a service each
        found = [one for one in found if set(services) <= set(one["services"])] or found
    if len(found) > 1:
        running_as = ", ".join(f"{one['pid']} ({one['graph']})" if graph is None else str(one["pid"]) for one in found)
        raise ConfigError(f"{graph or 'more than one graph'} runs as processes {running_as}: say which with --pid")
    return found[0]


def _running() -> list[dict[str, Any]]:
    """Every record whose graph is there; what a killed one left is removed."""
    found = []
    for file in _records().glob("*.json"):
        try:
            os.kill(int(file.stem), 0)
            record = json.loads(file.read_text())
            if Path(record["socket"]).is_socket():
                found.append(record)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written or removed just now, or not ours
    return found


def _same(served: str, asked: str) -> bool:
    """``./a/b.py:C`` is ``a/b.py:C``; any other difference is one."""
    return served.removeprefix("./") == asked.removeprefix("./")


def _records() -> Path:
    path = state_dir() / "graphs"
    path.mkdir(exist_ok=True, mode=0o700)
    return path
