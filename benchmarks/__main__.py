# SPDX-License-Identifier: Apache-2.0
"""The report: this project beside what it replaces, in one run on one machine.

    python -m benchmarks                     # every row
    python -m benchmarks --row 3 --row 1     # some of them
    python -m benchmarks --plan              # what would be measured, in which order, and how long it takes

Models are written and Dynamo's own stages installed before the clock starts. Then a run takes half an hour, or
``--minutes``, and no more: a row that by the plan does not fit into what is left is left out, and the report says so.

Writes `report.md`, `report.json` and a plot a row, anew after each row: what was measured is kept, whatever comes
later. A row that cannot be measured says why, and the next one is measured all the same. Exit status 0 when every goal
of the rows is met, 1 when one is not or was not measured, 2 for what cannot be run.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import plan, recorded, report
from benchmarks.arms import WORK
from benchmarks.figures import Row, shown
from benchmarks.gpu.goals import GOALS
from benchmarks.obedient import reason
from benchmarks.plan import Step
from benchmarks.preparing import prepare
from benchmarks.room import lacking, rest
from benchmarks.rows import goodput
from benchmarks.standing import Standing

ROW_SECONDS, TIMES_LONGER = 240.0, 3
"""Bound of a row, the larger of the two: nothing is waited for for ever."""
RUN_MINUTES = 30.0
ENDING_SECONDS = 30.0
"""Of a whole run, for what comes after its last row: arms that end, plots."""
AGAIN_SECONDS = 120.0
"""Between one `Late` and the next: longer than arms take to end, which the first one lets them do."""

Measure = Callable[[int], Coroutine[Any, Any, Row]]
"""A row from the number of its repeats."""

STANDING = Standing()


def measure_of(step: Step) -> Measure:
    """The row's own, at the arms that stand where it asks for some."""
    return (lambda repeats: step.row.measure(STANDING, repeats)) if step.stands else step.row.measure


ROWS = {step.number: measure_of(step) for step in plan.PLAN}
TUNED: dict[int, Measure] = {goodput.NUMBER: lambda repeats: goodput.measure(STANDING, repeats, goodput.TUNED)}
"""With ``--tuned``, in the place of the same row of `ROWS`."""


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises SystemExit with status 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", type=int, action="append", choices=sorted(ROWS), default=[], help="only this row")
    parser.add_argument("--repeats", type=int, help="of every row, instead of its own number; 5 at least")
    parser.add_argument("--tuned", action="store_true", help="row 7 beside the tuned arms too: minutes more")
    parser.add_argument(
        "--minutes", type=float, default=RUN_MINUTES, help="of the run: rows that do not fit are left out"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be measured, and end")
    parser.add_argument("--record", action="store_true", help="put the whole report into benchmarks/README.md")
    parser.add_argument("--output", type=Path, default=WORK / "report")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 5:
        parser.error("--repeats: 5 at least")
    if not 1 <= options.minutes < math.inf:
        parser.error("--minutes: 1 at least")
    if options.record and options.row:
        parser.error("--record: a report of some rows is none")
    return options


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = options_of(given)
    steps = plan.in_order(options.row)
    print("\n".join(plan.table(steps)), file=sys.stdout if options.plan else sys.stderr, flush=True)
    if options.plan:
        return 0
    if why := lacking(arms=any(step.stands for step in steps)):
        print(f"benchmarks: {why}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "benchmarks", *given])
    print("preparing: what is there already takes no time", file=sys.stderr, flush=True)
    prepare(steps)
    rest()
    about, began = report.machine(), time.monotonic()
    ways = {**ROWS, **TUNED} if options.tuned else ROWS
    rows: list[Row] = []
    text = ""
    with closing(STANDING):
        for place, step in enumerate(steps):
            print(f"row {step.number}: {step.title}, about {step.seconds} s", file=sys.stderr, flush=True)
            left = 60 * options.minutes - ENDING_SECONDS - (time.monotonic() - began)
            if step.seconds > left:
                row = left_out(step, left, options.minutes)
            else:
                if not step.stands:
                    STANDING.close()
                row = measured(step, ways[step.number], options.repeats or step.repeats, left)
                if row.missing or row.void:  # arms in whatever state it left them in: one may be dead, or hang
                    STANDING.close()
            row.model = plan.MODELS[step.number]
            rows = sorted([*rows, row], key=lambda one: one.number)
            text = report.write(
                rows, command, options.output, about, new=row, began=began, gpu=() if options.row else GOALS
            )
            print(progress(steps, place, row, time.monotonic() - began), file=sys.stderr, flush=True)
    if options.record:
        report.record(options.output)
        for line in recorded.unexplained():
            print(f"benchmarks/README.md: {line}", file=sys.stderr)
    print(text)
    return 0 if all(row.met for row in rows) else 1


def left_out(step: Step, left: float, minutes: float) -> Row:
    """A row that would not be done in time. ``left``: seconds of the run's ``minutes``."""
    why = f"left out: it takes about {step.seconds} s, and {max(0.0, left):.0f} s of {minutes:g} minutes were left"
    return Row(step.number, step.title, "", missing=why)


class Late(BaseException):
    """A row took too long. No Exception: whatever the row waits for when it rings would be believed to have failed."""


def measured(step: Step, measure: Measure, repeats: int, left: float = math.inf) -> Row:
    """The row, or why there is none: one is that it takes longer than its own bound, or than what is ``left``."""
    before, began = os.getloadavg()[0], time.monotonic()
    try:
        with bounded(min(left, max(ROW_SECONDS, TIMES_LONGER * step.seconds))):
            row = asyncio.run(measure(repeats))
    except (Exception, Late) as error:  # the boundary: one row's, whatever it is
        traceback.print_exc()
        row = Row(step.number, step.title, "", missing=reason(error))
    row.load = [before, os.getloadavg()[0]]
    row.seconds = time.monotonic() - began
    return row


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises `Late` where the block takes longer, also where it waits for another process' line; and again while it
    goes on: one that rings in a callback of the event loop, or in a finalizer, is logged there and goes no further."""

    def late(*_: object) -> NoReturn:
        raise Late(f"it was not done after {shown(seconds)} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def progress(steps: Sequence[Step], place: int, row: Row, gone: float) -> str:
    """One line after a row. What is left is what was planned, by the pace so far."""
    planned, left = (sum(step.seconds for step in some) for some in (steps[: place + 1], steps[place + 1 :]))
    how = f"not measured: {row.missing}" if row.missing else f"void: {row.void}" if row.void else ""
    took = f"row {row.number}: {row.seconds:.0f} s of {steps[place].seconds} planned{', ' if how else ''}{how}"
    times = f"{gone / 60:.0f} min gone, about {left * gone / planned / 60:.0f} left"
    return f"{took}; {place + 1} of {len(steps)} rows, {times}"


if __name__ == "__main__":
    # Arms have sessions of their own, and end with the blocks that started them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
