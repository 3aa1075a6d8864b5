# SPDX-License-Identifier: Apache-2.0
"""Arms that stand for several rows, each started when a row first asks for it: a start takes as long as a row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from benchmarks.arms import Arm, agg, ours_agg, ours_disagg, stock
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
WITHOUT_STOCK = ("AGG", "AGG-tuned", "OURS-agg", "OURS-disagg")


class Standing:
    """All serve one model. `arms` starts those that do not stand yet and ends those that a row does not need; `close`
    ends them all. They can be asked for again."""

    def __init__(self, model: Callable[[], Path]):
        self._model = model
        self._arms: dict[str, Arm] = {}

    def arms(self, row: Row, names: Sequence[str]) -> dict[str, Arm]:
        """By name, in this order. The row is told their commands."""
        for name in self._arms.keys() - set(names):
            self._arms.pop(name).close()  # they would take memory, and some of a core
        for name in names:
            if name not in self._arms:
                self._arms[name] = START[name](self._model()).__enter__()
                self._arms[name].pause()
        row.notes += [f"`{command}`" for name in names for command in self._arms[name].commands]
        return {name: self._arms[name] for name in names}

    def close(self) -> None:
        while self._arms:
            self._arms.popitem()[1].close()


@asynccontextmanager
async def turn(client: aiohttp.ClientSession, arm: Arm) -> AsyncIterator[None]:
    """One arm's turn. One that stood still answers a question first that is not timed: it has to wake up."""
    arm.resume()
    try:
        if arm.spins:
            await ask(client, arm.url, chat("Awake?", tokens=2))
        yield
    finally:
        arm.pause()


def agree(row: Row, told: Mapping[str, Sequence[Told]], right: str = "AGG") -> None:
    """Notes what failed and which answers are not those of the arm ``right``. The row is void where a question failed,
    or where any but STOCK's, whose tower has other features and numbers than the model's, answers otherwise."""
    for name, answers in told.items():
        failed = [one.failed for one in answers if one.failed]
        differ = sum(one.text != other.text for one, other in zip(told[right], answers, strict=True))
        if failed:
            row.notes.append(f"{name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
        if differ:
            row.notes.append(f"{name}: {differ} of {len(answers)} answers are not {right}'s")
        if failed:
            row.void = row.void or f"a question to {name} failed"
        elif differ and not name.startswith("STOCK"):
            row.void = row.void or f"{name}'s answers differ from {right}'s"
