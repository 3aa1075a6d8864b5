# SPDX-License-Identifier: Apache-2.0
"""The owners that this process reads from: who they are now, found once and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from dynamo_epd.errors import EpdError, HandOffFailed, StaleHandle
from dynamo_epd.transfer.agent import Agent

MAX_CARD_BYTES = 1 << 20
MAX_PEERS = 256

Resolve = Callable[[str], Awaitable[bytes]]


class Card(msgspec.Struct, frozen=True):
    """What an owner tells of itself: msgpack on the control plane, never pickle."""

    incarnation: str
    address: int
    """Of the arena's first byte, in the owner's process."""
    nbytes: int
    nixl: bytes
    """NIXL's own metadata: how to connect, what is registered."""

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, wire: bytes) -> Card:
        """Raises `HandOffFailed` for anything that is not a card."""
        try:
            if len(wire) > MAX_CARD_BYTES:
                raise HandOffFailed(f"{len(wire)} bytes are no metadata of an arena")
            card = msgspec.msgpack.decode(wire, type=cls)
        except (msgspec.MsgspecError, TypeError) as error:
            raise HandOffFailed("the owner's metadata is malformed") from error
        if not (0 < card.address < 1 << 63 and 0 < card.nbytes < 1 << 48):
            raise HandOffFailed("the owner's metadata is out of bounds")
        return card


@dataclass(eq=False)
class Peer:
    """One life of one owner, loaded into NIXL."""

    owner: str
    incarnation: str
    address: int
    nbytes: int
    in_flight: int = 0
    """READs that NIXL has not finished. It is removed from NIXL only when there are none."""
    gone: bool = False


class Peers:
    """Cached by owner; at most `MAX_PEERS`, the longest unused goes first."""

    def __init__(self, agent: Agent, resolve: Resolve):
        self._agent = agent
        self._resolve = resolve
        self._peers: dict[str, Peer] = {}
        self._resolving: dict[str, asyncio.Task[Peer]] = {}

    async def find(self, owner: str, incarnation: str | None = None) -> Peer:
        """The peer behind ``owner``, asked for once however many want it.

        Raises `StaleHandle` if it is not ``incarnation`` any more, `HandOffFailed` if it cannot be found or reached.
        The caller bounds the wait.
        """
        peer = self._peers.get(owner)
        if peer is None or incarnation not in (None, peer.incarnation):
            task = self._resolving.get(owner)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._load(owner))
                self._resolving[owner] = task
                task.add_done_callback(lambda done: self._resolved(owner, done))
            try:
                peer = await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise HandOffFailed("the arena is closing") from None
                raise
        if incarnation not in (None, peer.incarnation):
            raise StaleHandle("the owner of the handle has restarted since")
        self._peers[owner] = self._peers.pop(owner, peer)  # most recently used last
        return peer

    def _resolved(self, owner: str, task: asyncio.Task[Peer]) -> None:
        self._resolving.pop(owner, None)
        if not task.cancelled():
            task.exception()  # whoever waits has it; if all have gone, nobody wants it

    async def _load(self, owner: str) -> Peer:
        try:
            wire = await self._resolve(owner)
        except EpdError:
            raise
        except Exception as error:  # the control plane's client is the caller's: its errors have no common base
            raise HandOffFailed(f"the owner cannot be asked for its metadata: {type(error).__name__}") from error
        card = Card.decode(wire)
        cached = self._peers.get(owner)
        if cached is not None and cached.incarnation == card.incarnation:
            return cached
        if cached is not None:
            self.drop(cached)
        name = self._agent.add_peer(card.nixl)
        if name != card.incarnation:
            raise HandOffFailed("the owner's metadata is of another agent")
        while len(self._peers) >= MAX_PEERS:
            self.drop(next(iter(self._peers.values())))
        peer = self._peers[owner] = Peer(owner, card.incarnation, card.address, card.nbytes)
        return peer

    def drop(self, peer: Peer) -> None:
        """Forget a peer that is dead, or not needed; the next `find` asks again."""
        if self._peers.get(peer.owner) is peer:
            del self._peers[peer.owner]
        if not peer.gone:
            peer.gone = True
            self._remove_if_quiet(peer)

    def fence(self, peer: Peer) -> None:
        """Disconnect now, although READs are in flight: they end with an error instead of some time or never."""
        if self._peers.get(peer.owner) is peer:
            del self._peers[peer.owner]
        peer.gone = True
        self._agent.remove_peer(peer.incarnation)

    def finished(self, peer: Peer) -> None:
        """One READ less in flight."""
        peer.in_flight -= 1
        if peer.gone:
            self._remove_if_quiet(peer)

    def _remove_if_quiet(self, peer: Peer) -> None:
        reloaded = any(other.incarnation == peer.incarnation for other in self._peers.values())
        if peer.in_flight == 0 and not reloaded:
            self._agent.remove_peer(peer.incarnation)

    async def stop_resolving(self) -> None:
        """Whoever waits for an owner's metadata gets `HandOffFailed`."""
        tasks = list(self._resolving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop_all(self) -> None:
        for peer in list(self._peers.values()):
            self.drop(peer)

    def __len__(self) -> int:
        return len(self._peers)
