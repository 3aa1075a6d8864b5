# SPDX-License-Identifier: Apache-2.0
"""What every test here watches beside its own: the same processes, no dial to a canary, a neighbour served rightly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hardening.edge import Door, Neighbour
from tests.serving import Graph


@pytest.fixture(scope="session")
def door(seeing: Graph) -> Iterator[Door]:
    """Content validation, with the address rules as they ship."""
    door = Door(seeing, Neighbour.of_trained(seeing))
    yield door
    door.close()


@pytest.fixture(scope="session")
def open_door(disagg: Graph) -> Iterator[Door]:
    """The disaggregated graph, which may fetch from servers on this machine."""
    door = Door(disagg, Neighbour.of_untrained(disagg))
    yield door
    door.close()


@pytest.fixture
def unharmed(door: Door, request: pytest.FixtureRequest) -> Iterator[None]:
    """For every case."""
    with door.case(request.node.name):
        yield


@pytest.fixture(scope="class")
def neighbour(door: Door) -> Iterator[None]:
    """For every row."""
    yield
    door.neighbour.asks()


@pytest.fixture
def open_unharmed(open_door: Door, request: pytest.FixtureRequest) -> Iterator[None]:
    with open_door.case(request.node.name):
        yield


@pytest.fixture(scope="class")
def open_neighbour(open_door: Door) -> Iterator[None]:
    yield
    open_door.neighbour.asks()
