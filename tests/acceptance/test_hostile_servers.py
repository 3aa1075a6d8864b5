# SPDX-License-Identifier: Apache-2.0
"""Servers that misbehave, and the files that they may hand out, at content validation on the trained models.

`tests/hardening/test_served_media.py` tries the servers on the disaggregated graph, and `test_pictures.py` the files in
the body. Content validation as it ships may not fetch from this machine: here it may.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hardening.conftest import open_neighbour, open_unharmed  # noqa: F401
from tests.hardening.edge import CHAT, Door, Neighbour, chat_with, refused
from tests.hardening.files import BOMBS, BROKEN, FOREIGN, Make
from tests.hardening.test_served_media import (  # noqa: F401
    Scripted,
    TestRedirects,
    TestServers,
    answers,
    ok,
)
from tests.serving import at_rest, serve

pytestmark = pytest.mark.usefixtures("open_unharmed")

LEASES_END = 60.0


@pytest.fixture(scope="module")
def open_door() -> Iterator[Door]:
    """In the place of the disaggregated graph's."""
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", "--Common.media.allow-private=true") as graph:
        door = Door(graph, Neighbour.of_trained(graph))
        yield door
        at_rest(graph, LEASES_END)
        door.close()


@pytest.mark.usefixtures("open_neighbour")
class TestFiles:
    """Fetched once, whatever their server calls them."""

    @pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
    def test_too_many_pixels_are_refused_from_the_header(self, open_door: Door, make: Make) -> None:
        served(open_door, make(), 400, "image_too_large")

    @pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
    def test_what_cannot_be_decoded_is_refused(self, open_door: Door, make: Make) -> None:
        served(open_door, make(), (400, 415))

    @pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
    @pytest.mark.parametrize("kind", ["png", "svg+xml"])
    def test_another_format_is_refused_whatever_it_is_called(self, open_door: Door, make: Make, kind: str) -> None:
        served(open_door, make(), 415, "unsupported_media_type", kind)


def served(door: Door, file: bytes, status: int | tuple[int, ...], code: str | None = None, kind: str = "png") -> None:
    server = Scripted(ok(file, f"Content-Type: image/{kind}"))
    refused(door.post(CHAT, chat_with(server.url)), status, code)
    assert server.connections == 1
    server.close()
