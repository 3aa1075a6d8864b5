# SPDX-License-Identifier: Apache-2.0
"""Row 12: from `dynamo serve` to the first answer about a picture, beside `vllm serve`. Nothing else is asked anything.

What is judged starts alone on the machine, on the tiny model. Where other rows had to start both, the second one
started beside the first, which stood already, at their model: these starts are shown, and no goal is set for them.
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
"""Pairs that start alone, however many were seen beside: a start takes as long as a row."""


async def measure(standing: Standing, repeats: int) -> Row:
    """By turns; who begins changes, so that a cold file cache favours nobody."""
    beside = standing.starts[:repeats]
    standing.close()
    model = checkpoints.directory(TINY)
    alone: list[Starts] = []
    count = max(FEWEST, repeats - len(beside))
    row = Row(NUMBER, TITLE, f"{TINY}, processes started anew and alone, {count} pairs; asked five times a second")
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
    fill(row, alone, beside)
    return row


def fill(row: Row, alone: Sequence[Starts], beside: Sequence[Starts]) -> None:
    """Void where two do not answer alike. Only those that started ``alone`` are judged."""
    seconds = {name: [pair.seconds[name] for pair in alone] for name in ALONE}
    row.samples += [Samples(name, of, "s") for name, of in seconds.items()]
    for model in sorted({pair.model for pair in beside}):
        shown = {name: [pair.seconds[name] for pair in beside if pair.model == model] for name in ALONE}
        row.samples += [Samples(f"{name}, {model}, one beside the other", of, "s") for name, of in shown.items()]
    pairs = [*alone, *beside]
    differ = sum(pair.said["OURS-disagg"] != pair.said["AGG"] for pair in pairs)
    if differ:
        row.void = f"{differ} of {len(pairs)} first answers are not AGG's"
    row.goals.append(Goal("OURS-disagg against AGG", ratios(seconds["OURS-disagg"], seconds["AGG"]), "≤", 1.2))
