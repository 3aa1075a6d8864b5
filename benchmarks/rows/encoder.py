# SPDX-License-Identifier: Apache-2.0
"""Row 4: encode stages alone, sixteen pictures waiting: in batches, one a forward, and Dynamo's encode worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from benchmarks import checkpoints
from benchmarks.encoders import KINDS, EncodeStage, encode_stages, forgiven
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import picture
from benchmarks.standing import rotated

NUMBER = 4
TITLE = "encode stage alone"
WAITING, WARM_UP = 16, 4
TOWERS = {
    "llava-tiny": "tiny (2 layers of 64)",
    "llava-b32": "CLIP B/32",
    "llava-l14-336": "CLIP L/14-336 (one of its 24 equal layers)",
}
COMPARED = 8
"""Pictures whose embeddings are compared: those of the largest tower take the longest in all of the row."""
CLOSE = 1e-4
"""Of the largest number of an embedding: so far one that was made in a batch may be from the same made alone."""
OVERHEAD = "llava-tiny"
"""Where overhead is known to rule. In the others arithmetic is expected to, and must not lose by batches; whether it
does the row sees."""
UNTUNED = ("llava-l14-336", "STOCK-tuned")
"""What is not measured: it would take half a minute more."""
RULES = 2.0
"""Overhead rules where a batch is so many times as fast as one a forward: half of the time of that is overhead then."""
ARMS: dict[str, tuple[str, int | None]] = {
    "OURS": ("OURS", None),
    "OURS, one a forward": ("OURS", 1),
    "STOCK": ("STOCK", 1),
    "STOCK-tuned": ("STOCK-tuned", 1),
}
"""name → (stage, pictures in one forward, where it is not the stage's own number)"""


async def measure(repeats: int) -> Row:
    """One tower after the other; of each all arms stand, and those that are not asked are stopped. One of STOCK's that
    fails costs its own figures and goals, and is not started again."""
    row = Row(NUMBER, TITLE, f"random weights in float32, {WAITING} new pictures at once, {repeats} repeats")
    equal: list[float] = []
    failed: set[str] = set()
    for model, tower in TOWERS.items():
        kinds = [kind for kind in KINDS if kind not in failed and (model, kind) != UNTUNED]
        with encode_stages(checkpoints.directory(model), kinds, row) as stages:
            seconds = by_turns(stages, repeats, row)
            failed |= set(kinds) - stages.keys()
            rates = {arm: [WAITING / one for one in of] for arm, of in seconds.items()}
            row.samples += [Samples(f"{arm}, {tower}", of, "pictures/s") for arm, of in rates.items()]
            row.goals += goals(model, tower, rates)
            apart = stages["OURS"].apart([picture(number) for number in range(-repeats - COMPARED, -repeats)])
            if not apart <= CLOSE:
                row.void = f"{tower}: embeddings of a batch are {apart:.1e} from those of one a forward"
            same = [picture(number) for number in range(-repeats, 0)]
            equal += [stages["OURS"].encode([one] * WAITING)["images"] for one in same]
    row.goals.append(Goal(f"{WAITING} equal pictures at once", equal, "≤", 1, "encodes", worst=True))
    row.notes.append(
        "STOCK loads its tower in float16 whatever it is told, reads the class token too, and runs each request in a "
        "thread of its own; ours has one thread and does what the model's own `vllm serve` does"
    )
    row.notes.append(f"{TOWERS[UNTUNED[0]]} is not set against {UNTUNED[1]}: a report has no time for it")
    return row


def by_turns(stages: dict[str, EncodeStage], repeats: int, row: Row) -> dict[str, list[float]]:
    """Seconds of each arm for `WAITING` pictures at once; the first turn warms up, with fewer. No arm sees a picture
    twice. One of STOCK's that fails has none, and is taken out of the ``stages``."""
    seconds: dict[str, list[float]] = {arm: [] for arm, (stage, _) in ARMS.items() if stage in stages}
    for repeat in range(1 + repeats):
        for arm, (stage, most) in rotated(ARMS, repeat):
            if stage not in stages:
                continue
            first = (repeat * len(ARMS) + list(ARMS).index(arm)) * WAITING
            with forgiven(stage, stages, row):
                waiting = [picture(first + number) for number in range(WAITING if repeat else WARM_UP)]
                answer = stages[stage].encode(waiting, most)
                if repeat:
                    seconds[arm].append(answer["seconds"])
    return {arm: of for arm, of in seconds.items() if ARMS[arm][0] in stages}


def goals(model: str, tower: str, rates: Mapping[str, Sequence[float]]) -> Iterator[Goal]:
    """Against STOCK where overhead rules; against itself without batches where batching can only keep up."""
    ours = rates["OURS"]
    alone = ratios(ours, rates["OURS, one a forward"])
    overhead = model == OVERHEAD or median(alone) >= RULES
    if model != OVERHEAD:
        yield Goal(f"{tower}: in batches against one a forward", alone, "≥", 0.97)
    for other in ("STOCK", "STOCK-tuned"):
        limit = 2.0 if overhead and other == "STOCK" else None
        if other in rates or limit is not None:
            times = ratios(ours, rates[other]) if other in rates else []
            yield Goal(f"{tower}: OURS against {other}", times, "≥", limit)
