# SPDX-License-Identifier: Apache-2.0
"""Whole graphs on the real engines, as the tests see them: `Served` with a look at its stages.

A graph of these tests shares nothing with another one on the machine: it has its own port, NATS, discovery, system
ports and temporary directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from models.untrained import write
from tests.toys.running import ROOT, Served, clean_environment

START_SECONDS = 900.0
"""Bound of a graph's start: engines are loaded side by side, and the machine may be busy."""
WORKER_SECONDS = "200"
"""Bound of one worker's start: it is then shown and made again."""
SYSTEM_PORTS = 24
SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


_OF_A_STAGE = ("epd_arena_leases", "epd_arena_used_bytes", "epd_stage_queue_depth")
HELD = {
    "Frontend": ("epd_arena_leases", "epd_arena_used_bytes"),
    "EncodeWorker": ("epd_arena_leases", "epd_stage_queue_depth"),  # its arena is its cache, and stays in use
    "PrefillWorker": _OF_A_STAGE,
    "DecodeWorker": _OF_A_STAGE,
    "ImageWorker": _OF_A_STAGE,
    "EmbedWorker": _OF_A_STAGE,
}
"""Metrics that tell what a worker holds for requests."""


@contextlib.contextmanager
def serve(
    graph: str,
    config: str,
    *overrides: str,
    model: Path | None = None,
    within: Sequence[str] = (),
    **environment: str,
) -> Iterator[Graph]:
    """A graph that is up. It is ended by Ctrl-C: exit status 0 and nothing left, or the test fails.

    ``model`` is served instead of the configuration's. ``within`` is what the command runs within, as `Served` has it.
    ``environment`` is added to that of the command.
    """
    home = Path(tempfile.mkdtemp(prefix="epd"))
    if model is not None:
        overrides = (f"--Common.model={model}", *overrides)
    try:
        with Graph(home, graph, "-f", config, *overrides, within=within, **environment) as served:
            served.wait_for(r"^http://", START_SECONDS)
            if "has not come up" in served.text:
                warnings.warn(f"a worker's start stood still:\n{served.text}", stacklevel=3)
            yield served
            if served.process.poll() is None:
                served.finish()
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Graph(Served):
    """One ``dynamo serve``, of the graph that the first argument names. ``home`` is a short path, for it holds
    sockets."""

    def __init__(self, home: Path, *arguments: str, within: Sequence[str] = (), **environment: str):
        self.name = arguments[0]
        self._temporary = home / "tmp"
        self._temporary.mkdir()
        self._shared_memory: set[str] = set()
        self._seen: set[psutil.Process] = set()
        self._told_at: dict[tuple[str, int], tuple[psutil.Process, str]] = {}
        system_port = free_ports(SYSTEM_PORTS)
        own = {
            "TMPDIR": str(self._temporary),
            "DYN_SYSTEM_PORT": str(system_port),
            "DYNAMO_START_SECONDS": WORKER_SECONDS,
        }
        super().__init__(home / "state", *arguments, within=within, **own | environment)

    def __enter__(self) -> Graph:
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pid(self, service: str, index: int = 0) -> int:
        """The process of one worker."""
        found = self.workers(service)
        assert index in found, f"{service}-{index} is not running: {found}\n{self.text}"
        return found[index]

    def metrics(self, service: str, index: int = 0) -> Metrics:
        """What a worker's own system port says now."""
        process, url = self._told_at.get((service, index), (None, ""))
        if process is None or not is_alive(process):  # to look for it takes longer than to ask it
            process = psutil.Process(self.pid(service, index))
            url = f"http://127.0.0.1:{process.environ()['DYN_SYSTEM_PORT']}/metrics"
            self._told_at[service, index] = process, url
        return Metrics.scrape(url)

    def nats(self) -> int | None:
        """The process of the graph's own NATS server."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def tree(self) -> list[psutil.Process]:
        """Every process of the graph; those once seen stay known, whoever their parent is later."""
        with contextlib.suppress(psutil.NoSuchProcess):
            command = psutil.Process(self.process.pid)
            self._seen |= {command, *command.children(recursive=True)}
        return [process for process in self._seen if is_alive(process)]

    def processes(self) -> list[int]:
        # vLLM's engine processes write their title over the environment by which the others are found.
        return sorted({*super().processes(), *(process.pid for process in self.tree())})

    def cpu_seconds(self) -> float:
        """CPU time that the whole graph has taken."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_bytes(self) -> int:
        """Proportional set size of the whole graph: shared pages count once."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    def busy(self) -> dict[str, float]:
        """What is held for requests anywhere, by worker: leases, room in arenas, requests that wait or run. Empty when
        at rest."""
        held: dict[str, float] = {}
        workers = self.all_workers()
        for service, names in HELD.items():
            for index in workers.get(service, {}):
                metrics = self.metrics(service, index)
                held |= {f"{service}-{index} {name}": total for name in names if (total := metrics.total(name))}
        return held

    def finish(self, signal_number: int = signal.SIGINT) -> None:
        """Ctrl-C (or another signal), then asserts exit status 0 and that nothing is left."""
        self.signal(signal_number)
        assert self.wait() == 0, self.text
        assert self.leftovers() == [], self.text

    def signal(self, number: int) -> None:
        self._shared_memory |= self._shared_memory_in_use()
        super().signal(number)

    def leftovers(self) -> list[str]:
        """Processes, state, sockets, shared memory and temporary files that are still there."""
        left = super().leftovers()
        left += [path for path in sorted(self._shared_memory) if Path(path).exists()]
        left += [f"System V segment of {pid}" for pid in _segment_makers() if pid in {one.pid for one in self._seen}]
        left += [str(path) for path in self._temporary.rglob("*") if path.is_socket()]
        left += [str(path) for path in self._temporary.glob("dynamo-*")]
        left += [f"port {self.port} is open"] if listens(self.port) else []
        return left

    def wait(self, timeout: float = 120) -> int:
        return super().wait(timeout)

    def _shared_memory_in_use(self) -> set[str]:
        found = set()
        for process in self.tree():
            with contextlib.suppress(psutil.Error, OSError):
                for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                    path = line.partition("/dev/shm/")[2]
                    if path and not path.endswith("(deleted)"):
                        found.add(f"/dev/shm/{path}")
        return found


class Metrics:
    """One scrape. ``samples`` are (name, labels as text, value)."""

    def __init__(self, text: str):
        self.samples = [
            (match["name"], match["labels"] or "", float(match["value"]))
            for line in text.splitlines()
            if not line.startswith("#") and (match := SAMPLE.fullmatch(line))
        ]

    @classmethod
    def scrape(cls, url: str) -> Metrics:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return cls(reply.read().decode())

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.samples}

    def total(self, name: str, *labels: str) -> float:
        """Sum over the samples of ``name`` whose labels hold every one of ``labels`` (``key="value"``)."""
        return sum(
            value for one, found, value in self.samples if one == name and all(label in found for label in labels)
        )


def eventually(condition: Callable[[], Any], what: str, seconds: float = 20, pause: float = 0.05) -> Any:
    """Polls until ``condition`` holds and returns its value; the bound fails the test with what it said last."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}; last: {value!r}"
        time.sleep(pause)


def at_rest(graph: Graph, seconds: float) -> None:
    """Fails unless every lease and every request is given back within ``seconds``."""
    end = time.monotonic() + seconds
    while held := graph.busy():
        assert time.monotonic() < end, f"still held after {seconds:g} s: {held}"
        time.sleep(0.02)


def resized(graph: Graph, stage: str, count: int) -> None:
    """By `dynamo scale`, which waits until it is so and says it."""
    ran = subprocess.run(
        [sys.executable, "-m", "dynamo_epd.sdk.cli", "scale", graph.name, f"{stage}={count}"],
        cwd=ROOT,
        env=clean_environment() | {"XDG_STATE_HOME": str(graph.state)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert (ran.returncode, ran.stdout.splitlines()[-1:]) == (0, [f"{stage}: {count} ready"]), ran.stdout + ran.stderr
    assert set(graph.workers(stage)) == set(range(count))


def _segment_makers() -> list[int]:
    """Processes that made the System V shared memory that there is now."""
    header, *rows = Path("/proc/sysvipc/shm").read_text().splitlines()
    column = header.split().index("cpid")
    return [int(row.split()[column]) for row in rows]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody uses now."""
    taken = {connection.laddr.port for connection in psutil.net_connections("tcp")}
    first = 20000 + os.getpid() % 400 * 16
    while any(port in taken for port in range(first, first + count)):
        first += count
    return first


def untrained(family: str) -> Path:
    """A tiny checkpoint with random weights, written once. `models/untrained.py` says which families there are.

    Its answers are noise that depends on every pixel and word, and go on until the limit: what a comparison token by
    token needs, and what a trained model's short, sure answers do not give.
    """
    directory = ROOT / "build" / "untrained" / family
    write(family, directory)
    return directory
