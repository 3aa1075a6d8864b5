# SPDX-License-Identifier: Apache-2.0
"""Arms that stand for several rows, each started when a row first asks for it: a start takes as long as a row.

All that stand serve one model. Those that would spin while nobody asks them anything are stopped meanwhile, so that six
of them, some thirty processes, leave two cores to the one whose turn it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError
from time import perf_counter, process_time

import aiohttp

from benchmarks import checkpoints
from benchmarks.arms import Arm, agg, close_all, ours_agg, ours_disagg, stock
from benchmarks.figures import Row
from benchmarks.load import Told, ask, chat

START: Mapping[str, Callable[[Path], Arm]] = {
    "AGG": lambda model: agg(model, tuned=False),
    "AGG-tuned": lambda model: agg(model, tuned=True),
    "STOCK": lambda model: stock(model, tuned=False),
    "STOCK-tuned": lambda model: stock(model, tuned=True),
    "OURS-agg": ours_agg,
    "OURS-disagg": ours_disagg,
}
ALONE = ("AGG", "OURS-disagg")
"""Started one after the other, before all else: how long that takes is a row of its own."""
WITHOUT_STOCK = ("AGG", "AGG-tuned", "OURS-agg", "OURS-disagg")


@dataclass(frozen=True)
class Starts:
    """Of `ALONE`, with nothing else asked anything: seconds to the first answer, and what that said, by arm."""

    model: str
    seconds: dict[str, float]
    said: dict[str, str]


class Standing:
    """`arms` starts those that do not stand yet and ends those that a row does not need; `close` ends them all. They
    can be asked for again."""

    def __init__(self, directory: Callable[[str], Path] = checkpoints.directory):
        """``directory`` of a model, by its name."""
        self._directory = directory
        self._model = ""
        self._arms: dict[str, Arm] = {}
        self.starts: list[Starts] = []
        """All that there were so far."""

    def arms(self, row: Row, model: str, names: Sequence[str]) -> dict[str, Arm]:
        """By name, in this order; the row is told their commands. Raises RuntimeError for one that does not start, but
        leaves one of STOCK's out and tells the row why."""
        unneeded = [name for name in self._arms if model != self._model or name not in names]
        close_all([self._arms.pop(name) for name in unneeded])  # they would take memory, and some of a core
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
        alone = [name for name in ALONE if name in names][:: -1 if len(self.starts) % 2 else 1]
        for name in alone:
            self._together([name])
        if nothing_else and len(alone) == len(ALONE):
            seconds = {name: self._arms[name].seconds_to_answer for name in alone}
            said = {name: self._arms[name].first_said for name in alone}
            self.starts.append(Starts(self._model, seconds, said))
        others = [name for name in names if name not in alone]
        self._together([name for name in others if not name.startswith("STOCK")])
        stock = [name for name in others if name.startswith("STOCK")]
        try:
            self._together(stock)
        except (RuntimeError, CalledProcessError) as error:
            lost = ", ".join(name for name in stock if name not in self._arms)
            row.notes.append(f"{lost}: not started: {str(error).strip().splitlines()[-1]}")

    def _together(self, names: Sequence[str]) -> None:
        """Most of a start is imports, one after the other: two arms at once use two cores."""
        made = {name: START[name](self._directory(self._model)) for name in names}  # now: they choose free ports
        try:
            for arm in made.values():
                arm.begin()
            for name, arm in made.items():
                arm.wait()
                arm.pause()
                self._arms[name] = arm
        except BaseException:
            close_all([arm for name, arm in made.items() if name not in self._arms])
            raise


@asynccontextmanager
async def turn(client: aiohttp.ClientSession, arm: Arm, row: Row) -> AsyncIterator[None]:
    """One arm's turn. Each answers a question first that is not timed: one that stood still has to wake up, and what is
    done for one is done for all. The row is told what the client takes of a core from then on."""
    arm.resume()
    try:
        await ask(client, arm.url, chat("Awake?", tokens=2))
        began, busy = perf_counter(), process_time()
        yield
        row.client.append((process_time() - busy) / (perf_counter() - began))
    finally:
        arm.pause()


def agree(row: Row, told: Mapping[str, Sequence[Told]], right: str = "AGG") -> list[str]:
    """Notes what failed and which answers are not those of the arm ``right``. The row is void where a question failed
    or was answered otherwise by any but STOCK, whose tower has other features and numbers than the model's. Returns the
    names of STOCK's arms that failed: nothing can be said against them."""
    left_out: list[str] = []
    for name, answers in told.items():
        failed = [one.failed for one in answers if one.failed]
        differ = sum(one.text != other.text for one, other in zip(told[right], answers, strict=True))
        if failed:
            row.notes.append(f"{name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
        if differ:
            row.notes.append(f"{name}: {differ} of {len(answers)} answers are not {right}'s")
        if failed and name.startswith("STOCK"):
            left_out.append(name)
        elif failed:
            row.void = row.void or f"a question to {name} failed"
        elif differ and not name.startswith("STOCK"):
            row.void = row.void or f"{name}'s answers differ from {right}'s"
    return left_out
