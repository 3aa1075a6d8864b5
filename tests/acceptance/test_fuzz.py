# SPDX-License-Identifier: Apache-2.0
"""20 000 fuzzed bodies at content validation: no 5xx, no process lost, every neighbour answered rightly."""

from __future__ import annotations

from contextlib import closing

from tests.hardening import messages, stranger
from tests.hardening.edge import Door, Neighbour
from tests.hardening.fuzz import Fuzzer, document_of, shots
from tests.hardening.report import Report
from tests.serving import Graph, at_rest

COUNT = 20_000
SEED = 7
MESSAGES, AT_ONCE = 2000, 100


def test_twenty_thousand_bodies_break_nothing(seeing: Graph) -> None:
    with (
        Report("fuzz", bodies=COUNT, seed=SEED) as report,
        closing(Door(seeing, Neighbour.of_trained(seeing))) as door,
    ):
        drawn = shots(COUNT, SEED, document_of(seeing.url), door.canary.port)
        found = Fuzzer(seeing.url, door.neighbour.asks).run(drawn, report.say)
        report.note(statuses={str(status): count for status, count in sorted(found.statuses.items())})
        report.note(faults=found.faults, slowest_seconds=found.slowest, slowest=found.slowest_shot)
        report.goal("every body is answered or refused rightly, every neighbour too", not found.faults, str(found))
        report.goal("no body is without a reply", sum(found.statuses.values()) == COUNT)
        failed = sum(count for status, count in found.statuses.items() if status >= 500)
        report.goal("no 5xx", not failed, failed)
        assert not report.missed, "\n".join([*report.missed, *found.faults[:10]])
        door.unharmed()
        report.goal("no process is lost, no canary dialled", True)
        at_rest(seeing, 60)
        report.goal("nothing is held", True)


def test_two_thousand_messages_break_nothing(seeing: Graph) -> None:
    with (
        Report("fuzz-messages", messages=MESSAGES, seed=SEED) as report,
        closing(Door(seeing, Neighbour.of_trained(seeing))) as door,
    ):
        sent = messages.drawn(MESSAGES, SEED, door.canary.port)
        faults: list[str] = []
        for first in range(0, MESSAGES, AT_ONCE):
            some = sent[first : first + AT_ONCE]
            for (address, data), frames in zip(some, stranger.send(seeing, some), strict=True):
                if fault := messages.judged(frames):
                    faults.append(f"{address}: {fault}: {data[:300]!r}")
            door.neighbour.asks()
        report.note(faults=faults)
        report.goal("every message is answered or refused, every neighbour rightly", not faults, len(faults))
        assert not report.missed, "\n".join([*report.missed, *faults[:10]])
        door.unharmed()
        report.goal("no process is lost, no canary dialled", True)
        at_rest(seeing, 60)
        report.goal("nothing is held", True)
