# SPDX-License-Identifier: Apache-2.0
"""Row 12: from `dynamo serve` to the first answer about a picture, beside `vllm serve`. Nothing else is at work.

A start takes as long as a row, so those that other rows saw are judged too, at their model, where nothing but the two
stood: AGG began alone, and stood still, stopped, while the graph began (`standing.Starts`). The other pairs start here,
on the tiny model, each alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import checkpoints
from benchmarks.checkpoints import TINY
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.standing import ALONE, START, Standing, Starts

NUMBER = 12
TITLE = "from start to the first answer"
FEWEST = 3
"""Pairs that start here, however many other rows saw."""


async def measure(standing: Standing, repeats: int) -> Row:
    """By turns; who begins changes, so that a cold file cache favours nobody. ``repeats``: pairs that are judged, those
    of other rows among them."""
    seen = standing.starts[: repeats - FEWEST]
    standing.close()
    model = checkpoints.directory(TINY)
    alone: list[Starts] = []
    count = repeats - len(seen)
    load = f"{TINY}, processes started anew and alone, {count} pairs"
    if seen:
        load += f", and {len(seen)} that other rows started ({', '.join(pair.model for pair in seen)})"
    row = Row(NUMBER, TITLE, f"{load}; asked five times a second")
    for number in range(count):
        seconds: dict[str, float] = {}
        said: dict[str, str] = {}
        for name in ALONE if number % 2 else ALONE[::-1]:
            with START[name](model) as arm:
                seconds[name] = arm.seconds_to_answer
                said[name] = arm.first_said
                if number == count - 1:
                    row.notes += [f"`{command}`" for command in arm.commands]
        alone.append(Starts(TINY, seconds, said))
    fill(row, alone, seen)
    return row


def fill(row: Row, alone: Sequence[Starts], seen: Sequence[Starts]) -> None:
    """Void where two do not answer alike. ``seen``: by other rows."""
    pairs = [*alone, *seen]
    for name in ALONE:
        row.samples.append(Samples(name, [pair.seconds[name] for pair in alone], "s"))
    for model in sorted({pair.model for pair in seen}):
        for name in ALONE:
            of = [pair.seconds[name] for pair in seen if pair.model == model]
            row.samples.append(Samples(f"{name}, {model}, started for another row", of, "s"))
    differ = sum(pair.said["OURS-disagg"] != pair.said["AGG"] for pair in pairs)
    if differ:
        row.void = f"{differ} of {len(pairs)} first answers are not AGG's"
    ours, agg = ([pair.seconds[name] for pair in pairs] for name in ("OURS-disagg", "AGG"))
    row.goals.append(Goal("OURS-disagg against AGG", ratios(ours, agg), "≤", 1.2))
