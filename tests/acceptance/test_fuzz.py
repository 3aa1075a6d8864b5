# SPDX-License-Identifier: Apache-2.0
"""20 000 fuzzed bodies at content validation: no 5xx, no process lost, every neighbour answered rightly."""

from __future__ import annotations

from tests.hardening.edge import Door, Neighbour
from tests.hardening.fuzz import Fuzzer, shots
from tests.serving import Graph, at_rest

COUNT = 20_000
SEED = 7


def test_twenty_thousand_bodies_break_nothing(seeing: Graph) -> None:
    door = Door(seeing, Neighbour.of_trained(seeing))
    report = Fuzzer(seeing.url, door.neighbour.asks).run(shots(COUNT, SEED))
    print(report)
    assert not report.faults, "\n".join(report.faults[:10])
    assert sum(report.statuses.values()) == COUNT
    door.unharmed()
    at_rest(seeing, 60)
    door.close()
