# SPDX-License-Identifier: Apache-2.0
"""Row 4: encode stages alone, sixteen pictures waiting: in batches, one a forward, and Dynamo's encode worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks import checkpoints
from benchmarks.encoders import ALL, EncodeStage, encode_stages
from benchmarks.figures import Goal, Row, Samples, ratios, shown
from benchmarks.load import picture

NUMBER = 4
TITLE = "encode stage alone"
WAITING = 16
TOWERS = {
    "llava-tiny": "tiny (2 layers of 64)",
    "llava-b32": "CLIP B/32",
    "llava-l14-336": "CLIP L/14-336 (one of its 24 equal layers)",
}
OVERHEAD = "llava-tiny"
"""Where overhead rules; in the others arithmetic does."""
ARMS = {
    "OURS": ("OURS", ALL),
    "OURS, one a forward": ("OURS", 1),
    "STOCK": ("STOCK", 1),
    "STOCK-tuned": ("STOCK-tuned", 1),
}
"""name → (stage, pictures in one forward)"""


async def measure(repeats: int) -> Row:
    """One tower after the other; of each all arms stand, and those that are not asked are stopped."""
    row = Row(NUMBER, TITLE, f"random weights in float32, {WAITING} new pictures at once, {repeats} repeats")
    equal: list[float] = []
    for model, tower in TOWERS.items():
        with encode_stages(checkpoints.directory(model)) as stages:
            seconds = by_turns(stages, repeats)
            rates = {arm: [WAITING / one for one in of] for arm, of in seconds.items()}
            row.samples += [Samples(f"{arm}, {tower}", of, "pictures/s") for arm, of in rates.items()]
            row.goals.append(goal(model, tower, rates))
            for other in ("STOCK", "STOCK-tuned"):
                times = shown(median(ratios(rates["OURS"], rates[other])))
                row.notes.append(f"{tower}: OURS is {times} times as fast as {other}")
            same = [picture(number) for number in range(-repeats, 0)]
            equal += [stages["OURS"].encode([one] * WAITING)["images"] for one in same]
    row.goals.append(Goal(f"{WAITING} equal pictures at once", equal, "≤", 1, "encodes"))
    row.notes.append(
        "STOCK loads its tower in float16 whatever it is told, reads the class token too, and runs each request in a "
        "thread of its own; ours has one thread and does what the model's own `vllm serve` does"
    )
    return row


def by_turns(stages: Mapping[str, EncodeStage], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm for `WAITING` pictures at once; the first turn warms up. No arm sees a picture twice."""
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(1 + repeats):
        for place, (arm, (stage, most)) in enumerate(ARMS.items()):
            first = (repeat * len(ARMS) + place) * WAITING
            answer = stages[stage].encode([picture(first + number) for number in range(WAITING)], most)
            if repeat:
                seconds[arm].append(answer["seconds"])
    return seconds


def goal(model: str, tower: str, rates: Mapping[str, Sequence[float]]) -> Goal:
    """Against STOCK where overhead rules; against itself without batches where batching can only keep up."""
    if model == OVERHEAD:
        return Goal(f"{tower}: OURS against STOCK", ratios(rates["OURS"], rates["STOCK"]), "≥", 2.0)
    alone = rates["OURS, one a forward"]
    return Goal(f"{tower}: in batches against one a forward", ratios(rates["OURS"], alone), "≥", 0.97)
