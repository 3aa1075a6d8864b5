# SPDX-License-Identifier: Apache-2.0
"""The rows of a report in the order in which they are measured, and what each of them costs.

Rows that need no arm, or their own, come first. Then those that share arms, a model at a time: a start takes as long as
a row. The seconds are expected ones, starts included, on two quiet cores: an engine's imports take 10 s of a core in
each of its processes, so one ``vllm serve`` is up after 24 to 42 s, the disaggregated graph after 36 to 40, Dynamo's
stages after 30 to 50, two arms that are started at once after 40, and four after 90. Models are written and Dynamo's
stages are installed before.

A whole run is to take half an hour, with a minute left for what lies between rows: arms that end, and plots. Rows 3 and
9 have as many repeats as that leaves them; a turn of theirs is short, and their medians move least. Row 12 comes right
after row 1, with whose arms it begins; what a run that is too slow leaves out is then the last row, the shortest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from benchmarks.rows import (
    added,
    answer,
    copies,
    encoder,
    goodput,
    kv,
    overlap,
    pictures,
    repeated,
    start,
    storm,
    texts,
    transfer,
    weights,
)


@dataclass(frozen=True)
class Step:
    """One row. ``stands``: it asks for arms that other rows ask for too."""

    row: ModuleType
    repeats: int
    seconds: int
    started: str
    """What it starts, where it is measured in its turn."""
    stands: bool = False

    @property
    def number(self) -> int:
        return int(self.row.NUMBER)

    @property
    def title(self) -> str:
        return str(self.row.TITLE)


PLAN = (
    Step(transfer, 12, 65, "four processes that own memory or READ it, and five more one after the other"),
    Step(weights, 5, 45, "five encoders at once"),
    Step(encoder, 5, 170, "eight encode stages: three of the tiny tower and of B/32, two of the largest one"),
    Step(texts, 5, 70, "a process for each model, beside the client's"),
    Step(pictures, 5, 60, "a process for each model, beside the client's"),
    Step(added, 5, 40, "the aggregated graph with an echo for an engine"),
    Step(copies, 5, 75, "two graphs with five image workers each"),
    Step(answer, 10, 270, "all six arms, tiny", stands=True),
    Step(start, 5, 320, "AGG and OURS-disagg four times, alone, tiny; row 1 saw one more pair", stands=True),
    Step(kv, 10, 120, "AGG, AGG-tuned, OURS-agg and OURS-disagg, S/16, at once", stands=True),
    Step(repeated, 12, 110, "the disaggregated graph with two prefill workers; AGG-tuned is ended", stands=True),
    Step(storm, 5, 105, "nothing: OURS-agg and the graph with two prefill workers are ended", stands=True),
    Step(goodput, 5, 215, "STOCK, S/16", stands=True),
    Step(overlap, 5, 75, "the disaggregated graph that encodes pictures one by one; AGG stands", stands=True),
)

MODELS: Mapping[int, str] = {
    transfer.NUMBER: "none",
    weights.NUMBER: "B/32",
    encoder.NUMBER: "tiny, B/32, one layer of L/14-336",
    texts.NUMBER: "tiny T5, T5 base",
    pictures.NUMBER: "tiny, and trained",
    added.NUMBER: "tiny",
    copies.NUMBER: "a T5 of 400 MB",
    answer.NUMBER: "tiny",
    kv.NUMBER: "S/16",
    repeated.NUMBER: "S/16",
    storm.NUMBER: "S/16",
    goodput.NUMBER: "S/16",
    overlap.NUMBER: "S/16",
    start.NUMBER: "tiny",
}
"""By row, as the report's table has it."""


def in_order(numbers: Sequence[int]) -> list[Step]:
    """Those of the plan that are asked for; all of them where none is."""
    return [step for step in PLAN if not numbers or step.number in numbers]


def table(steps: Sequence[Step]) -> Iterator[str]:
    """The plan as lines of Markdown."""
    yield "| row | what | repeats | starts | seconds, about |"
    yield "|---|---|---|---|---|"
    for step in steps:
        yield f"| {step.number} | {step.title} | {step.repeats} | {step.started} | {step.seconds} |"
    yield f"| | | | | {sum(step.seconds for step in steps)} |"
