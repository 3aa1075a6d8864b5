# SPDX-License-Identifier: Apache-2.0
"""When owners are told that their bytes were taken, over a double of NIXL. The real one is in test_transfer.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_epd.errors import HandOffFailed
from dynamo_epd.transfer import notices as notices_module
from dynamo_epd.transfer.notices import Notices
from dynamo_epd.transfer.peers import Peer


class ReadDouble:
    def __init__(self, agent: AgentDouble):
        self._agent = agent

    def poll(self) -> bool:
        return self._agent.delivers

    def settle(self) -> bool:
        return self._agent.delivers


class AgentDouble:
    """``said``: notices and READs in order, by peer."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.delivers = True
        self.gone: set[str] = set()

    def _reach(self, peer: str) -> None:
        if peer in self.gone:
            raise HandOffFailed("gone")

    def notify(self, peer: str, notice: bytes) -> None:
        self._reach(peer)
        self.said.append((peer, notice.decode()))

    def read(self, peer: str, local: int, remote: int, nbytes: int) -> ReadDouble:
        self._reach(peer)
        self.said.append((peer, f"READ {nbytes} from {remote} to {local}"))
        return ReadDouble(self)


class PeersDouble:
    def __init__(self) -> None:
        self.dropped: list[str] = []

    def drop(self, peer: Peer) -> None:
        self.dropped.append(peer.incarnation)

    def finished(self, peer: Peer) -> None:
        peer.in_flight -= 1


class MemoryDouble:
    address = 1000

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        return bytes(nbytes)


A, B = Peer("a", "a1", 5000, 64), Peer("b", "b1", 7000, 64)
FLUSH_A, FLUSH_B = ("a1", "READ 1 from 5000 to 1000"), ("b1", "READ 1 from 7000 to 1000")


def made() -> tuple[AgentDouble, PeersDouble, Notices]:
    doubles: tuple[Any, Any, Any] = AgentDouble(), PeersDouble(), MemoryDouble()
    return doubles[0], doubles[1], Notices(*doubles)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "GATHER_SECONDS", 0.01)
    monkeypatch.setattr(notices_module, "DELIVERY_SECONDS", 0.05)


def test_notices_are_gathered_and_then_flushed_once_a_peer() -> None:
    async def main() -> None:
        agent, _, notices = made()
        notices.tell(A, "1")
        notices.tell(B, "2")
        notices.tell(A, "3")
        await asyncio.sleep(0)
        assert agent.said == []
        await asyncio.sleep(0.04)
        assert agent.said == [("a1", "1"), ("a1", "3"), ("b1", "2"), FLUSH_A, FLUSH_B]
        notices.tell(B, "4")
        await asyncio.sleep(0.04)
        assert agent.said[5:] == [("b1", "4"), FLUSH_B]
        assert await notices.close() == []

    asyncio.run(main())


def test_an_owner_that_is_gone_keeps_nothing_from_the_others() -> None:
    async def main() -> None:
        agent, peers, notices = made()
        agent.gone.add("a1")
        notices.tell(A, "1")
        notices.tell(B, "2")
        await asyncio.sleep(0.04)
        assert agent.said == [("b1", "2"), FLUSH_B]
        assert set(peers.dropped) == {"a1"}

    asyncio.run(main())


def test_what_is_not_delivered_is_waited_for_no_longer_and_settled_at_the_end() -> None:
    async def main() -> None:
        agent, _, notices = made()
        agent.delivers = False
        await notices.deliver({A: ["-"]})
        (left,) = await notices.close()
        assert left.peer is A
        agent.delivers = True
        assert left.settle()

    asyncio.run(main())


def test_who_closes_tells_first_what_is_untold() -> None:
    async def main() -> None:
        agent, _, notices = made()
        notices.tell(A, "1")
        assert await notices.close() == []
        assert agent.said == [("a1", "1")]

    asyncio.run(main())
