# SPDX-License-Identifier: Apache-2.0
"""What rows ask for and no figure has in it: models, and the environment of Dynamo's own stages. Before the clock.

    python -m benchmarks.preparing 1 4       # what these rows need, unless it is there

In a process of its own: the client of a whole run has no torch in its heap then, where no row needs it there.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks import checkpoints
from benchmarks.arms import install_stock
from benchmarks.checkpoints import SERVED, TINY
from benchmarks.plan import Step
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

Need = Callable[[], object]
"""Makes what is not there yet."""

tiny, served = partial(checkpoints.directory, TINY), partial(checkpoints.directory, SERVED)

NEEDED: Mapping[int, Sequence[Need]] = {
    transfer.NUMBER: (),
    weights.NUMBER: (tiny, weights.large),
    encoder.NUMBER: (*(partial(checkpoints.directory, name) for name in encoder.TOWERS), install_stock),
    texts.NUMBER: (texts.base,),
    pictures.NUMBER: (pictures.tiny,),
    added.NUMBER: (tiny,),
    copies.NUMBER: (copies.large,),
    answer.NUMBER: (tiny, install_stock),
    kv.NUMBER: (served,),
    repeated.NUMBER: (served,),
    storm.NUMBER: (served,),
    goodput.NUMBER: (served, install_stock),
    overlap.NUMBER: (served,),
    start.NUMBER: (tiny,),
}
"""By row. What fails here a row asks for again, and says itself why it has it not."""


def prepare(steps: Sequence[Step]) -> None:
    """What these rows need is there afterwards, or was tried."""
    numbers = [str(step.number) for step in steps]
    subprocess.run([sys.executable, "-m", "benchmarks.preparing", *numbers], stdout=sys.stderr, check=False)


def make(numbers: Sequence[int]) -> bool:
    """Whether all of it is there now. One that fails leaves the others."""
    failed = False
    for need in dict.fromkeys(need for number in numbers for need in NEEDED[number]):
        try:
            need()
        except Exception:  # the boundary: a disk that is full, an index that is away
            traceback.print_exc()
            failed = True
    return not failed


if __name__ == "__main__":
    sys.exit(0 if make([int(number) for number in sys.argv[1:]]) else 1)
