# SPDX-License-Identifier: Apache-2.0
"""The READ of one handle, in pieces.

Over shared memory NIXL copies inside the call that starts a READ. One READ of 64 MiB would hold the event loop for
tens of milliseconds, so a large one goes in pieces, each followed by its share of the digest while the bytes are
still in the processor's cache.
"""

from __future__ import annotations

from collections import deque

from dynamo_epd.errors import DigestMismatch, HandOffFailed
from dynamo_epd.transfer.agent import Agent, Read
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.memory import Digest, Memory
from dynamo_epd.transfer.peers import Peer, Peers

PIECE_BYTES = 4 << 20
PIECES_IN_FLIGHT = 4
"""Enough to keep a network busy while the digest runs."""


class Pull:
    """Brings the bytes of ``handle`` to ``offset`` of ``memory``. Its user calls `step` until it says True."""

    def __init__(self, agent: Agent, peers: Peers, peer: Peer, handle: Handle, memory: Memory, offset: int):
        self._agent = agent
        self._peers = peers
        self.peer = peer
        self._handle = handle
        self._memory = memory
        self._offset = offset
        self._started = 0
        self.taken = 0
        """Bytes that have arrived and went into the digest."""
        self._reads: deque[tuple[Read, int]] = deque()
        self._digest = Digest()
        self.done = False

    def step(self) -> bool:
        """Start at most one piece, take what has arrived, in order. True when all is here and the digest is right.

        Raises `HandOffFailed` when NIXL fails and `DigestMismatch`; after either the pull still has to be settled.
        """
        if self.done:
            return True
        try:
            self._start()
            arrived = self._arrived()
        except HandOffFailed:
            self._peers.drop(self.peer)  # NIXL says so at once when a peer dies; the next read asks who is there now
            raise
        for nbytes in arrived:
            self._digest.update(self._memory.bytes_at(self._offset + self.taken, nbytes))
            self.taken += nbytes
        if self.taken == self._handle.length:
            if self._digest.hexdigest() != self._handle.digest:
                raise DigestMismatch("the bytes that arrived are not those that the handle promised")
            self.done = True
        return self.done

    @property
    def ended_lease(self) -> str | None:
        """What its owner is to be told: all bytes were taken, right or wrong, and the lease was for one READ."""
        whole = self.taken == self._handle.length
        return self._handle.lease if whole and self._handle.ends_on_read else None

    def _start(self) -> None:
        left = self._handle.length - self._started
        if left == 0 or len(self._reads) == PIECES_IN_FLIGHT:
            return
        nbytes = min(left, PIECE_BYTES)
        read = self._agent.read(
            self.peer.incarnation,
            self._memory.address + self._offset + self._started,
            self.peer.address + self._handle.offset + self._started,
            nbytes,
        )
        self.peer.in_flight += 1
        self._reads.append((read, nbytes))
        self._started += nbytes
        read.poll()  # posts it: what was only asked for behind another would wait for that one's way there and back

    def _arrived(self) -> list[int]:
        """Sizes of the pieces that have arrived since the last call, in order."""
        arrived = []
        while self._reads and self._reads[0][0].poll():
            arrived.append(self._reads.popleft()[1])
            self._peers.finished(self.peer)
        return arrived

    def settle(self) -> bool:
        """Start nothing more. True when NIXL can write to this process's memory no more."""
        while self._reads and self._reads[0][0].settle():
            self._reads.popleft()
            self._peers.finished(self.peer)
        return not self._reads
