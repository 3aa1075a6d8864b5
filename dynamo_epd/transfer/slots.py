# SPDX-License-Identifier: Apache-2.0
"""Who has which bytes of an arena: slots, what is published in them, leases, the cache, and who waits for room.

Plain bookkeeping on one event loop, without NIXL. A block of bytes is in exactly one of these states:

    free → reserved (a `Slot`) → published (an `Entry`) → leased ⇄ idle → free

Idle entries are the cache: the least recently used go first when room is needed. Leased ones never go.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_epd.errors import HandOffFailed, Overloaded, PayloadTooLarge
from dynamo_epd.transfer.allocator import ALIGNMENT, Allocator, aligned
from dynamo_epd.transfer.handle import nbytes_of
from dynamo_epd.transfer.memory import Memory, digest_of

GRACE_SECONDS = 2.0
"""How long the owner keeps a slot after its lease is over: two hosts' clocks may differ by this much."""

MAX_LEASE_SECONDS = 3600.0


@dataclass(eq=False)
class Entry:
    """Published bytes. Lease it before the next ``await``: an entry without a lease may be evicted."""

    key: str | None
    offset: int
    room: int
    """Bytes taken from the arena: at least ``length``."""
    length: int
    shape: tuple[int, ...]
    dtype: str
    digest: str
    leases: set[str] = field(default_factory=set)
    gone: bool = False


@dataclass(eq=False)
class Lease:
    entry: Entry
    ends_on_read: bool
    timer: asyncio.TimerHandle


class Slot:
    """Reserved bytes: fill them by `write` or through `view`, then `publish`."""

    def __init__(self, slots: Slots, offset: int, nbytes: int):
        self._slots = slots
        self.offset = offset
        self.nbytes = nbytes
        self.published = False
        self._shape: tuple[int, ...] | None = None
        self._dtype = "bytes"

    def view(self, shape: tuple[int, ...] | None = None, dtype: str = "bytes") -> Any:
        """A writable torch tensor over the slot (memoryview for ``bytes``); its shape and dtype go to `publish`."""
        shape = (self.nbytes,) if shape is None else shape
        if nbytes_of(shape, dtype) > self.nbytes:
            raise ValueError(f"{shape} of {dtype} does not fit in a slot of {self.nbytes} bytes")
        self._shape, self._dtype = shape, dtype
        return self._slots.memory.view(self.offset, shape, dtype)

    def write(self, value: Any) -> None:
        """Copy in a torch tensor, from any device, or a buffer. Raises ValueError if it is larger than the slot."""
        if Memory.nbytes_of(value) > self.nbytes:
            raise ValueError(f"{Memory.nbytes_of(value)} bytes do not fit in a slot of {self.nbytes}")
        self._shape, self._dtype = self._slots.memory.write(self.offset, value)

    def publish(self, key: str | None = None, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> Entry:
        """Give the bytes a digest and make an entry of them, found again by ``key`` if there is one.

        Shape and dtype default to those of `write` or `view`. Takes 60 microseconds a MiB of the event loop.
        """
        if shape is None:
            shape = self._shape
        if shape is None:
            raise ValueError("nothing was written to this slot")
        return self._slots._publish(self, key, tuple(shape), self._dtype if dtype is None else dtype)


class Reservation:
    """Several slots, taken at once. A context manager; slots not published by its end are free again."""

    def __init__(self, slots: Slots, taken: list[Slot]):
        self._slots = slots
        self.slots = taken

    def __enter__(self) -> list[Slot]:
        return self.slots

    def __exit__(self, *error: object) -> None:
        self.free()

    def free(self) -> None:
        """Give back what was not published. Safe to call twice."""
        self._slots._free_unpublished(self.slots)
        self.slots = []


@dataclass(eq=False)
class Waiter:
    sizes: list[int]
    future: asyncio.Future[list[Slot]]


class Slots:
    """The books of one arena of ``memory``, whose first `ALIGNMENT` bytes are never given away."""

    def __init__(self, memory: Memory, *, max_waiters: int):
        self.memory = memory
        self._allocator = Allocator(ALIGNMENT, memory.nbytes)
        self._max_waiters = max_waiters
        self._waiting: deque[Waiter] = deque()
        self._by_key: dict[str, Entry] = {}
        self._idle: OrderedDict[Entry, None] = OrderedDict()  # least recently used first
        self._leases: dict[str, Lease] = {}
        self._lease_ids = (f"{secrets.token_hex(8)}-{number:x}" for number in itertools.count())
        self.leases_that_notice = 0
        """Leases outstanding that end with a reader's notice."""
        self.entries = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.expired = 0

    # Room

    async def reserve(self, sizes: Sequence[int], timeout: float) -> Reservation:
        """A slot for each of ``sizes`` (bytes), all at once, first come first served.

        Raises `PayloadTooLarge` if they can never fit, `Overloaded` after ``timeout`` seconds or if too many wait.
        """
        wanted = list(sizes)
        if any(size < 0 for size in wanted):
            raise ValueError("a slot has no negative size")
        if sum(map(aligned, wanted)) > self._allocator.capacity:
            raise PayloadTooLarge(f"{sum(wanted)} bytes do not fit in an arena of {self._allocator.capacity}")
        if not self._waiting:
            taken = self._take(wanted)
            if taken is not None:
                return Reservation(self, taken)
        if len(self._waiting) >= self._max_waiters:
            raise Overloaded(f"{len(self._waiting)} already wait for room in the arena")
        waiter = Waiter(wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            await asyncio.wait([waiter.future], timeout=timeout)
        except asyncio.CancelledError:
            if waiter.future.done() and waiter.future.exception() is None:
                self._free_unpublished(waiter.future.result())
            raise
        finally:
            if not waiter.future.done():
                self._waiting.remove(waiter)
                self._serve()  # the head may have gone, and the next want less
        if not waiter.future.done():
            raise Overloaded(f"no room for {sum(wanted)} bytes in the arena within {timeout:g} s")
        return Reservation(self, waiter.future.result())

    def _serve(self) -> None:
        """Give room to those who wait, in their order. Called whenever bytes may have become free."""
        while self._waiting:
            taken = self._take(self._waiting[0].sizes)
            if taken is None:
                return
            self._waiting.popleft().future.set_result(taken)

    def _take(self, sizes: list[int]) -> list[Slot] | None:
        offsets = self._allocator.allocate_all(sizes)
        if offsets is None:
            trial = self._allocator.copy()
            for entry in self._idle:
                trial.free(entry.offset, entry.room)
            if trial.allocate_all(sizes) is None:
                return None  # not even with an empty cache: keep the cache
            while offsets is None:
                self.evictions += 1
                self._drop(next(iter(self._idle)))
                offsets = self._allocator.allocate_all(sizes)
        return [Slot(self, offset, size) for offset, size in zip(offsets, sizes, strict=True)]

    def _free_unpublished(self, slots: list[Slot]) -> None:
        for slot in slots:
            if not slot.published:
                slot.published = True
                self._allocator.free(slot.offset, slot.nbytes)
        self._serve()

    # The cache

    def _publish(self, slot: Slot, key: str | None, shape: tuple[int, ...], dtype: str) -> Entry:
        length = nbytes_of(shape, dtype)
        if slot.published or length > slot.nbytes:
            raise ValueError(f"cannot publish {length} bytes from this slot of {slot.nbytes}")
        digest = digest_of(self.memory.bytes_at(slot.offset, length))
        entry = Entry(key, slot.offset, slot.nbytes, length, shape, dtype, digest)
        slot.published = True
        self.entries += 1
        if key is not None:
            older = self._by_key.get(key)
            self._by_key[key] = entry
            if older is not None:
                older.key = None
                if not older.leases:
                    self._drop(older)
        self._idle[entry] = None
        if self._waiting:  # they may have it evicted, but only after the caller had its chance to lease it
            asyncio.get_running_loop().call_soon(self._serve)
        return entry

    def lookup(self, key: str, *, again: bool = False) -> Entry | None:
        """The entry published under ``key``, now the most recently used, or None. Neither counts where it is looked up
        ``again``."""
        entry = self._by_key.get(key)
        if entry is None:
            self.misses += not again
            return None
        self.hits += not again
        if entry in self._idle:
            self._idle.move_to_end(entry)
        return entry

    def _drop(self, entry: Entry) -> None:
        assert not entry.leases, "a leased entry stays"
        self._idle.pop(entry, None)
        if entry.key is not None:
            del self._by_key[entry.key]
        entry.gone = True
        self.entries -= 1
        self._allocator.free(entry.offset, entry.room)

    # Leases

    def lease(self, entry: Entry, seconds: float, *, ends_on_read: bool) -> str:
        """Keep ``entry`` in place for ``seconds`` and a grace; returns the lease's id."""
        if not 0 < seconds <= MAX_LEASE_SECONDS:
            raise ValueError(f"a lease lasts up to {MAX_LEASE_SECONDS:g} s, not {seconds}")
        if entry.gone:
            raise HandOffFailed("the entry was evicted before it was leased")
        lease = next(self._lease_ids)
        timer = asyncio.get_running_loop().call_later(seconds + GRACE_SECONDS, self._expire, lease)
        self._leases[lease] = Lease(entry, ends_on_read, timer)
        self.leases_that_notice += ends_on_read
        entry.leases.add(lease)
        self._idle.pop(entry, None)
        return lease

    def renew(self, lease: str, seconds: float) -> bool:
        """Lets a lease end ``seconds`` and a grace from now. False where it has ended already."""
        found = self._leases.get(lease)
        if found is None:
            return False
        found.timer.cancel()
        found.timer = asyncio.get_running_loop().call_later(seconds + GRACE_SECONDS, self._expire, lease)
        return True

    def leased(self, lease: str) -> Entry | None:
        found = self._leases.get(lease)
        return None if found is None else found.entry

    def release(self, lease: str) -> None:
        """End a lease; unknown ones have ended already. An entry without key goes with its last lease."""
        found = self._leases.pop(lease, None)
        if found is None:
            return
        found.timer.cancel()
        self.leases_that_notice -= found.ends_on_read
        found.entry.leases.discard(lease)
        if not found.entry.leases:
            if found.entry.key is None:
                self._drop(found.entry)
            else:
                self._idle[found.entry] = None
            self._serve()

    def notice(self, lease: str) -> None:
        """A reader has taken the bytes."""
        found = self._leases.get(lease)
        if found is not None and found.ends_on_read:
            self.release(lease)

    def _expire(self, lease: str) -> None:
        self.expired += 1
        self.release(lease)

    @property
    def leases(self) -> int:
        return len(self._leases)

    @property
    def bytes_used(self) -> int:
        return self._allocator.used

    @property
    def capacity(self) -> int:
        return self._allocator.capacity

    @property
    def waiters(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """End every lease's timer and refuse whoever waits."""
        for lease in self._leases.values():
            lease.timer.cancel()
        self._leases.clear()
        self.leases_that_notice = 0
        for waiter in self._waiting:
            waiter.future.set_exception(Overloaded("the arena is closing"))
        self._waiting.clear()
