# SPDX-License-Identifier: Apache-2.0
"""The disaggregated graph as it ships may dial nothing of the inside: the rows of HARDENING.md about addresses and
schemes, and names that lead there.

`tests/hardening/test_urls.py` tries the rows on content validation; `tests/hardening/test_disaggregated.py` tries the
other rows on a disaggregated graph that may fetch from this machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import TINY_DISAGG
from tests.hardening.conftest import neighbour, unharmed  # noqa: F401
from tests.hardening.edge import CHAT, Door, Neighbour, chat_with, refused
from tests.hardening.names import Names
from tests.hardening.test_urls import TestAddresses, TestSchemes  # noqa: F401
from tests.serving import at_rest, serve

pytestmark = pytest.mark.usefixtures("unharmed")

LEASES_END = 60.0
NAME = "pictures.example"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Names:
    return Names(tmp_path_factory.mktemp("names") / "hosts")


@pytest.fixture(scope="module")
def door(names: Names) -> Iterator[Door]:
    """In the place of content validation's. Nothing of its configuration is changed."""
    with serve("graphs.disagg:Frontend", TINY_DISAGG, within=names.within) as graph:
        door = Door(graph, Neighbour.of_trained(graph))
        yield door
        at_rest(graph, LEASES_END)
        door.close()


INSIDE = {
    "loopback": "127.0.0.1",
    "loopback, another": "127.255.255.254",
    "loopback IPv6": "::1",
    "IPv4 in IPv6": "::ffff:127.0.0.1",
    "nothing": "0.0.0.0",
    "nothing IPv6": "::",
    "private 10": "10.0.0.1",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "shared": "100.64.0.1",
    "unique local": "fd00::1",
    "link-local": "169.254.1.1",
    "metadata": "169.254.169.254",
    "metadata in IPv6": "fd00:ec2::254",
    "metadata, Alibaba": "100.100.100.200",
    "metadata, Azure": "168.63.129.16",
    "NAT64": "64:ff9b::7f00:1",
    "6to4": "2002:7f00:1::",
    "multicast": "224.0.0.1",
}
"""As a name server writes them."""


@pytest.mark.usefixtures("neighbour")
class TestNames:
    """Of which nothing is wrong but where they lead. A real resolver reads them from a file of this graph's own."""

    @pytest.mark.parametrize("address", INSIDE.values(), ids=INSIDE)
    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_a_name_that_leads_inside_is_not_dialled(self, door: Door, names: Names, address: str, scheme: str) -> None:
        if names.refusal:
            pytest.skip(f"no graph can have an /etc/hosts of its own here: {names.refusal}")
        names.lead(NAME, address)
        refused(door.post(CHAT, chat_with(f"{scheme}://{NAME}/x.png")), 400, "url_not_allowed")
