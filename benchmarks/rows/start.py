# SPDX-License-Identifier: Apache-2.0
"""Row 12: from `dynamo serve` to the first answer about a picture, beside `vllm serve`. Nothing else is at work.

A start takes as long as a row, so the one that row 1 saw is judged too: nothing but the two stood then. AGG began
alone, and stood still, stopped, while the graph began (`standing.Starts`). The other pairs start here, each alone.
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
    of other rows among them, in which AGG began."""
    pairs = standing.starts[: repeats - FEWEST]
    standing.close()
    model = checkpoints.directory(TINY)
    load = f"{TINY}, processes started anew and alone, {repeats - len(pairs)} pairs"
    if pairs:
        load += f", and {len(pairs)} with which another row began"
    row = Row(NUMBER, TITLE, f"{load}; asked five times a second")
    for number in range(len(pairs), repeats):
        seconds: dict[str, float] = {}
        said: dict[str, str] = {}
        for name in ALONE[::-1] if number % 2 else ALONE:
            with START[name](model) as arm:
                seconds[name] = arm.seconds_to_answer
                said[name] = arm.first_said
                if number == repeats - 1:
                    row.notes += [f"`{command}`" for command in arm.commands]
        pairs.append(Starts(seconds, said))
    fill(row, pairs)
    row.notes.append("not set against AGG-tuned: a report has no time for five starts of it")
    return row


def fill(row: Row, pairs: Sequence[Starts]) -> None:
    """Void where two do not answer alike."""
    for name in ALONE:
        row.samples.append(Samples(name, [pair.seconds[name] for pair in pairs], "s"))
    differ = sum(pair.said["OURS-disagg"] != pair.said["AGG"] for pair in pairs)
    if differ:
        row.void = f"{differ} of {len(pairs)} first answers are not AGG's"
    ours, agg = ([pair.seconds[name] for pair in pairs] for name in ("OURS-disagg", "AGG"))
    row.goals.append(Goal("OURS-disagg against AGG", ratios(ours, agg), "≤", 1.2))
