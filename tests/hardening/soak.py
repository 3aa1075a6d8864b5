# SPDX-License-Identifier: Apache-2.0
"""Keeps mixed load on the widest graph for an hour, and shows whether any of its processes grows.

    make soak MINUTES=60 SEED=7

The load is that of `chaos`, without its faults. One client asks what nobody has asked before, twice: caches then fill
and turn over, and the second answer must be the first. Another submits jobs, leaves, and asks what is refused. The
cache of encoded pictures is made small, or its first filling would look like a leak. Every ten seconds each process'
memory, descriptors and threads are noted, and what lies in /dev/shm, where nobody else should put anything meanwhile.

Prints the slope of each by least squares, with twice its standard error. Exit status 0 when no slope lies above its
bound by more than that error, the error itself lies within the bound (else it cannot be told whether something grows),
every answer was right, every worker is the same process as before, and nothing is held. A quarter of the run is each
process' warm-up; who lived for less than another sixth after it is named and not judged. The samples go to
build/soak.json, slopes and goals to build/hardening/soak.json.
"""

from __future__ import annotations

import argparse
import base64
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

import httpx
import numpy as np
import openai
import psutil
from numpy.typing import ArrayLike

from tests.hardening.load import (
    CHAT,
    PATIENCE,
    STEPS,
    TOKENS,
    Answers,
    Fresh,
    Kind,
    Load,
    Seen,
    chat_fields,
    client_of,
    held_at_the_end,
    in_peace,
    name_of,
    numbers_of,
    outcome_of,
    prompt,
    worker_names,
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
"""Share of the run in which a process' caches and pools fill, from its first sample: no slope is taken of it."""
LASTING = 1 / 6
"""Share of the run, ten minutes of an hour, that a process must live after that to have a slope."""
FEWEST = 3
"""Samples that a line by least squares has an error of."""
GROWS, CANNOT_BE_TOLD = "grows", "cannot be told"
SAMPLES = ROOT / "build" / "soak.json"
SHARED_MEMORY = "/dev/shm"

SMALL_CACHE = "--EncodeWorker.arena-bytes=4194304"
"""It is mapped at the start and touched little by little: full within the warm-up, it is turned over after it."""


EVERY_OTHER = 5.0
"""Seconds from one of the few to the next: of each kind 240 an hour."""
LEAVES_WITHIN = (0.01, 0.5)
"""Seconds: up to about as long as a picture takes."""


def job(client: openai.OpenAI, number: int) -> str:
    """The picture that a job has made, which is then deleted. Raises TimeoutError where it is not made."""
    body = {"prompt": prompt(number), "seed": number, "num_inference_steps": STEPS}
    state: dict[str, Any] = client.post("/images/jobs", body=body, cast_to=dict[str, Any])
    path, end = f"/images/jobs/{state['id']}", time.monotonic() + PATIENCE
    while state["status"] != "completed":
        if state["status"] == "failed" or time.monotonic() > end:
            raise TimeoutError(f"the job is {state['status']}: {state.get('error')}")
        time.sleep(0.1)
        state = client.get(path, cast_to=dict[str, Any])
    (made,) = state["data"]
    file = httpx.get(made["url"], timeout=PATIENCE).raise_for_status().content
    client.delete(f"/images/{made['id']}", cast_to=dict[str, Any])
    return base64.b64encode(file).decode()


def leave(client: openai.OpenAI, number: int) -> str:
    """``left``: a picture before it is made, or a chat after some of its words."""
    chance = random.Random(number)
    if chance.random() < 0.5:
        with suppress(openai.APITimeoutError):  # that is to leave: the connection is closed
            client.with_options(timeout=chance.uniform(*LEAVES_WITHIN)).images.generate(
                prompt=prompt(number), extra_body={"seed": number, "num_inference_steps": STEPS}
            )
    else:
        with client.chat.completions.create(**chat_fields(number, TOKENS), stream=True) as stream:
            for _ in itertools.islice(stream, chance.randrange(TOKENS)):
                pass
    return "left"


REFUSED: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/chat/completions", {"model": "tiny-llava", "messages": [], "n": 10**9}, 400),
    ("/chat/completions", {"model": "unknown", "messages": [{"role": "user", "content": "Who?"}]}, 404),
    ("/images/generations", {"prompt": "a star", "size": "99999x99999"}, 400),
    ("/images/jobs", {"prompt": "a star", "size": "big"}, 400),
    ("/embeddings", {"model": "tiny-t5", "input": []}, 400),
    ("/validations", {"prompt": ""}, 400),
)
"""Path, body and status."""


def refused(client: openai.OpenAI, number: int) -> str:
    """``refused``, or what came instead."""
    path, body, status = REFUSED[number % len(REFUSED)]
    try:
        client.post(path, body=body, cast_to=dict[str, Any])
    except openai.APIStatusError as error:
        return "refused" if error.status_code == status else f"{path}: {error.status_code}, not {status}"
    return f"{path}: taken"


OTHERS = (
    Kind("job", ("Frontend", "ImageWorker", "EmbedWorker"), job),
    Kind("leaver", CHAT, leave),
    Kind("refusal", ("Frontend",), refused),
)


class Others(threading.Thread):
    """One client that submits a job, leaves and is refused, in turn, every few seconds."""

    def __init__(self, graph: Graph, expected: Answers, seen: Seen):
        super().__init__(name="others")
        self.stop = threading.Event()
        self._client = client_of(graph, retries=0)
        self._expected = expected
        self._seen = seen

    def run(self) -> None:
        known = itertools.cycle(numbers_of(self._expected))
        for turn in itertools.count():
            kind, began = OTHERS[turn % len(OTHERS)], time.monotonic()
            number = next(known) if kind.name == "job" else turn // len(OTHERS)
            right = {"job": self._expected["image", number]} if kind.name == "job" else {}
            right |= {"leaver": "left", "refusal": "refused"}
            outcome = outcome_of(kind, self._client, number, right[kind.name], self._seen)
            self._seen.note("other", kind, outcome, began)
            if self.stop.wait(EVERY_OTHER):
                break


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
        """By name."""
        seen = [one for one in self.processes.values() if one.at]  # the others ended while they were looked at
        return [*sorted(seen, key=lambda one: one.name), self.shared]

    @property
    def memory(self) -> int:
        """Of all that are there, in bytes."""
        return sum(one.memory[-1] for one in self.series if one.at[-1] == self.shared.at[-1])


def memory_of(pid: int) -> int:
    """The process' share of what it has in memory, in bytes, without pages of files: the kernel takes those back."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return (kib["Pss"] - kib["Pss_File"] + kib["SwapPss"]) * 1024


def slope(at: ArrayLike, values: ArrayLike) -> tuple[float, float]:
    """Of the line by least squares, an hour, and its standard error."""
    hours = np.asarray(at, float) / HOUR
    hours -= hours.mean()
    above = np.asarray(values, float)
    above -= above.mean()
    spread = float((hours**2).sum())
    found = float((hours * above).sum()) / spread
    rest = float(((above - found * hours) ** 2).sum())
    return found, float(np.sqrt(rest / (len(hours) - 2) / spread))


def verdict(grown: float, error: float, bound: float) -> str:
    """Of a slope with twice its standard error; empty where it is flat."""
    if grown - error > bound:
        return GROWS
    return CANNOT_BE_TOLD if error > bound else ""


@dataclass(frozen=True)
class Bounds:
    """Of one process, an hour."""

    mib: float = 20
    descriptors: float = 5
    threads: float = 5


def told(series: Sequence[Series], report: Report, seconds: float, bounds: Bounds) -> list[str]:
    """Says the table of a run of so many seconds. Returns what grows, and of what that cannot be told."""
    report.say(
        f"{'process':36}{'MiB':>18}{'MiB/h':>16}{'descriptors':>14}{'an hour':>14}{'threads':>12}{'an hour':>14}"
    )
    missed: list[str] = []
    slopes, short = [], []
    for one in series:
        warm = one.at[0] + WARM_UP * seconds
        begin = next((place for place, at in enumerate(one.at) if at >= warm), len(one.at))
        at = one.at[begin:]
        if len(at) < FEWEST or at[-1] - at[0] < LASTING * seconds:
            short.append(f"{one.name} ({len(one.at)} samples in {one.at[-1] - one.at[0]:.0f} s)")
            continue
        columns: list[tuple[str, Sequence[float], float, int, int]] = [
            ("MiB", [value / MIB for value in one.memory[begin:]], bounds.mib, 18, 16)
        ]
        if one.descriptors:
            columns.append(("descriptors", one.descriptors[begin:], bounds.descriptors, 14, 14))
            columns.append(("threads", one.threads[begin:], bounds.threads, 12, 14))
        line, said = f"{one.name:36}", []
        found: dict[str, Any] = {"process": one.name}
        for what, values, bound, wide, slope_wide in columns:
            grown, error = slope(at, values)
            error *= 2
            line += f"{f'{values[0]:.4g} … {values[-1]:.4g}':>{wide}}{f'{grown:+.1f} ± {error:.1f}':>{slope_wide}}"
            found[what] = {"last": values[-1], "an_hour": grown, "error": error}
            if how := verdict(grown, error, bound):
                said.append(f"{what}: {how}")
        report.say(f"{line}{'   ' if said else ''}{', '.join(said).upper()}")
        slopes.append(found)
        missed += [f"{one.name} {how}" for how in said]
    report.say(f"not judged, for they lived too short: {', '.join(short) or 'none'}")
    report.note(slopes=slopes, not_judged=short)
    return missed if slopes else ["nothing lived long enough to be judged"]


def run(graph: Graph, report: Report, minutes: float, seed: int, clients: int, bounds: Bounds) -> None:
    """The whole run, with its goals in ``report``."""
    expected = in_peace(graph)
    seen, workers, watch = Seen(), worker_names(graph), Watch(graph)
    load: list[Load | Fresh | Others] = [
        Load(graph, expected, seen, False, f"{seed} {index}") for index in range(clients)
    ]
    load += [Fresh(graph, seen, seed), Others(graph, expected, seen)]
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
                with seen.lock:
                    answers, wrong = sum(seen.outcomes.values()), len(seen.said)
                report.say(
                    f"{answers} answers, {wrong} not right; {watch.memory / MIB:.0f} MiB; {left / 60:.0f} min left"
                )
            time.sleep(min(EVERY, left))
    finally:
        for one in load:
            one.stop.set()
        for one in load:
            one.join()
        SAMPLES.parent.mkdir(exist_ok=True)
        SAMPLES.write_text(json.dumps([vars(one) for one in watch.series]))
    missed = told(watch.series, report, minutes * 60, bounds)
    for who, count in sorted(seen.by_kind.items()):
        report.say(f"{who}: {count}")
    for line in seen.said[:40]:
        report.say(line)
    outcomes = dict(sorted(seen.by_kind.items()))
    report.note(outcomes=outcomes, failures=seen.said, wrong=seen.wrong, samples=samples)
    report.goal(
        f"no process grows by more than {bounds.mib:g} MiB, {bounds.descriptors:g} descriptors and {bounds.threads:g} "
        "threads an hour, and that can be told",
        not missed,
        ", ".join(missed) or f"{len(watch.series)} series of {samples} samples",
    )
    whos = {who for who, _ in seen.outcomes}
    right = whos == {"impatient", "fresh", "other"} and all(outcome == "right" for _, outcome in seen.outcomes)
    report.goal("every answer was right", right, sum(seen.outcomes.values()))
    after = worker_names(graph)
    report.goal("every worker is the same process as before", after == workers, None if after == workers else after)
    held = held_at_the_end(graph)
    report.goal("nothing is held at the end", not held, held or None)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clients", type=int, default=3, help="beside those that ask what is new, and other things")
    parser.add_argument("--mib-per-hour", type=float, default=Bounds.mib, help="bound of a process' memory")
    parser.add_argument("--descriptors-per-hour", type=float, default=Bounds.descriptors, help="of its descriptors")
    parser.add_argument("--threads-per-hour", type=float, default=Bounds.threads, help="of its threads")
    given = parser.parse_args()
    with Report("soak", **vars(given)) as report:
        with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", SMALL_CACHE) as graph:
            bounds = Bounds(given.mib_per_hour, given.descriptors_per_hour, given.threads_per_hour)
            run(graph, report, given.minutes, given.seed, given.clients, bounds)
        report.goal("the graph ends by Ctrl-C and leaves nothing", True)  # `serve` has looked
    print("every goal is met" if not report.missed else "NOT every goal is met")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
