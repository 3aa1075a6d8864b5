# SPDX-License-Identifier: Apache-2.0
"""Row 12: from `dynamo serve` to the first answer about a picture, beside `vllm serve`. Nothing else is asked anything.

Where other rows had to start both, these starts are pairs of this row too: a start takes as long as a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import checkpoints
from benchmarks.checkpoints import TINY
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.standing import ALONE, START, Standing, Starts

NUMBER = 12
TITLE = "from start to the first answer"


async def measure(standing: Standing, repeats: int) -> Row:
    """By turns; who begins changes, so that a cold file cache favours nobody."""
    row = Row(NUMBER, TITLE, f"processes started anew, {repeats} pairs; asked five times a second")
    pairs = standing.starts[:repeats]
    standing.close()
    model = checkpoints.directory(TINY)
    for number in range(len(pairs), repeats):
        seconds: dict[str, float] = {}
        said: dict[str, str] = {}
        for name in ALONE if number % 2 else ALONE[::-1]:
            with START[name](model) as arm:
                seconds[name] = arm.seconds_to_answer
                said[name] = arm.first_said
                if number == repeats - 1:
                    row.notes += [f"`{command}`" for command in arm.commands]
        pairs.append(Starts(TINY, seconds, said))
    fill(row, pairs)
    return row


def fill(row: Row, pairs: Sequence[Starts]) -> None:
    """Void where the two do not answer alike."""
    models = [pair.model for pair in pairs]
    row.setting += "; pairs of " + ", ".join(f"{models.count(model)} on {model}" for model in sorted(set(models)))
    seconds = {name: [pair.seconds[name] for pair in pairs] for name in ALONE}
    row.samples += [Samples(name, of, "s") for name, of in seconds.items()]
    differ = sum(pair.said["OURS-disagg"] != pair.said["AGG"] for pair in pairs)
    if differ:
        row.void = f"{differ} of {len(pairs)} first answers are not AGG's"
    row.goals.append(Goal("OURS-disagg against AGG", ratios(seconds["OURS-disagg"], seconds["AGG"]), "≤", 1.2))
