# SPDX-License-Identifier: Apache-2.0
"""What a row of the report holds: samples of each arm, ratios pair by pair, and whether the goal is met."""

from __future__ import annotations

import dataclasses
import math
import operator
import statistics
from collections.abc import Sequence
from typing import Any, Literal

Sense = Literal["≤", "<", "≥"]


@dataclasses.dataclass(frozen=True)
class Samples:
    """One arm's figures, one for each repeat, in the order in which they were taken."""

    arm: str
    values: list[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        if not self.values:
            return "none"
        return f"{shown(self.median)} ({shown(min(self.values))} … {shown(max(self.values))}) {self.unit}".strip()


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that is to stay below a limit, or above one. ``values`` are of the repeats; their median counts, and
    without any it was not measured. One without a limit is shown beside the others, and no goal.

    ``worst``: the worst value counts instead. One repeat of a time may be disturbed; what is right is so in all."""

    what: str
    values: list[float]
    sense: Sense = "≤"
    limit: float | None = None
    unit: str = "times"
    worst: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def judged(self) -> float:
        """The value that counts."""
        if not self.worst:
            return self.median
        return min(self.values) if self.sense == "≥" else max(self.values)

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        if not self.values:
            return False
        return {"≤": operator.le, "<": operator.lt, "≥": operator.ge}[self.sense](self.judged, self.limit)

    def __str__(self) -> str:
        figure = "not measured"
        if self.values:
            spread = f"{shown(min(self.values))} … {shown(max(self.values))}"
            figure = f"{shown(self.median)} {self.unit} ({spread})"
            if self.worst:
                figure = f"{shown(self.judged)} {self.unit} at worst (median {shown(self.median)}, {spread})"
        return figure if self.limit is None else f"{figure}; goal {self.sense} {shown(self.limit)} {self.unit}"


@dataclasses.dataclass
class Row:
    """One row of the report. ``setting``: model, load and whatever else a reader needs to do it again."""

    number: int
    title: str
    setting: str
    samples: list[Samples] = dataclasses.field(default_factory=list)
    goals: list[Goal] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What a reader of the figures must know: why a goal is missed, what was tried."""
    void: str = ""
    """Why nothing here counts: answers that differ."""
    missing: str = ""
    """Why nothing here was measured: an arm that did not start, whatever else went wrong."""
    open_loop: bool = False
    """Its requests come at a rate: a client that takes much of a core would disturb what it measures."""
    client: list[float] = dataclasses.field(default_factory=list)
    """What the client took of a core, in each arm's turn; in an open loop, in each stretch of requests at a rate."""
    load: list[float] = dataclasses.field(default_factory=list)
    """The machine's load average of a minute, before the row and at its end."""
    seconds: float = 0.0
    """That the row took, starts included."""
    model: str = ""
    """At which it is measured, in a word or two."""

    @property
    def met(self) -> bool:
        limited = any(goal.limit is not None for goal in self.goals)
        return not self.void and not self.missing and limited and all(goal.met for goal in self.goals)

    def as_json(self) -> dict[str, Any]:
        goals = [
            dataclasses.asdict(goal) | {"median": goal.median if goal.values else None, "met": goal.met}
            for goal in self.goals
        ]
        return dataclasses.asdict(self) | {"goals": goals, "met": self.met}


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Pair by pair: what disturbs the machine for a while disturbs both sides of a pair. Raises ValueError for pairs
    that do not match."""
    return [one / other for one, other in zip(of, to, strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank: a value that was measured. ``share`` lies in (0, 1]. Raises ValueError for no values."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * share) - 1]


def shown(value: float) -> str:
    """Three figures, without an exponent."""
    if value == 0 or not value < float("inf"):
        return f"{value:g}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
