# SPDX-License-Identifier: Apache-2.0
"""What an operator may say of the hosts of pictures, and names that change, at a running graph.

The disaggregated graph has ``media.ca-file``, ``media.allowed-hosts`` and an ``/etc/hosts`` of its own. It may fetch
from this machine, or nothing here could answer it: what must not be dialled is what stays shut even so.
`tests/acceptance/test_shipped_addresses.py` has the rules as they ship.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.certificates import Certificates
from tests.conftest import TINY_DISAGG
from tests.hardening.conftest import open_neighbour, open_unharmed  # noqa: F401
from tests.hardening.edge import CHAT, Door, Neighbour, Reply, chat_with, refused
from tests.hardening.names import Names
from tests.hardening.test_served_media import Scripted, ok, redirect
from tests.questions import picture
from tests.serving import at_rest, serve

pytestmark = pytest.mark.usefixtures("open_unharmed")

LEASES_END = 60.0
GOOD = ok(picture(1))
HERE = "127.0.0.1"
NAME = "pictures.example"
LISTED = (HERE, NAME, "'*.archive.example'")
ASKED, AT_ONCE = 200, 8
"""Requests while a name changes."""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Names:
    return Names(tmp_path_factory.mktemp("names") / "hosts")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("given"), f"IP:{HERE}")


@pytest.fixture(scope="module")
def open_door(names: Names, certificates: Certificates) -> Iterator[Door]:
    """In the place of the disaggregated graph's that has no such rules."""
    media = {"allow-private": "true", "ca-file": certificates.root, "allowed-hosts": f"[{', '.join(LISTED)}]"}
    overrides = [f"--Common.media.{key}={value}" for key, value in media.items()]
    with serve("graphs.disagg:Frontend", TINY_DISAGG, *overrides, within=names.within) as graph:
        door = Door(graph, Neighbour.of_trained(graph))
        yield door
        at_rest(graph, LEASES_END)
        door.close()


def asked_for(door: Door, url: str) -> Reply:
    return door.post(CHAT, chat_with(url))


@pytest.mark.usefixtures("open_neighbour")
class TestTls:
    def test_a_picture_is_fetched_from_whom_the_given_authority_vouches_for(
        self, open_door: Door, certificates: Certificates
    ) -> None:
        with closing(Scripted(GOOD, certificates.server)) as server:
            assert asked_for(open_door, server.url).status == 200
            assert server.asked == 1

    def test_nothing_is_asked_of_whom_another_authority_vouches_for(
        self, open_door: Door, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        others = Certificates(tmp_path_factory.mktemp("others"), f"IP:{HERE}")
        with closing(Scripted(GOOD, others.server)) as server:
            refused(asked_for(open_door, server.url), 400, "invalid_image")
            assert (server.connections, server.asked) == (1, 0)

    def test_a_redirect_from_https_to_https_is_followed(self, open_door: Door, certificates: Certificates) -> None:
        with (
            closing(Scripted(GOOD, certificates.server)) as last,
            closing(Scripted(redirect(last.url), certificates.server)) as first,
        ):
            assert asked_for(open_door, first.url).status == 200
            assert (first.asked, last.asked) == (1, 1)

    @pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
    def test_a_redirect_from_https_to_http_is_not_followed(
        self, open_door: Door, certificates: Certificates, status: str
    ) -> None:
        """To a host of the list: nothing else speaks against it."""
        plain = f"http://{HERE}:{open_door.canary.port}/x.png"
        with closing(Scripted(redirect(plain, status), certificates.server)) as server:
            reply = asked_for(open_door, server.url)
            refused(reply, 400, "url_not_allowed")
            assert "from https to http" in reply.error["message"]
            assert server.asked == 1


@pytest.mark.usefixtures("open_neighbour")
class TestAllowedHosts:
    def test_a_picture_on_a_host_of_the_list_is_fetched(self, open_door: Door) -> None:
        with closing(Scripted(GOOD)) as last, closing(Scripted(redirect(last.url))) as first:
            assert asked_for(open_door, last.url).status == 200
            assert asked_for(open_door, first.url).status == 200
            assert (first.asked, last.asked) == (1, 2)

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "[::1]", "archive.example", f"{NAME}.com", f"x{NAME}"])
    @pytest.mark.parametrize("redirected", [False, True], ids=["at once", "by a redirect"])
    def test_another_host_of_this_machine_is_not_dialled(self, open_door: Door, host: str, redirected: bool) -> None:
        url = f"http://{host}:{open_door.canary.port}/x.png"
        with closing(Scripted(redirect(url))) as server:
            refused(asked_for(open_door, server.url if redirected else url), 400, "url_not_allowed")
            assert server.asked == redirected


SHUT = {
    "nothing": ("0.0.0.0",),
    "nothing IPv6": ("::",),
    "IPv4 in IPv6": (f"::ffff:{HERE}",),
    "metadata": ("169.254.169.254",),
    "one of two": (HERE, "0.0.0.0"),
}
"""What is dialled by no means. The kernel takes all but the fourth to this machine, where a canary listens."""


@pytest.mark.usefixtures("open_neighbour")
class TestNames:
    """That lead elsewhere from one moment to the next: a real resolver reads a real file, which the test rewrites."""

    @pytest.fixture(autouse=True)
    def changeable(self, names: Names) -> Iterator[None]:
        if names.refusal:
            pytest.skip(f"no graph can have an /etc/hosts of its own here: {names.refusal}")
        names.lead(NAME, HERE)
        yield
        names.lead(NAME)

    @pytest.mark.parametrize("host", [NAME, "deep.archive.example"])
    def test_a_name_of_the_list_is_looked_up_and_followed(self, open_door: Door, names: Names, host: str) -> None:
        names.lead(host, HERE)
        with closing(Scripted(GOOD)) as last, closing(Scripted(redirect(last.url_of(host)))) as first:
            assert asked_for(open_door, first.url_of(host)).status == 200
            assert (first.asked, last.asked) == (1, 1)

    @pytest.mark.parametrize("addresses", SHUT.values(), ids=SHUT)
    def test_a_name_of_the_list_that_leads_astray_is_not_dialled(
        self, open_door: Door, names: Names, addresses: tuple[str, ...]
    ) -> None:
        names.lead(NAME, *addresses)
        refused(asked_for(open_door, f"http://{NAME}:{open_door.canary.port}/x.png"), 400, "url_not_allowed")

    @pytest.mark.parametrize("addresses", SHUT.values(), ids=SHUT)
    def test_a_name_that_changes_between_two_hops_is_looked_up_and_judged_again(
        self, open_door: Door, names: Names, addresses: tuple[str, ...]
    ) -> None:
        """The first hop's server turns its own name away before it redirects to it."""

        def turn_away(connection: socket.socket) -> None:
            names.lead(NAME, *addresses)
            redirect(f"http://{NAME}:{open_door.canary.port}/x.png")(connection)

        with closing(Scripted(turn_away)) as server:
            refused(asked_for(open_door, server.url_of(NAME)), 400, "url_not_allowed")
            assert server.asked == 1

    def test_a_name_that_changes_between_check_and_use_is_dialled_where_it_was_checked(
        self, open_door: Door, names: Names
    ) -> None:
        """The name leads to a good server and to the unspecified address, by turns of a fraction of a millisecond. Who
        looked it up once to judge it and again to dial it would reach the canary on ``::1``, where the kernel takes
        that address, in every tenth or twentieth request."""
        with (
            closing(Scripted(GOOD)) as server,
            closing(socket.create_server(("::1", server.port), family=socket.AF_INET6)) as canary,
        ):
            canary.setblocking(False)
            with names.turning(NAME, HERE, "::"), ThreadPoolExecutor(AT_ONCE) as pool:
                replies = list(pool.map(lambda _: asked_for(open_door, server.url_of(NAME)), range(ASKED)))
            with pytest.raises(BlockingIOError):
                canary.accept()
        for reply in replies:
            if reply.status != 200:
                refused(reply, 400, "url_not_allowed")
        found = Counter(reply.status for reply in replies)
        print(f"a name that changes: {dict(found)}")
        assert found[200] and found[400], "it did not change while it was looked up"
        assert server.asked == found[200]
