# SPDX-License-Identifier: Apache-2.0
"""Keeps load on a graph of two workers per stage, kills, stops and cuts by a seed, and checks every answer.

    make chaos MINUTES=30 SEED=7

Each question's answer is first had in peace; greedy tokens and seeded pictures must be the same afterwards, whatever is
killed meanwhile. Patient clients are OpenAI's with their two retries, which end where a stream begins: of a stream that
broke off and said so, by an error event or with its frontend, their user asks again. That is counted beside what came
of it. The others never ask for what has failed. One of them asks only what nobody has asked before, twice, so that no
cache spares an encode or a hand-off. A prober asks small questions of the stage of which a worker was killed last, so
that a recovery is the stage's and not the length of what happens to be asked. A cut is a NATS that stands still: its
connections stay open, and nothing comes through.

Prints what each kind of client saw, how long a stage took from a fault to its next success, what is still held at the
end, and what leaked: descriptors and threads of the processes that nobody killed, and files in /dev/shm, where nobody
else should put anything meanwhile. ``build/hardening/chaos.json`` has it all. Exit status 0 when no answer was wrong,
no patient request failed, at least 99 % of the others came, no stream ended in silence, or at all but for what was done
to its frontend, its processor or NATS, the second worker of a stage answers within 2 s of the first one's kill, nothing
stays held or leaks, and enough was killed: in 30 minutes 100 workers, spread over every stage, and NATS 10 times. A
machine that brings workers back too slowly for that gets half as long again.
"""

from __future__ import annotations

import argparse
import http.client
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.room import free_inotify_instances
from tests.hardening.load import (
    CHAT,
    LEASES_END,
    NATS,
    SLOW_START,
    STAGES,
    Answers,
    Fault,
    Fresh,
    Load,
    Seen,
    client_of,
    held_at_the_end,
    in_peace,
    kinds,
    name_of,
    numbers_of,
    outcome_of,
    worker_names,
)
from tests.hardening.report import Report
from tests.serving import Graph, eventually, serve

WORKERS = 2
STOPPED_SECONDS = 5.0
STOPS = 0.15
"""Of the faults that are a worker's."""
NATS_EVERY = 13
"""Faults from one of NATS to the next."""
CUT_EVERY = 6
"""Faults of NATS from one that is a cut to the next."""
CUT_SECONDS = 3.0
KILLS_A_MINUTE = 100 / 30
RESTARTS_A_MINUTE = 10 / 30
SHARE = 0.5
"""Of the kills that each stage would have if they were spread evenly: every stage has that many."""
LONGER = 1.5
"""Times the minutes, at most, until enough was killed."""
TOO_LATE = 30.0
"""Seconds before the end of the load: who is killed then may meet no request any more."""
RAW_GOAL = 0.99
RECOVERED_WITHIN = 2.0
"""Seconds from a kill to the first answer to a request that was sent after it and crossed that stage: 99 % of them."""
NATS_RECOVERED = 6.0
"""Seconds from a kill of NATS to the first answer to a request that was sent after it: one for its start, five then."""
BACK = 300.0
"""Bound of a worker's return: its engine is loaded anew beside the load."""
LEAST_PAUSE = 4.0
"""Seconds between two faults, also where one had to be waited for."""
SHARED_MEMORY = Path("/dev/shm")
WARM_UP = 0.1
"""Share of the run while pools fill and peers meet. What a process has at the end is compared with the most of it."""
MORE_DESCRIPTORS = 32
"""That a process may have gained at the end: two for each of its peers (fourteen workers, NATS, the supervisor), which
it may first meet after the warm-up. One that is lost with every kill would be a hundred."""
MORE_THREADS = 16
"""Likewise: two pools of the size that asyncio gives them on two cores, and some."""
MORE_FILES = 10
"""That may lie in /dev/shm at the end: semaphores of 32 bytes, of processes that were killed while they started. One
that every kill of a worker leaves would be a hundred."""

KINDS = kinds(16, 2)
"""Short, so that there are many: a kill costs those requests that are under way."""
IDLE = 1.0
"""Beside a machine at its limit an engine takes minutes to come back, and is not killed again meanwhile."""
FRESH_IDLE = 4.0
"""Its client comes beside the others, so that it takes none of their share: with four of them a tenth is added."""
SMALL = kinds(4, 1)
PROBES = {stage: SMALL[0] for stage in CHAT} | {"Frontend": SMALL[4], "EmbedWorker": SMALL[4], "ImageWorker": SMALL[2]}
"""The smallest question that crosses a stage."""


def whole(graph: Graph) -> set[str]:
    """The stages of which every worker is there."""
    with suppress(httpx.HTTPError, ValueError):
        found = httpx.get(f"{graph.url}/health", timeout=10).json().get("stages", {})
        stages = {stage for stage in STAGES if found.get(stage) == WORKERS}
        frontends = sum(is_up(graph, index) for index in graph.workers("Frontend"))
        return stages | ({"Frontend"} if frontends == WORKERS else set())
    return set()


def is_up(graph: Graph, index: int) -> bool:
    """Whether a frontend has started. None of them counts the others, and its process is there long before."""
    with suppress(OSError, http.client.HTTPException, psutil.Error, AssertionError, KeyError):
        return "epd_arena_leases" in graph.metrics("Frontend", index).names
    return False


class Faults:
    """Does one thing after another by a seed, each to a stage that is whole."""

    def __init__(self, graph: Graph, seen: Seen, seed: int):
        self._graph = graph
        self._seen = seen
        self._chance = random.Random(seed)
        self._count = 0

    def one(self) -> None:
        """The next fault, as soon as a stage stands whole. Raises AssertionError when none does, or the graph ended."""
        self._count += 1
        if self._count % NATS_EVERY == 0:
            pid = eventually(self._graph.nats, "NATS runs", BACK, pause=0.5)
            if self._count // NATS_EVERY % CUT_EVERY == 0:
                self._stop(pid, NATS, "cut", CUT_SECONDS)
            else:
                self._kill(pid, NATS)
            return
        stage, workers = eventually(self._chosen, "a stage is whole", BACK, pause=0.5)
        pid = workers[self._chance.choice(sorted(workers))]
        if self._chance.random() < STOPS:
            self._stop(pid, stage, "stop", STOPPED_SECONDS)
        else:
            self._kill(pid, stage)

    def _chosen(self) -> tuple[str, dict[int, int]] | None:
        """Of the whole stages one of those that had the fewest faults, and its workers by index."""
        assert self._graph.process.poll() is None, f"the graph has ended\n{self._graph.text[-3000:]}"
        with self._seen.lock:
            had = {stage: sum(fault.stage == stage for fault in self._seen.faults) for stage in STAGES}
        standing = {stage: self._graph.workers(stage) for stage in sorted(whole(self._graph))}
        standing = {stage: workers for stage, workers in standing.items() if len(workers) == WORKERS}
        if not standing:
            return None
        fewest = min(had[stage] for stage in standing)
        stage = self._chance.choice([stage for stage in standing if had[stage] == fewest])
        return stage, standing[stage]

    def _kill(self, pid: int, stage: str) -> None:
        self._signalled(pid, stage, "kill", signal.SIGKILL)

    def _stop(self, pid: int, stage: str, what: str, seconds: float) -> None:
        if self._signalled(pid, stage, what, signal.SIGSTOP):
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _signalled(self, pid: int, stage: str, what: str, number: signal.Signals) -> bool:
        """Whether there was somebody to do it to: only then it is a fault. Nobody who sees what comes of it finds it
        missing, for the lock is held meanwhile."""
        with self._seen.lock, suppress(ProcessLookupError):
            os.kill(pid, number)
            self._seen.faults.append(Fault(what, stage, time.monotonic()))
            return True
        return False


@dataclass(frozen=True)
class Kept:
    """What the machine keeps for one process."""

    descriptors: int
    threads: int


class Keeping:
    """What each process of a graph keeps at most in its first ``seconds``, and what lay in /dev/shm."""

    def __init__(self, graph: Graph, seconds: float):
        self._graph = graph
        self._seconds = seconds
        self._first: dict[psutil.Process, float] = {}
        self._before: dict[psutil.Process, Kept] = {}
        self.files = shared_files()
        self.look()

    def look(self) -> None:
        now = time.monotonic()
        for process, kept in self._now().items():
            if now - self._first.setdefault(process, now) <= self._seconds:
                most = self._before.get(process, kept)
                kept = Kept(max(most.descriptors, kept.descriptors), max(most.threads, kept.threads))
                self._before[process] = kept

    def throughout(self) -> dict[str, tuple[Kept, Kept]]:
        """Of each process that has lived for longer: what it kept then, and what it keeps now."""
        workers, found, end = worker_names(self._graph), {}, time.monotonic() - self._seconds
        for process, kept in self._now().items():
            with suppress(psutil.Error):  # it has just ended
                if self._first.get(process, math.inf) < end:
                    name = f"{name_of(process, workers, self._graph)} ({process.pid})"
                    found[name] = self._before[process], kept
        return found

    def _now(self) -> dict[psutil.Process, Kept]:
        found = {}
        for process in self._graph.tree():
            with suppress(psutil.Error, OSError):
                found[process] = Kept(process.num_fds(), process.num_threads())
        return found


def shared_files() -> set[str]:
    """Whosever."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


def leaked(throughout: dict[str, tuple[Kept, Kept]], more_files: int) -> list[str]:
    """What is more than its allowance."""
    found = [f"{more_files} more files in {SHARED_MEMORY}"] if more_files > MORE_FILES else []
    for name, (was, now) in throughout.items():
        if now.descriptors - was.descriptors > MORE_DESCRIPTORS:
            found.append(f"{name}: {was.descriptors} → {now.descriptors} descriptors")
        if now.threads - was.threads > MORE_THREADS:
            found.append(f"{name}: {was.threads} → {now.threads} threads")
    return found


class Prober(threading.Thread):
    """Asks of each stage with a fault that nobody has found mended yet, until it is."""

    def __init__(self, graph: Graph, expected: Answers, seen: Seen):
        super().__init__(name="prober")
        self.stop = threading.Event()
        self._client = client_of(graph, retries=0).with_options(timeout=STOPPED_SECONDS)
        self._expected = expected
        self._numbers = numbers_of(expected)
        self._seen = seen

    def run(self) -> None:
        turn = 0
        while not self.stop.wait(0.02):
            with self._seen.lock:
                wanted = [one.stage for one in self._seen.faults if one.recovered is None and one.stage != NATS]
            for stage in dict.fromkeys(wanted):
                kind, number = PROBES[stage], self._numbers[turn % len(self._numbers)]
                turn += 1
                began = time.monotonic()
                outcome = outcome_of(kind, self._client, number, self._expected[kind.name, number], self._seen)
                self._seen.note("prober", kind, outcome, began)


def run(graph: Graph, report: Report, minutes: float, seed: int, clients: int, pause: float) -> None:
    """The whole run, with its goals in ``report``."""
    expected, small, seen = in_peace(graph, KINDS), in_peace(graph, SMALL), Seen()
    load: list[Load | Fresh | Prober] = [
        Load(graph, expected, seen, index % 2 == 0, f"{seed} {index}", KINDS, IDLE) for index in range(clients)
    ]
    load += [Fresh(graph, seen, seed, KINDS, FRESH_IDLE), Prober(graph, small, seen)]
    keeping = Keeping(graph, WARM_UP * minutes * 60)
    faults = Faults(graph, seen, seed)
    report.say("the answers are known, the load begins")
    for one in load:
        one.start()
    began = due = time.monotonic()
    end = began + minutes * 60
    try:
        while (now := time.monotonic()) < end or (now < began + LONGER * minutes * 60 and not enough(seen, minutes)):
            due += pause
            time.sleep(max(LEAST_PAUSE, due - now))
            faults.one()
            keeping.look()
            report.say(_progress(graph, seen, end))
    finally:
        ended = time.monotonic()
        for one in load:
            one.stop.set()
        for one in load:
            one.join()
        judge(report, seen, minutes, ended)
        judge_rest(graph, report, keeping)


def _progress(graph: Graph, seen: Seen, end: float) -> str:
    standing = len(whole(graph))
    with seen.lock:
        right = sum(count for (_, outcome), count in seen.outcomes.items() if outcome == "right")
        other, count = sum(seen.outcomes.values()) - right, len(seen.faults)
        last = seen.faults[-1] if seen.faults else Fault("none", "yet", 0.0)
        before = next((one for one in seen.faults[-2::-1] if one.stage == last.stage), None)
    took = "" if before is None or before.recovered is None else f" ({before.recovered - before.at:.2f} s last time)"
    left = max(0, end - time.monotonic()) / 60
    return (
        f"{count} faults, last {last.what} {last.stage}{took}; {standing} of {len(STAGES)} stages whole; "
        f"{right} right, {other} not; {free_inotify_instances()} inotify instances left; {left:.0f} min left"
    )


def killed(seen: Seen) -> dict[str, int]:
    """How many workers of each stage, and how often NATS."""
    with seen.lock:
        kills = [fault.stage for fault in seen.faults if fault.what == "kill"]
    return {stage: kills.count(stage) for stage in (*STAGES, NATS)}


def restarts_wanted(minutes: float) -> int:
    """Of NATS."""
    return int(RESTARTS_A_MINUTE * minutes)


def enough(seen: Seen, minutes: float) -> bool:
    """Whether enough was killed for a run of so many minutes."""
    kills = killed(seen)
    restarts = kills.pop(NATS)
    wanted = int(KILLS_A_MINUTE * minutes)
    return (
        sum(kills.values()) >= wanted
        and restarts >= restarts_wanted(minutes)
        and min(kills.values()) >= max(1, int(SHARE * wanted / len(STAGES)))
    )


def judge(report: Report, seen: Seen, minutes: float, ended: float) -> None:
    """Says what was seen up to ``ended``, and whether each goal of it is met."""
    with seen.lock:
        outcomes, faults, said = Counter(seen.outcomes), list(seen.faults), list(seen.said)
        report.note(
            minutes=round((ended - seen.began) / 60, 1),
            outcomes=dict(sorted(seen.by_kind.items())),
            faults=[{**vars(one), "at": round(one.at - seen.began, 2), "recovered": after(one)} for one in faults],
            failures=said,
            wrong=seen.wrong,
            asked_again=dict(seen.again),
            unexplained=seen.unexplained,
        )
    for who, count in sorted(seen.by_kind.items()):
        report.say(f"{who}: {count}")
    for why, count in sorted(seen.again.items()):
        report.say(f"asked again by a patient client, {why}: {count}")
    for what, stage in sorted({(fault.what, fault.stage) for fault in faults}):
        those = [fault for fault in faults if (fault.what, fault.stage) == (what, stage)]
        times = sorted(found for fault in those if (found := after(fault)) is not None)
        shown = f"median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s" if times else "none was asked again"
        report.say(f"{what} {stage}: {len(those)}, next success after {shown}")
    for line in said[:40]:
        report.say(line)

    def share(*whos: str) -> tuple[int, int]:
        whole = sum(count for (one, _), count in outcomes.items() if one in whos)
        return sum(outcomes[one, "right"] for one in whos), whole

    wrong = sum(count for (_, outcome), count in outcomes.items() if outcome == "wrong")
    silent = sum(count for (_, outcome), count in outcomes.items() if outcome == "silent end")
    patient, impatient = share("patient"), share("impatient", "fresh")
    waits = waited([fault for fault in faults if fault.what == "kill" and fault.stage != NATS], ended)
    p50, p99 = (waits[math.ceil(q * len(waits)) - 1] if waits else math.inf for q in (0.5, 0.99))
    report.goal("enough was killed, of every stage", enough(seen, minutes), killed(seen))
    report.goal("no answer is wrong", not wrong and sum(outcomes.values()) > 0, f"{sum(outcomes.values())} answers")
    report.goal("no stream ends in silence", not silent, silent)
    report.goal(
        "no stream breaks off but with its frontend, its processor or NATS",
        not seen.unexplained,
        "; ".join(seen.unexplained[:10]) or None,
    )
    asked_again = f"{seen.again.total()} streams were asked for again by their user"
    report.goal(
        "no request fails behind two retries",
        0 < patient[1] == patient[0],
        f"{patient[0]} of {patient[1]}, {asked_again}",
    )
    report.goal(
        f"{RAW_GOAL:.0%} come without retries",
        impatient[0] >= RAW_GOAL * impatient[1] > 0,
        f"{impatient[0]} of {impatient[1]}",
    )
    report.goal(
        f"from a kill to the next success p99 within {RECOVERED_WITHIN:g} s",
        p99 <= RECOVERED_WITHIN,
        f"p50 {p50:.2f} s, p99 {p99:.2f} s of {len(waits)} kills",
    )
    returns = waited([fault for fault in faults if (fault.what, fault.stage) == ("kill", NATS)], ended)
    # A run so short that NATS need not be killed shows nothing of it, and is not blamed for that.
    longest = max(returns, default=math.inf if restarts_wanted(minutes) else 0.0)
    report.goal(
        f"NATS is started again and a request answered within {NATS_RECOVERED:g} s",
        longest <= NATS_RECOVERED,
        f"longest {longest:.2f} s of {len(returns)} kills",
    )


def judge_rest(graph: Graph, report: Report, keeping: Keeping) -> None:
    """Says what is left once nobody asks any more, and whether each goal of that is met."""
    with suppress(AssertionError):  # else the goal after it says what is missing
        eventually(lambda: whole(graph) == set(STAGES), "every stage is whole", BACK, pause=0.5)
    back = whole(graph)
    report.goal("every stage comes back whole", back == set(STAGES), sorted(set(STAGES) - back) or None)
    began = time.monotonic()
    held = held_at_the_end(graph, LEASES_END)
    took = f"{time.monotonic() - began:.0f} s after every stage was whole"
    report.goal("nothing is held once the leases of the killed have ended", not held, held or took)
    throughout, new = keeping.throughout(), sorted(shared_files() - keeping.files)
    for name, (was, now) in sorted(throughout.items()):
        report.say(
            f"{name} was never killed: {was.descriptors} → {now.descriptors} descriptors, "
            f"{was.threads} → {now.threads} threads"
        )
    more = len(shared_files()) - len(keeping.files)
    report.say(f"{SHARED_MEMORY}: {len(keeping.files)} files, {more:+d} since; new ones: {', '.join(new) or 'none'}")
    report.note(throughout=throughout, shared_files=new)
    leaks = leaked(throughout, more)
    report.goal(
        f"nothing leaks beyond {MORE_DESCRIPTORS} descriptors and {MORE_THREADS} threads of a process, and {MORE_FILES}"
        f" files in {SHARED_MEMORY}",
        bool(throughout) and not leaks,
        "; ".join(leaks) or f"{len(throughout)} processes were never killed, {more:+d} files",
    )


def waited(faults: Sequence[Fault], ended: float) -> list[float]:
    """Seconds from each to the next success, in order; infinite where there was none, unless nobody may have asked."""
    return sorted(
        math.inf if (found := after(fault)) is None else found
        for fault in faults
        if fault.recovered is not None or fault.at < ended - TOO_LATE
    )


def after(fault: Fault) -> float | None:
    """Seconds from a fault to the next success."""
    return None if fault.recovered is None else round(fault.recovered - fault.at, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clients", type=int, default=4, help="half of them patient")
    parser.add_argument("--pause", type=float, default=12, help="seconds between faults")
    given = parser.parse_args()
    workers = [f"--{stage}.ServiceArgs.workers={WORKERS}" for stage in STAGES]
    with Report("chaos", **vars(given)) as report:
        config = "configs/tiny-cova.yaml"
        with serve("graphs.cova:Frontend", config, *workers, DYNAMO_START_SECONDS=SLOW_START) as graph:
            report.say("the graph is up")
            run(graph, report, given.minutes, given.seed, given.clients, given.pause)
        report.goal("the graph ends by Ctrl-C and leaves nothing", True)  # `serve` has looked
    print("every goal is met" if not report.missed else "NOT every goal is met")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
