# SPDX-License-Identifier: Apache-2.0
"""Arms that stand for several rows, each started when a row first asks for it: a start takes as long as a row.

All that stand serve one model. Those that would spin while nobody asks them anything are stopped meanwhile, so that six
of them, some thirty processes, leave two cores to the one whose turn it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from time import perf_counter, process_time
from typing import TypeVar

import aiohttp

from benchmarks import checkpoints
from benchmarks.arms import Arm, agg, close_all, ours_agg, ours_disagg, stock
from benchmarks.figures import Row
from benchmarks.load import Told, ask, chat, within
from benchmarks.obedient import reason

START: Mapping[str, Callable[[Path], Arm]] = {
    "AGG": lambda model: agg(model, tuned=False),
    "AGG-tuned": lambda model: agg(model, tuned=True),
    "STOCK": lambda model: stock(model, tuned=False),
    "STOCK-tuned": lambda model: stock(model, tuned=True),
    "OURS-agg": ours_agg,
    "OURS-disagg": ours_disagg,
    "OURS-disagg-2": lambda model: ours_disagg(model, prefill_workers=2),
}
ALONE = ("AGG", "OURS-disagg")
"""Started one after the other, before all else, where they serve the tiny model: how long that takes is judged in a row
of its own. The first spins, and so it stands still while the second starts."""
WITHOUT_STOCK = ("AGG", "AGG-tuned", "OURS-agg", "OURS-disagg")
AWAKE_TRIES, AWAKE_SECONDS, AWAKE_PAUSE = 2, 20.0, 1.0
"""Of the question that wakes an arm up, each bounded: the first may be lost to what died while it stood still."""
LOST = 2
"""Failures in a row after which an arm is asked no more."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Starts:
    """Of `ALONE`, with nothing else at work: seconds to the first answer, and what that said, by arm."""

    seconds: dict[str, float]
    said: dict[str, str]


class Standing:
    """`arms` starts those that do not stand yet, or no longer, and ends those that a row does not need; `close` ends
    them all. They can be asked for again."""

    def __init__(self, directory: Callable[[str], Path] = checkpoints.directory):
        """``directory`` of a model, by its name."""
        self._directory = directory
        self._model = ""
        self._arms: dict[str, Arm] = {}
        self.starts: list[Starts] = []
        """All that there were so far of the tiny model, in which no other arm stood."""

    def arms(self, row: Row, model: str, names: Sequence[str]) -> dict[str, Arm]:
        """By name, in this order; the row is told their commands. Raises RuntimeError for one that does not start, but
        leaves one of STOCK's out and tells the row why."""
        dead = [name for name, arm in self._arms.items() if arm.ended]
        unneeded = [name for name in self._arms if model != self._model or name not in names]
        # Those would take memory, and some of a core; these answer nothing, and a row would be void for it.
        close_all([self._arms.pop(name) for name in {*unneeded, *dead}])
        self._model = model
        self._start([name for name in names if name not in self._arms], row)
        standing = {name: self._arms[name] for name in names if name in self._arms}
        row.notes += [f"`{command}`" for arm in standing.values() for command in arm.commands]
        return standing

    def close(self) -> None:
        close_all([self._arms.pop(name) for name in list(self._arms)])

    def _start(self, names: Sequence[str], row: Row) -> None:
        """`ALONE` first; then those that need no more than their imports, and those that spin, each at once."""
        nothing_else = not self._arms
        alone = [name for name in ALONE if name in names and self._model == checkpoints.TINY]
        for name in alone:
            self._together([name], row)
        if nothing_else and len(alone) == len(ALONE):
            seconds = {name: self._arms[name].seconds_to_answer for name in alone}
            said = {name: self._arms[name].first_said for name in alone}
            self.starts.append(Starts(seconds, said))
        others = [name for name in names if name not in alone]
        self._together([name for name in others if not name.startswith("STOCK")], row)
        stock = [name for name in others if name.startswith("STOCK")]
        try:
            self._together(stock, row)
        except CalledProcessError as error:  # it could not be installed
            row.notes.append(_not_started(", ".join(stock), error))

    def _together(self, names: Sequence[str], row: Row) -> None:
        """Most of a start is imports, one after the other: two arms at once use two cores. Of STOCK's one that does not
        start leaves those that began beside it."""
        made = {name: START[name](self._directory(self._model)) for name in names}  # now: they choose free ports
        try:
            for arm in made.values():
                arm.begin()
            for name, arm in made.items():
                try:
                    arm.wait()
                except RuntimeError as error:
                    if not name.startswith("STOCK"):
                        raise
                    row.notes.append(_not_started(name, error))
                    continue
                arm.pause()
                self._arms[name] = arm
        except BaseException:
            close_all([arm for name, arm in made.items() if name not in self._arms])
            raise


def _not_started(who: str, error: Exception) -> str:
    """A note."""
    return f"{who}: not started: {reason(error)}"


@asynccontextmanager
async def turn(client: aiohttp.ClientSession, arm: Arm, row: Row) -> AsyncIterator[None]:
    """One arm's turn. Each answers a question first that is not timed: one that stood still has to wake up, and what is
    done for one is done for all. The row is told what the client takes of a core from then on; one whose requests come
    at a rate asks for that itself, while they do."""
    arm.resume()
    try:
        await _wake(client, arm)
        if row.open_loop:
            yield
        else:
            with clients_share(row):
                yield
    finally:
        arm.pause()


@contextmanager
def clients_share(row: Row) -> Iterator[None]:
    """Tells the row what the client takes of a core in this block."""
    began, busy = perf_counter(), process_time()
    yield
    row.client.append((process_time() - busy) / (perf_counter() - began))


async def _wake(client: aiohttp.ClientSession, arm: Arm) -> None:
    """Until it has answered, or was asked often enough: what it is asked next then says what is wrong with it."""
    for _ in range(AWAKE_TRIES):
        told = await within(AWAKE_SECONDS, ask(client, arm.url, chat("Awake?", tokens=2)))
        if told.text and not told.failed:
            return
        await asyncio.sleep(AWAKE_PAUSE)


def note_masks(row: Row, arms: Mapping[str, Arm]) -> None:
    """Notes where each arm's threads may run. All inherit the client's cores; who binds a thread does so by itself."""
    for name, arm in arms.items():
        shares = [
            f"{threads} thread{'s' * (threads > 1)} on core{'s' * (len(cores) > 1)} {', '.join(map(str, cores))}"
            for cores, threads in sorted(arm.masks().items(), key=lambda one: -len(one[0]))
        ]
        row.notes.append(f"{name}: {'; '.join(shares) or 'no threads are left'}")


def rotated(arms: Mapping[str, Kind], repeat: int) -> list[tuple[str, Kind]]:
    """The arms of a repeat by name. Who begins changes, and so does the direction: no arm always follows the same one,
    whose last work may still be running."""
    pairs = list(arms.items())
    first = repeat // 2 % len(pairs)
    turned = [*pairs[first:], *pairs[:first]]
    return turned[::-1] if repeat % 2 else turned


def lost(answers: Sequence[Told]) -> bool:
    """Whether an arm is waited for no more. One failure is none: it may have been waking up."""
    return len(answers) >= LOST and all(one.failed for one in answers[-LOST:])


def agree(row: Row, told: Mapping[str, Sequence[Told]], right: str = "AGG") -> None:
    """Notes what failed and which answers are not those of the arm ``right``. The row is void where a question failed
    or was answered otherwise by any but STOCK, whose tower has other features and numbers than the model's."""
    for name, answers in told.items():
        failed = [one.failed for one in answers if one.failed]
        pairs = zip(told[right], answers, strict=True)
        differ = sum(one.text != other.text for one, other in pairs if not (one.failed or other.failed))
        if failed:
            row.notes.append(f"{name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
        if differ:
            row.notes.append(f"{name}: {differ} of {len(answers)} answers are not {right}'s")
        if name.startswith("STOCK"):
            continue
        if failed:
            row.void = row.void or f"a question to {name} failed"
        elif differ:
            row.void = row.void or f"{name}'s answers differ from {right}'s"


def as_long(row: Row, told: Mapping[str, Sequence[Told]], tokens: int) -> None:
    """Notes answers under load that have not ``tokens`` tokens, each a character here; void for any but STOCK's. Their
    words are not compared: batches of other sizes round otherwise. What failed, or was given up, has no length."""
    for name, answers in told.items():
        wrong = [len(one.text) for one in answers if one.text and not one.failed and len(one.text) != tokens]
        if wrong:
            row.notes.append(f"{name}: {len(wrong)} of {len(answers)} answers have {wrong[0]} tokens, not {tokens}")
            if not name.startswith("STOCK"):
                row.void = row.void or f"{name}'s answers are not as long as was asked for"
