# SPDX-License-Identifier: Apache-2.0
"""Keeps mixed load on the widest graph for an hour, and shows whether any of its processes grows.

    make soak MINUTES=60 SEED=7

The load is that of `chaos`, without its faults. One client more asks what nobody has asked before, twice: caches then
fill and turn over, and the second answer must be the first. The cache of encoded pictures is made small, or its first
filling would look like a leak. Every ten seconds each process' memory, descriptors and threads are noted, and what lies
in /dev/shm, where nobody else should put anything meanwhile.

Prints the slope of each by least squares, with twice its standard error. Exit status 0 when no slope lies above its
bound by more than that error, every answer was right, every worker is the same process as before, and nothing is held.
The samples go to build/soak.json, slopes and goals to build/hardening/soak.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.hardening.load import (
    KINDS,
    REST,
    STAGES,
    Load,
    Seen,
    client_of,
    decided,
    held_at_the_end,
    in_peace,
    outcome_of,
)
from tests.hardening.report import Report
from tests.serving import Graph, serve
from tests.toys.running import ROOT

MIB = 2**20
HOUR = 3600.0
EVERY = 10.0
"""Seconds between two samples."""
SAID_EVERY = 3
"""Samples from one line to the next."""
WARM_UP = 0.25
"""Share of the run in which caches and pools fill: no slope is taken of it."""
SAMPLES = ROOT / "build" / "soak.json"
SHARED_MEMORY = "/dev/shm"

SMALL_CACHE = "--EncodeWorker.arena-bytes=4194304"
"""It is mapped at the start and touched little by little: full within the warm-up, it is turned over after it."""


class Fresh(threading.Thread):
    """One client that asks every question twice, and none that was asked before."""

    def __init__(self, graph: Graph, seen: Seen, seed: int):
        super().__init__(name="fresh")
        self.stop = threading.Event()
        self._client = client_of(graph, retries=0)
        self._seen = seen
        self._chance = random.Random(f"{seed} fresh")
        self._numbers = itertools.count(1_000_000)

    def run(self) -> None:
        while not self.stop.is_set():
            kind, number = self._chance.choice(KINDS), next(self._numbers)
            began = time.monotonic()
            try:
                outcome = outcome_of(kind, self._client, number, kind.ask(self._client, number), self._seen)
                if outcome == "wrong" and kind.tokens and not decided(self._client, number, kind.tokens):
                    outcome = "right"  # rounding may decide where the model has not
            except Exception as error:  # a thread that ended of it would ask nothing any more
                outcome = f"failed ({type(error).__name__}: {error})"[:160]
            self._seen.note("fresh", kind, outcome, began)
            if outcome != "right":
                self.stop.wait(REST)


@dataclass
class Series:
    """One process, or /dev/shm: its samples in order. ``memory`` in bytes, ``at`` in seconds since the load began."""

    name: str
    at: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Watch:
    """The processes of a graph, each with the series of its samples. The last one is /dev/shm as a whole."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._began = time.monotonic()
        self.processes: dict[psutil.Process, Series] = {}
        self.shared = Series(SHARED_MEMORY)

    def sample(self) -> None:
        workers = worker_names(self._graph)
        at = time.monotonic() - self._began
        for process in self._graph.tree():
            with suppress(psutil.Error, OSError):  # it has just ended
                series = self.processes.setdefault(process, Series(name_of(process, workers, self._graph)))
                memory, descriptors, threads = memory_of(process.pid), process.num_fds(), process.num_threads()
                series.at.append(at)
                series.memory.append(memory)
                series.descriptors.append(descriptors)
                series.threads.append(threads)
        about = os.statvfs(SHARED_MEMORY)
        self.shared.at.append(at)
        self.shared.memory.append((about.f_blocks - about.f_bfree) * about.f_frsize)

    @property
    def series(self) -> list[Series]:
        """Those of which there are enough samples, by name. Who came and went within a few had no time to grow."""
        lasting = [one for one in self.processes.values() if len(one.at) * 2 > len(self.shared.at)]
        return [*sorted(lasting, key=lambda one: one.name), self.shared]


def worker_names(graph: Graph) -> dict[int, str]:
    """Names by pid."""
    return {pid: f"{stage}-{index}" for stage in STAGES for index, pid in graph.workers(stage).items()}


def name_of(process: psutil.Process, workers: dict[int, str], graph: Graph) -> str:
    """The stage of a worker; of a process below one, the stage and what the process is called."""
    if process.pid in workers:
        return workers[process.pid]
    if process.pid == graph.process.pid:
        return "supervisor"
    parent = process.parent()
    above = name_of(parent, workers, graph) if parent and graph.process.pid != parent.pid else ""
    return f"{above} {process.name()}".strip()


def memory_of(pid: int) -> int:
    """The process' share of what it has in memory, in bytes, without pages of files: the kernel takes those back."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return (kib["Pss"] - kib["Pss_File"] + kib["SwapPss"]) * 1024


def slope(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Of the line by least squares, an hour, and its standard error."""
    hours = np.asarray(at) / HOUR
    hours -= hours.mean()
    above = np.asarray(values, float)
    above -= above.mean()
    spread = float((hours**2).sum())
    found = float((hours * above).sum()) / spread
    rest = float(((above - found * hours) ** 2).sum())
    return found, float(np.sqrt(rest / (len(hours) - 2) / spread))


def told(watch: Watch, report: Report, warm_up: float, mib_per_hour: float, descriptors_per_hour: float) -> list[str]:
    """Says the table. Returns what grows."""
    report.say(f"{'process':36}{'MiB':>18}{'MiB/h':>16}{'descriptors':>14}{'an hour':>14}{'threads':>10}")
    growing: list[str] = []
    slopes = []
    for one in watch.series:
        begin = next((place for place, at in enumerate(one.at) if at >= warm_up), len(one.at))
        at = one.at[begin:]
        if len(at) < 3:
            report.say(f"{one.name:36}{len(at)} samples after the warm-up are too few")
            growing.append(f"{one.name}: unknown")
            continue
        memory = [value / MIB for value in one.memory[begin:]]
        grown, error = slope(at, memory)
        steep = grown - 2 * error > mib_per_hour
        line = f"{one.name:36}{f'{memory[0]:.1f} … {memory[-1]:.1f}':>18}{f'{grown:+.1f} ± {2 * error:.1f}':>16}"
        found: dict[str, Any] = {"process": one.name, "mib": memory[-1], "mib_per_hour": grown, "error": 2 * error}
        if one.descriptors:
            counts = one.descriptors[begin:]
            opened, error = slope(at, counts)
            steep |= opened - 2 * error > descriptors_per_hour
            threads = one.threads[begin:]
            line += f"{f'{counts[0]} … {counts[-1]}':>14}{f'{opened:+.1f} ± {2 * error:.1f}':>14}"
            line += f"{f'{threads[0]} … {threads[-1]}':>10}"
            found |= {"descriptors": counts[-1], "descriptors_per_hour": opened, "descriptors_error": 2 * error}
        report.say(f"{line}{'   GROWS' if steep else ''}")
        slopes.append(found)
        growing += [one.name] if steep else []
    report.note(slopes=slopes)
    return growing


def run(graph: Graph, report: Report, minutes: float, seed: int, clients: int, bounds: tuple[float, float]) -> None:
    """The whole run, with its goals in ``report``."""
    expected = in_peace(graph)
    seen, workers, watch = Seen(), worker_names(graph), Watch(graph)
    load: list[Load | Fresh] = [Load(graph, expected, seen, False, f"{seed} {index}") for index in range(clients)]
    load.append(Fresh(graph, seen, seed))
    report.say("the answers are known, the load begins")
    for one in load:
        one.start()
    end = time.monotonic() + minutes * 60
    samples = 0
    try:
        while (left := end - time.monotonic()) > 0:
            watch.sample()
            samples += 1
            if samples % SAID_EVERY == 1:
                memory = sum(one.memory[-1] for one in watch.series) / MIB
                with seen.lock:
                    answers, wrong = sum(seen.outcomes.values()), len(seen.said)
                report.say(f"{answers} answers, {wrong} not right; {memory:.0f} MiB; {left / 60:.0f} min left")
            time.sleep(min(EVERY, left))
    finally:
        for one in load:
            one.stop.set()
        for one in load:
            one.join()
        SAMPLES.parent.mkdir(exist_ok=True)
        SAMPLES.write_text(json.dumps([vars(one) for one in watch.series]))
    growing = told(watch, report, WARM_UP * minutes * 60, *bounds)
    for who, count in sorted(seen.by_kind.items()):
        report.say(f"{who}: {count}")
    for line in seen.said[:40]:
        report.say(line)
    outcomes = dict(sorted(seen.by_kind.items()))
    report.note(outcomes=outcomes, failures=seen.said, wrong=seen.wrong, samples=samples)
    memory_bound, descriptors_bound = bounds
    report.goal(
        f"no process grows by more than {memory_bound:g} MiB and {descriptors_bound:g} descriptors an hour",
        not growing,
        ", ".join(growing) or f"{len(watch.series)} series of {samples} samples",
    )
    whos = {who for who, _ in seen.outcomes}
    right = whos == {"impatient", "fresh"} and all(outcome == "right" for _, outcome in seen.outcomes)
    report.goal("every answer was right", right, sum(seen.outcomes.values()))
    after = worker_names(graph)
    report.goal("every worker is the same process as before", after == workers, None if after == workers else after)
    held = held_at_the_end(graph)
    report.goal("nothing is held at the end", not held, held or None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clients", type=int, default=3, help="beside the one that asks what is new")
    parser.add_argument("--mib-per-hour", type=float, default=20, help="bound of a process' memory")
    parser.add_argument("--descriptors-per-hour", type=float, default=5, help="bound of a process' descriptors")
    given = parser.parse_args()
    with Report("soak", **vars(given)) as report:
        with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", SMALL_CACHE) as graph:
            bounds = (given.mib_per_hour, given.descriptors_per_hour)
            run(graph, report, given.minutes, given.seed, given.clients, bounds)
        report.goal("the graph ends by Ctrl-C and leaves nothing", True)  # `serve` has looked
    print("every goal is met" if not report.missed else "NOT every goal is met")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
