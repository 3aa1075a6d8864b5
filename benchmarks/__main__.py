# SPDX-License-Identifier: Apache-2.0
"""The report: this project beside what it replaces, in one run on one machine.

    python -m benchmarks                     # every row
    python -m benchmarks --row 3 --row 1     # some of them

Writes `report.md`, `report.json` and a plot a row. Exit status 0 when every goal of the rows that ran is met, 1 when
one is not, 2 for what cannot be run.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Set
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, report
from benchmarks.arms import WORK
from benchmarks.figures import Row
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
from benchmarks.standing import Standing

REPEATS = {
    answer.NUMBER: 20,
    added.NUMBER: 10,
    transfer.NUMBER: 30,
    texts.NUMBER: 10,
    pictures.NUMBER: 5,
    weights.NUMBER: 5,
    copies.NUMBER: 5,
    encoder.NUMBER: 5,
    repeated.NUMBER: 15,
    storm.NUMBER: 5,
    goodput.NUMBER: 5,
    overlap.NUMBER: 8,
    kv.NUMBER: 20,
    start.NUMBER: 5,
}
STANDING = Standing(lambda: checkpoints.directory(checkpoints.SERVED))
STAND = (repeated.NUMBER, storm.NUMBER, kv.NUMBER, goodput.NUMBER)
"""Rows that share arms, one after the other. The last one alone needs Dynamo's: the others have the machine without."""


def llava() -> Path:
    """A LLaVA of half a million random parameters, as every arm can serve it."""
    directory = (WORK / "llava").absolute()
    if not (directory / "config.json").exists():
        from models import untrained

        untrained.write("llava", directory)
    return directory


ROWS: dict[int, Callable[[int], Coroutine[Any, Any, Row]]] = {
    answer.NUMBER: lambda repeats: answer.measure(llava(), repeats),
    added.NUMBER: lambda repeats: added.measure(llava(), repeats),
    transfer.NUMBER: transfer.measure,
    texts.NUMBER: texts.measure,
    pictures.NUMBER: pictures.measure,
    weights.NUMBER: weights.measure,
    copies.NUMBER: copies.measure,
    encoder.NUMBER: encoder.measure,
    repeated.NUMBER: lambda repeats: repeated.measure(STANDING, repeats),
    storm.NUMBER: lambda repeats: storm.measure(STANDING, repeats),
    goodput.NUMBER: lambda repeats: goodput.measure(STANDING, repeats),
    kv.NUMBER: lambda repeats: kv.measure(STANDING, repeats),
    overlap.NUMBER: lambda repeats: overlap.measure(checkpoints.directory(checkpoints.SERVED), repeats),
    start.NUMBER: lambda repeats: start.measure(llava(), repeats),
}


def in_order(numbers: Set[int]) -> list[int]:
    """Those that share arms first, and together."""
    return [*(number for number in STAND if number in numbers), *sorted(numbers - set(STAND))]


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", type=int, action="append", choices=sorted(ROWS), help="only this row")
    parser.add_argument("--repeats", type=int, help="of every row, instead of its own number; 5 at least")
    parser.add_argument("--output", type=Path, default=WORK / "report")
    options = parser.parse_args(given)
    if options.repeats is not None and options.repeats < 5:
        parser.error("--repeats: 5 at least")
    rows = []
    with closing(STANDING):
        for number in in_order(set(options.row or ROWS)):
            if number not in STAND:
                STANDING.close()
            began = time.monotonic()
            rows.append(asyncio.run(ROWS[number](options.repeats or REPEATS[number])))
            print(f"row {number}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            rows.sort(key=lambda row: row.number)
            text = report.write(rows, shlex.join(["python", "-m", "benchmarks", *given]), options.output)
    print(text)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    # Arms have sessions of their own, and end with the blocks that started them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
