# SPDX-License-Identifier: Apache-2.0
"""Row 12: from `dynamo serve` to the first answer about a picture, beside `vllm serve`. Nothing else runs meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.arms import Arm, agg, ours_disagg
from benchmarks.figures import Goal, Row, Samples, ratios

NUMBER = 12
TITLE = "from start to the first answer"
ARMS: Mapping[str, Callable[[Path], Arm]] = {"AGG": lambda model: agg(model, tuned=False), "OURS-disagg": ours_disagg}


async def measure(model: Path, repeats: int) -> Row:
    """By turns; who begins changes, so that a cold file cache favours nobody."""
    row = Row(NUMBER, TITLE, f"{model.name}, processes started anew, {repeats} repeats; asked five times a second")
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for repeat in range(repeats):
        for name in ARMS if repeat % 2 else reversed(tuple(ARMS)):
            with ARMS[name](model) as arm:
                seconds[name].append(arm.seconds_to_answer)
                if not repeat:
                    row.notes += [f"`{command}`" for command in arm.commands]
    row.samples += [Samples(name, of, "s") for name, of in seconds.items()]
    row.goals.append(Goal("OURS-disagg against AGG", ratios(seconds["OURS-disagg"], seconds["AGG"]), "≤", 1.2))
    return row
