# SPDX-License-Identifier: Apache-2.0
"""Registered host memory that owns what it publishes and reads what others publish.

An owner reserves slots, fills and publishes them, and gives out handles under leases; a reader READs a handle's bytes
over NIXL straight into its own arena, checks the digest and uses them there. What is published under a key stays as a
cache while there is room. One arena serves both sides.

Everything here runs on one asyncio event loop and is called from no other thread.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from dynamo_epd import tracing
from dynamo_epd.errors import (
    DigestMismatch,
    HandOffFailed,
    LeaseExpired,
    Overloaded,
    PayloadTooLarge,
    TransferTimeout,
)
from dynamo_epd.transfer.agent import Agent
from dynamo_epd.transfer.allocator import ALIGNMENT
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.memory import Memory, digest_of
from dynamo_epd.transfer.notices import Notices
from dynamo_epd.transfer.peers import Card, Peer, Peers, Resolve
from dynamo_epd.transfer.pull import Pull
from dynamo_epd.transfer.slots import Entry, Reservation, Slot, Slots

MARGIN_SECONDS = 0.1
"""A READ is not started with less of its lease left. Clocks may differ by `slots.GRACE_SECONDS` more."""

AT_ONCE_SECONDS = 0.0002
"""How long a READ is polled before the event loop has its first turn."""

TURN_SECONDS = 0.001
"""How long the bytes of large READs may hold the event loop."""

READS_A_TURN = 8
"""Of READs that ended before the event loop had its turn, one in so many waits for that: who takes one after the other
would leave it none."""

SPIN_SECONDS = 0.002
"""How long a READ that makes no progress is polled on every turn of the event loop before polls are spaced out."""

CONNECT_SECONDS = 3.0
"""How long a handshake may take."""

NOTICES_SECONDS = 0.1
"""For the notices of reads that have just ended to leave this process, which many turns of NIXL's progress thread do.
Without them the owners would keep what was read until its lease ends."""

FENCE_SECONDS = 5.0
"""A READ given up and still in flight after this long has its peer disconnected, which ends it."""

MAX_HANDLES = 256
"""Handles in one read."""


@dataclass(frozen=True)
class ArenaStats:
    """Plain numbers for a metrics file. Counters only grow; the first eight are what is there now."""

    bytes_capacity: int
    bytes_used: int
    bytes_quarantined: int
    entries: int
    leases: int
    waiters: int
    peers: int
    reads_in_flight: int
    hits: int
    misses: int
    evictions: int
    leases_expired: int
    transfers: int
    transfer_bytes: int
    transfer_seconds: float
    transfer_failures: int
    digest_failures: int


class Arena:
    """See the module. `open` it, `close` it; between them the memory stays registered at one address."""

    def __init__(self, memory: Memory, agent: Agent, owner: str, resolve: Resolve, max_waiters: int):
        self._memory = memory
        self._agent = agent
        self._owner = owner
        self._slots = Slots(memory, max_waiters=max_waiters)
        self._peers = Peers(agent, resolve)
        self._notices = Notices(agent, self._peers, memory)
        self._listener: asyncio.Task[None] | None = None
        self._hurry = False
        self._reaper: asyncio.Task[None] | None = None
        self._quarantine: list[Quarantined] = []
        self._closed = False
        self._reads_in_flight = 0
        self._at_once_so_far = itertools.count(1)
        self._quiet = asyncio.Event()
        """Set while no read waits for bytes."""
        self._quiet.set()
        self._transfers = 0
        self._transfer_bytes = 0
        self._transfer_seconds = 0.0
        self._transfer_failures = 0
        self._digest_failures = 0

    @classmethod
    async def open(cls, nbytes: int, *, owner: str, resolve: Resolve, max_waiters: int = 256) -> Arena:
        """Map and register ``nbytes``, once.

        ``owner`` is how readers reach this process on the control plane; ``resolve(owner)`` brings another owner's
        `metadata` from there. At most ``max_waiters`` wait for room at once. Memory is pinned if torch is imported and
        CUDA is there. Who reads tensors imports torch before, or the first read takes the second that this takes.
        """
        memory = Memory(nbytes + ALIGNMENT)
        agent = Agent(f"arena-{uuid.uuid4().hex}", memory.address, memory.nbytes)
        return cls(memory, agent, owner, resolve, max_waiters)

    def metadata(self) -> bytes:
        """What the peers' ``resolve`` must return for this owner: see `peers.Card`."""
        card = Card(self._agent.name, self._memory.address, self._memory.nbytes, self._agent.metadata())
        return card.encode()

    @property
    def incarnation(self) -> str:
        """This life's name: a process that restarts has another."""
        return self._agent.name

    # Owner's side

    def lookup(self, key: str, *, again: bool = False) -> Entry | None:
        """What was published under ``key``, if it is still here. Lease it before the next ``await``. ``again``: for one
        that has been counted among the hits or misses."""
        return self._slots.lookup(key, again=again)

    async def reserve(self, sizes: Sequence[int], timeout: float) -> Reservation:
        """Slots of these ``sizes`` (bytes), all at once or none, in the order of asking; a context manager.

        Ask for all that a request needs in one call: waiting for more while holding some is how deadlocks begin.
        Raises `PayloadTooLarge` if the arena is too small, `Overloaded` after ``timeout`` seconds or if too many wait.
        """
        self._check_open()
        return await self._slots.reserve(sizes, timeout)

    def lease(
        self, entry: Entry, seconds: float, *, ends_on_read: bool = True, renewed_within: float = math.inf
    ) -> Handle:
        """A handle to ``entry`` that is good for ``seconds``, and until the first READ if ``ends_on_read``.

        ``renewed_within``: seconds after which it ends before, unless it is renewed by then: what a reader may need
        for long is not held as long for one that died. Several leases may be out on one entry. Raises
        `HandOffFailed` if the entry was evicted.
        """
        self._check_open()
        lease = self._slots.lease(entry, min(seconds, renewed_within), ends_on_read=ends_on_read)
        if ends_on_read:
            self._hurry = True  # a READ follows soon
            if self._listener is None:
                self._listener = asyncio.get_running_loop().create_task(self._listen())
        return Handle(
            self._owner,
            self.incarnation,
            lease,
            entry.offset,
            entry.length,
            entry.shape,
            entry.dtype,
            entry.digest,
            time.time() + seconds,
            ends_on_read,
        )

    def renew(self, lease: str, seconds: float) -> bool:
        """Lets a lease end ``seconds`` from now. False where it has ended already."""
        return self._slots.renew(lease, seconds)

    def release(self, lease: str) -> None:
        """End a lease now. A READ of it that is still in flight will fail on its digest if the slot is reused."""
        self._slots.release(lease)

    async def _listen(self) -> None:
        """Take notices while a lease waits for one, then end: an idle process polls nothing."""
        pause = 0.0
        try:
            while self._slots.leases_that_notice:
                for notice in self._agent.notices():
                    self._slots.notice(notice[:64].decode("ascii", "replace"))
                pause = 0.002 if self._hurry or self._slots.waiters else min(pause * 2, 0.02)
                self._hurry = False
                await asyncio.sleep(pause)
        finally:
            self._listener = None

    # Reader's side

    async def connect(self, owner: str) -> None:
        """Shake hands with ``owner`` now, so that the first hand-off is as fast as the next. Raises `HandOffFailed`.

        A handshake takes 10 ms. One over TCP was seen to hang, on a busy machine, for a reason not found: hence a
        second attempt.
        """
        try:
            await self._shake_hands(owner)
        except TransferTimeout:
            await self._shake_hands(owner)

    async def _shake_hands(self, owner: str) -> None:
        self._check_open()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                peer = await self._peers.find(owner)
        except TimeoutError:
            raise TransferTimeout(f"the owner's metadata did not come within {CONNECT_SECONDS:g} s") from None
        if peer.incarnation == self.incarnation:
            return
        self._agent.connect(peer.incarnation)
        nothing = Handle(owner, peer.incarnation, "-", 0, 1, (1,), "bytes", digest_of(b"\0"), math.inf, False)
        try:
            async with self._read([nothing], CONNECT_SECONDS, counted=False):
                pass
        except TransferTimeout:
            self._peers.fence(peer)
            raise
        # Notices go another way than the bytes, which would take the first hand-off 10 ms to lay.
        await self._notices.deliver({peer: ["-"]})

    @asynccontextmanager
    async def read(self, handles: Sequence[Handle], *, timeout: float) -> AsyncIterator[list[Any]]:
        """READ all of ``handles``; yields a torch tensor for each (a memoryview for ``bytes``), in order.

        They are views of this arena, valid inside the block only: copy what must live longer, and do not wait for room
        in this arena within. ``timeout`` (seconds) bounds all that comes before. Raises `HandOffFailed` for a handle
        that makes no sense and for an owner that is gone, `StaleHandle`, `LeaseExpired`, `DigestMismatch`,
        `TransferTimeout`, and what `reserve` raises.
        """
        try:
            for handle in handles:
                handle.check()
            if len(handles) > MAX_HANDLES:
                raise HandOffFailed(f"{len(handles)} handles in one read")
        except HandOffFailed:
            self._transfer_failures += 1
            raise
        async with self._read(handles, timeout) as tensors:
            yield tensors

    @asynccontextmanager
    async def _read(
        self, handles: Sequence[Handle], timeout: float, *, counted: bool = True
    ) -> AsyncIterator[list[Any]]:
        """``counted``: whether it is a transfer to those who look at `stats`. A handshake is none."""
        self._check_open()
        lease_left = min((handle.lease_end for handle in handles), default=math.inf) - time.time()
        if lease_left < MARGIN_SECONDS:
            self._transfer_failures += 1
            raise LeaseExpired("the handle's lease is over, or too nearly")
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        deadline = loop.time() + min(timeout, lease_left)
        reservation: Reservation | None = None
        pulls: list[Pull] = []
        lengths = [handle.length for handle in handles]
        with tracing.span("nixl.read", {"nixl.handles": len(handles), "nixl.bytes": sum(lengths)}):
            self._reads_in_flight += 1
            self._quiet.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    peers = [await self._peer_of(handle) for handle in handles]
                reservation = await self._slots.reserve(lengths, deadline - loop.time())
                for slot, handle, peer in zip(reservation.slots, handles, peers, strict=True):
                    if peer is None:
                        self._copy(handle, slot)
                    else:
                        pulls.append(Pull(self._agent, self._peers, peer, handle, self._memory, slot.offset))
                if not _at_once(pulls):
                    async with asyncio.timeout_at(deadline):
                        await self._finish(pulls)
                elif next(self._at_once_so_far) % READS_A_TURN == 0:
                    await asyncio.sleep(0)
            except BaseException as error:
                # Who leaves, or finds no room here, says nothing of the transfer.
                no_failure = (asyncio.CancelledError, Overloaded, PayloadTooLarge)
                self._transfer_failures += counted and not isinstance(error, no_failure)
                self._digest_failures += isinstance(error, DigestMismatch)
                if reservation is not None:
                    self._give_up(pulls, reservation)
                if isinstance(error, TimeoutError):
                    if lease_left < timeout:
                        raise LeaseExpired("the lease ended before the READ did") from None
                    raise TransferTimeout(f"the bytes did not arrive within {timeout:g} s") from None
                raise
            finally:
                for pull in pulls:
                    if (lease := pull.ended_lease) is not None:
                        self._notices.tell(pull.peer, lease)
                self._reads_in_flight -= 1
                if not self._reads_in_flight:
                    self._quiet.set()
        if counted:
            self._transfers += len(handles)
            self._transfer_bytes += sum(lengths)
            self._transfer_seconds += time.monotonic() - started
        with reservation as slots:
            yield [
                self._memory.view(slot.offset, handle.shape, handle.dtype)
                for slot, handle in zip(slots, handles, strict=True)
            ]

    async def _peer_of(self, handle: Handle) -> Peer | None:
        """Whom to READ from; None for a handle of our own."""
        if handle.incarnation == self.incarnation:
            handle.check_within(self._memory.nbytes)
            return None
        peer = await self._peers.find(handle.owner, handle.incarnation)
        handle.check_within(peer.nbytes)
        return peer

    def _copy(self, handle: Handle, slot: Slot) -> None:
        """What a READ does, within one arena."""
        entry = self._slots.leased(handle.lease)
        if entry is None:
            raise LeaseExpired("the handle's lease is over")
        target = self._memory.bytes_at(slot.offset, handle.length)
        target[:] = self._memory.bytes_at(handle.offset, handle.length)
        if digest_of(target) != handle.digest:
            raise DigestMismatch("the bytes are not those that the handle promised")
        self._slots.notice(handle.lease)

    async def _finish(self, pulls: list[Pull]) -> None:
        """Step all pulls to their end. Polling is what moves the bytes: spin while they move, then slow down. The event
        loop has its turn where none have moved, and `TURN_SECONDS` after the last one (``make bench ROW=3``)."""
        clock = time.monotonic  # the event loop's may stand still while it has no turn (uvloop's does)
        taken, moved, pause = -1, clock(), 0.0
        turned = moved
        pending = pulls
        while pending := [pull for pull in pending if not pull.step()]:
            self._check_open()
            before, taken = taken, sum(pull.taken for pull in pulls)
            if taken != before:
                moved, pause = clock(), 0.0
                if moved - turned < TURN_SECONDS:
                    continue
            elif clock() - moved > SPIN_SECONDS:
                pause = min(pause * 2 or 0.001, 0.01)
            await asyncio.sleep(pause)
            turned = clock()

    def _give_up(self, pulls: list[Pull], reservation: Reservation) -> None:
        """Free the slots of a read that failed, as soon as NIXL can write to them no more."""
        if _settled(pulls):
            reservation.free()
            return
        fence_at = asyncio.get_running_loop().time() + FENCE_SECONDS
        self._quarantine.append(Quarantined(pulls, reservation, fence_at))
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        pause = 0.001
        try:
            while self._quarantine:
                self._reap_once(asyncio.get_running_loop().time())
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.1)
        finally:
            self._reaper = None

    def _reap_once(self, now: float) -> None:
        for held in list(self._quarantine):
            if now >= held.fence_at:
                held.fence_at = math.inf
                for peer in {pull.peer for pull in held.pulls if not pull.settle()}:
                    self._peers.fence(peer)
            if _settled(held.pulls):
                self._quarantine.remove(held)
                if held.reservation is not None:
                    held.reservation.free()

    # Both

    def stats(self) -> ArenaStats:
        slots = self._slots
        return ArenaStats(
            bytes_capacity=slots.capacity,
            bytes_used=slots.bytes_used,
            bytes_quarantined=sum(
                slot.nbytes for held in self._quarantine if held.reservation for slot in held.reservation.slots
            ),
            entries=slots.entries,
            leases=slots.leases,
            waiters=slots.waiters,
            peers=len(self._peers),
            reads_in_flight=self._reads_in_flight,
            hits=slots.hits,
            misses=slots.misses,
            evictions=slots.evictions,
            leases_expired=slots.expired,
            transfers=self._transfers,
            transfer_bytes=self._transfer_bytes,
            transfer_seconds=self._transfer_seconds,
            transfer_failures=self._transfer_failures,
            digest_failures=self._digest_failures,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise HandOffFailed("the arena is closed")

    async def close(self) -> None:
        """Refuse what waits, end what is in flight, leave NIXL, unmap. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._slots.close()
        await self._peers.stop_resolving()
        await self._quiet.wait()
        for task in (self._listener, self._reaper):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._quarantine.append(Quarantined(await self._notices.close(), None, 0.0))
        for held in self._quarantine:
            held.fence_at = 0.0
        for _ in range(100):
            self._reap_once(asyncio.get_running_loop().time())
            if not self._quarantine:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(NOTICES_SECONDS)
        self._peers.drop_all()
        self._agent.close()
        self._memory.close()


@dataclass(eq=False)
class Quarantined:
    """Slots of a read that was given up while NIXL could still write to them."""

    pulls: list[Pull]
    reservation: Reservation | None
    fence_at: float
    """Event loop's clock, seconds."""


def _at_once(pulls: list[Pull]) -> bool:
    """Whether all have ended within `AT_ONCE_SECONDS`, without a turn of the loop, which takes as long as a small READ.
    Raises what `Pull.step` does."""
    end = time.perf_counter() + AT_ONCE_SECONDS
    pending = pulls
    while pending := [pull for pull in pending if not pull.step()]:
        if time.perf_counter() > end:
            return False
    return True


def _settled(pulls: list[Pull]) -> bool:
    settled = [pull.settle() for pull in pulls]  # every one of them is asked
    return all(settled)
