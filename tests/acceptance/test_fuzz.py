# SPDX-License-Identifier: Apache-2.0
"""20 000 fuzzed bodies at content validation, and 4 000 at the disaggregated graph: no 5xx, no process lost, every
neighbour answered rightly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest

from tests.conftest import TINY_DISAGG
from tests.hardening import messages, stranger
from tests.hardening.edge import CHAT, COMPLETIONS, Door, Neighbour
from tests.hardening.fuzz import Fuzzer, document_of, narrowed, shots
from tests.hardening.report import Report
from tests.serving import Graph, at_rest, serve

COUNT = 20_000
DISAGG_COUNT = 4_000
SEED = 7
MESSAGES, AT_ONCE = 2000, 100
LEASES_END = 60.0


@pytest.fixture
def shipped() -> Iterator[Graph]:
    """The disaggregated graph with nothing of its configuration changed."""
    with serve("graphs.disagg:Frontend", TINY_DISAGG) as graph:
        yield graph


def test_four_thousand_bodies_break_nothing_in_the_disaggregated_graph(shipped: Graph) -> None:
    """Of the routes that have stages there. It is the first test: the graph is gone when the other one is started."""
    shot_at("fuzz-disagg", shipped, narrowed(document_of(shipped.url), CHAT.path, COMPLETIONS.path), DISAGG_COUNT)


def test_twenty_thousand_bodies_break_nothing(seeing: Graph) -> None:
    shot_at("fuzz", seeing, document_of(seeing.url), COUNT)


def shot_at(name: str, graph: Graph, document: Mapping[str, Any], count: int) -> None:
    """Fails unless the graph bears ``count`` bodies of this document."""
    with Report(name, bodies=count, seed=SEED) as report, closing(Door(graph, Neighbour.of_trained(graph))) as door:
        drawn = shots(count, SEED, document, door.canary.port)
        found = Fuzzer(graph.url, door.neighbour.asks).run(drawn, report.say)
        report.note(statuses={str(status): number for status, number in sorted(found.statuses.items())})
        report.note(faults=found.faults, slowest_seconds=found.slowest, slowest=found.slowest_shot)
        report.goal("every body is answered or refused rightly, every neighbour too", not found.faults, str(found))
        report.goal("no body is without a reply", sum(found.statuses.values()) == count)
        failed = sum(number for status, number in found.statuses.items() if status >= 500)
        report.goal("no 5xx", not failed, failed)
        few = [status for status in (200, 400) if found.statuses[status] < count / 50]
        report.goal("some are answered, some refused", not few, few)
        assert not report.missed, "\n".join([*report.missed, *found.faults[:10]])
        door.unharmed()
        report.goal("no process is lost, no canary dialled", True)
        at_rest(graph, LEASES_END)
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
        at_rest(seeing, LEASES_END)
        report.goal("nothing is held", True)
