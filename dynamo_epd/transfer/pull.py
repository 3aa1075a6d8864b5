# SPDX-License-Identifier: Apache-2.0
"""The READ of one handle, in pieces.

Over shared memory NIXL copies inside the call that starts a READ. One READ of 64 MiB would hold the event loop for
tens of milliseconds, so a large one goes in pieces. The digest takes each in a thread while the next is copied, still
from the processor's cache: neither holds the GIL meanwhile (32 MiB: 1.31 and 1.24 times NIXL itself where it took turns
with the copying, 1.22 and 1.25 beside it; ``make bench ROW=3``).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from dynamo_epd.errors import DigestMismatch, HandOffFailed
from dynamo_epd.transfer.agent import Agent, Read
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.memory import Digest, Memory
from dynamo_epd.transfer.peers import Peer, Peers

PIECE_BYTES = 8 << 20
PIECES_IN_FLIGHT = 4
"""Enough to keep a network busy while the digest runs."""

_digests = ThreadPoolExecutor(1, "digest")
"""One for all: it takes bytes several times as fast as they are copied."""


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
        """Bytes that have arrived."""
        self._reads: deque[tuple[Read, int]] = deque()
        self._digest = Digest()
        self._digested = 0
        """Bytes that went into the digest, those in `_digesting` included."""
        self._digesting: Future[None] | None = None
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
        self.taken += sum(arrived)
        if self._all_digested():
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

    def _all_digested(self) -> bool:
        if self._digesting is not None:
            if not self._digesting.done():
                return False
            self._digesting = None
        if self._digested < self.taken:
            fresh = self._memory.bytes_at(self._offset + self._digested, self.taken - self._digested)
            self._digested = self.taken
            if self._digested < self._handle.length:
                self._digesting = _digests.submit(self._digest.update, fresh)
                return False
            self._digest.update(fresh)  # nothing is copied beside it
        return self._digested == self._handle.length

    def settle(self) -> bool:
        """Start nothing more. True when NIXL can write to this process's memory no more."""
        while self._reads and self._reads[0][0].settle():
            self._reads.popleft()
            self._peers.finished(self.peer)
        return not self._reads
