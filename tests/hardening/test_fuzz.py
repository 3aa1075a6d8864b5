# SPDX-License-Identifier: Apache-2.0
"""A few hundred fuzzed bodies; `tests/acceptance/test_fuzz.py` sends 20 000."""

from __future__ import annotations

import pytest

from tests.hardening.edge import Door
from tests.hardening.fuzz import Fuzzer, shots

COUNT = 300
SEED = 7


@pytest.mark.usefixtures("unharmed")
def test_no_body_breaks_anything(door: Door) -> None:
    report = Fuzzer(door.graph.url, door.neighbour.asks).run(shots(COUNT, SEED))
    print(report)
    assert not report.faults, "\n".join(report.faults[:10])
    assert sum(report.statuses.values()) == COUNT
    assert report.statuses[400] > COUNT / 4 and report.statuses[200] > COUNT / 50, report


def test_a_seed_gives_the_same_bodies_again() -> None:
    assert list(shots(50, 3)) == list(shots(50, 3))
    assert list(shots(50, 3)) != list(shots(50, 4))
