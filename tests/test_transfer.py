# SPDX-License-Identifier: Apache-2.0
"""Hand-offs between real processes over real NIXL."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch
from arena_owner import ArenaOwner, content

from dynamo_epd.errors import (
    DigestMismatch,
    HandOffFailed,
    LeaseExpired,
    Overloaded,
    StaleHandle,
    TransferTimeout,
)
from dynamo_epd.transfer import Arena, Handle
from dynamo_epd.transfer import arena as arena_module
from dynamo_epd.transfer.arena import READS_A_TURN
from dynamo_epd.transfer.peers import Card, Resolve

MIB = 1 << 20


@pytest.fixture(scope="module")
def owner() -> Iterator[ArenaOwner]:
    """For the tests that do it no harm."""
    owner = ArenaOwner("encode/1", 96 * MIB)
    yield owner
    owner.kill()


def reading(resolve: Resolve, test: Callable[[Arena], Awaitable[None]], nbytes: int = 96 * MIB) -> None:
    async def run() -> None:
        arena = await Arena.open(nbytes, owner="prefill/1", resolve=resolve)
        try:
            await test(arena)
            stats = arena.stats()
            assert (stats.bytes_used, stats.bytes_quarantined, stats.reads_in_flight) == (0, 0, 0), "the reader leaks"
        finally:
            await arena.close()

    asyncio.run(run())


async def read_bytes(arena: Arena, handle: Handle, timeout: float = 10.0) -> bytes:
    async with arena.read([handle], timeout=timeout) as (value,):
        return bytes(value)


async def refused(arena: Arena, handle: Handle, error: type[Exception], timeout: float = 10.0) -> None:
    """The read of ``handle`` raises exactly ``error``, and yields nothing."""
    with pytest.raises(error) as raised:
        async with arena.read([handle], timeout=timeout):
            raise AssertionError("bytes were handed on")
    assert raised.type is error


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32", "uint8"])
def test_every_dtype_arrives(owner: ArenaOwner, dtype: str) -> None:
    async def test(arena: Arena) -> None:
        kind = getattr(torch, dtype)
        nbytes = 6 * 35 * kind.itemsize
        handle = owner.publish(1, nbytes, shape=[6, 5, 7], dtype=dtype)
        async with arena.read([handle], timeout=10) as (tensor,):
            assert tensor.dtype == kind
            assert tuple(tensor.shape) == (6, 5, 7)
            assert bytes(tensor.view(torch.uint8).numpy().tobytes()) == content(1, nbytes)

    reading(owner.resolve, test)


def test_pieces_of_every_size_arrive_together_and_in_order(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        sizes = [0, 1, 65536, 0, 5 * MIB + 3, 2 * MIB, 2 * MIB + 1, 24 * MIB]
        handles = [owner.publish(seed, size) for seed, size in enumerate(sizes)]
        async with arena.read(handles, timeout=20) as values:
            for seed, (size, value) in enumerate(zip(sizes, values, strict=True)):
                assert bytes(value) == content(seed, size)
        stats = arena.stats()
        assert (stats.transfers, stats.transfer_bytes) == (8, sum(sizes))
        assert stats.transfer_seconds > 0
        await until(lambda: owner.stats()["leases"] == 0)
        assert owner.stats()["bytes_used"] == 0

    reading(owner.resolve, test)


def test_who_reads_one_after_the_other_leaves_others_their_turns(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        handle, turns = owner.publish(1, 1000, ends_on_read=False), 0

        async def read(count: int) -> None:
            for _ in range(count):
                await read_bytes(arena, handle)

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        await read(1)
        other = asyncio.create_task(take_turns())
        await read(20 * READS_A_TURN)
        other.cancel()
        owner.ask("release", lease=handle.lease)
        assert turns >= 20

    reading(owner.resolve, test)


def test_a_completion_notice_ends_a_lease_only_if_it_may(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        once = owner.publish(1, 1000)
        often = owner.publish(2, 1000, ends_on_read=False)
        for _ in range(3):
            assert await read_bytes(arena, often) == content(2, 1000)
        assert owner.stats()["leases"] == 2
        assert await read_bytes(arena, once) == content(1, 1000)
        await until(lambda: owner.stats()["leases"] == 1)
        owner.ask("release", lease=often.lease)
        assert (owner.stats()["leases"], owner.stats()["bytes_used"]) == (0, 0)

    reading(owner.resolve, test)


def test_sixteen_readers_and_many_in_flight_each_get_their_own_bytes(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        shared = owner.publish(99, 300_000, ends_on_read=False)

        async def reader(number: int) -> None:
            for turn in range(6):
                seed = number * 100 + turn
                size = 1 + (seed * 7919) % 400_000
                async with arena.read([owner.publish(seed, size), shared], timeout=30) as (own, common):
                    await asyncio.sleep(0)  # others write to this arena now
                    assert bytes(own) == content(seed, size)
                    assert bytes(common) == content(99, 300_000)

        others = [await Arena.open(4 * MIB, owner=f"prefill/{n}", resolve=owner.resolve) for n in range(2, 5)]
        await asyncio.gather(*[reader(number) for number in range(16)])
        for other in others:
            assert await read_bytes(other, shared) == content(99, 300_000)
            await other.close()
        owner.ask("release", lease=shared.lease)
        assert arena.stats().transfers == 16 * 6 * 2
        assert arena.stats().peers == 1

    reading(owner.resolve, test, nbytes=8 * MIB)  # room for ten of the sixteen: the others wait


def test_metadata_is_asked_for_once(owner: ArenaOwner) -> None:
    asked = 0

    async def resolve(name: str) -> bytes:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return await owner.resolve(name)

    async def test(arena: Arena) -> None:
        first = asyncio.create_task(arena.connect(owner.name))
        await asyncio.sleep(0)
        handles = [owner.publish(seed, 100) for seed in range(8)]
        reads = [asyncio.create_task(read_bytes(arena, handle)) for handle in handles]
        await asyncio.sleep(0)
        first.cancel()  # whoever asked may go: the others still get the answer
        assert await asyncio.gather(*reads) == [content(seed, 100) for seed in range(8)]
        await arena.connect(owner.name)
        assert asked == 1

    reading(resolve, test)


def test_a_flipped_byte_is_never_handed_on(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        good, bad = owner.publish(1, 5 * MIB), owner.publish(2, 5 * MIB, ends_on_read=False)
        owner.ask("flip", offset=bad.offset + 3 * MIB)
        with pytest.raises(DigestMismatch):
            async with arena.read([good, bad], timeout=10):
                raise AssertionError("wrong bytes were handed on")
        assert arena.stats().digest_failures == 1
        owner.ask("flip", offset=bad.offset + 3 * MIB)
        assert await read_bytes(arena, bad) == content(2, 5 * MIB), "the peer is still trusted with other reads"
        owner.ask("release", lease=bad.lease)

    reading(owner.resolve, test)


def test_a_slot_that_was_reused_gives_an_error_and_not_its_new_bytes(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        stale = owner.publish(1, 4096)
        owner.ask("release", lease=stale.lease)
        fresh = owner.publish(2, 4096)
        assert fresh.offset == stale.offset
        await refused(arena, stale, DigestMismatch)
        assert await read_bytes(arena, fresh) == content(2, 4096)

    reading(owner.resolve, test)


def test_a_lease_that_is_over_is_not_read(owner: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        handle = owner.publish(1, 100, seconds=0.05)
        await refused(arena, handle, LeaseExpired)
        assert arena.stats().peers == 0, "nobody was asked"
        assert arena.stats().transfer_failures == 1
        await until(lambda: owner.stats()["leases"] == 0)  # its reader never came: it ends by itself
        assert owner.stats()["leases_expired"] >= 1
        assert owner.stats()["bytes_used"] == 0

    reading(owner.resolve, test)


@pytest.mark.parametrize(
    ("forged", "error"),
    [
        ({"length": 99}, HandOffFailed),
        ({"shape": (2**40,), "length": 2**40}, HandOffFailed),
        ({"offset": 2**62}, HandOffFailed),
        ({"offset": 97 * MIB}, HandOffFailed),
        ({"digest": "0" * 32}, DigestMismatch),
        ({"offset": 0}, DigestMismatch),
        ({"incarnation": "arena-0"}, StaleHandle),
        ({"lease": "nobody's"}, None),
    ],
)
def test_a_forged_handle_harms_nobody(owner: ArenaOwner, forged: dict[str, Any], error: type[Exception] | None) -> None:
    async def test(arena: Arena) -> None:
        handle = owner.publish(1, 100)
        wrong = msgspec.structs.replace(handle, **forged)
        if error is None:
            await read_bytes(arena, wrong)
            assert owner.stats()["leases"] == 1, "an unknown lease ends no other"
        else:
            await refused(arena, wrong, error)
        assert arena.stats().transfer_failures == (0 if error is None else 1)
        assert await read_bytes(arena, handle) == content(1, 100)
        await until(lambda: owner.stats()["leases"] == 0)

    reading(owner.resolve, test)


def test_metadata_that_is_none_is_refused(owner: ArenaOwner) -> None:
    good = Card.decode(owner.card)
    bad = [
        b"",
        b"\x80\x04cposix\nsystem\n",
        os.urandom(1000),
        b"\0" * (2 * MIB),
        msgspec.msgpack.encode({"incarnation": "x"}),
        msgspec.structs.replace(good, nixl=b"garbage").encode(),
        msgspec.structs.replace(good, nixl=good.nixl[:100]).encode(),
        msgspec.structs.replace(good, address=-1).encode(),
        msgspec.structs.replace(good, nbytes=1 << 60).encode(),
    ]

    async def resolve(name: str) -> bytes:
        return bad.pop() if bad else owner.card

    async def test(arena: Arena) -> None:
        handle = owner.publish(1, 100)
        while bad:
            await refused(arena, handle, HandOffFailed)
        assert await read_bytes(arena, handle) == content(1, 100)

    reading(resolve, test)


def test_an_owner_that_cannot_be_found_costs_no_more_than_the_timeout(owner: ArenaOwner) -> None:
    async def resolve(name: str) -> bytes:
        if name == "silent":
            await asyncio.Event().wait()
        raise ConnectionError("no such instance")

    async def test(arena: Arena) -> None:
        handle = owner.publish(1, 100)
        await refused(arena, handle, HandOffFailed)
        silent = msgspec.structs.replace(handle, owner="silent")
        await refused(arena, silent, TransferTimeout, timeout=0.1)
        await refused(arena, msgspec.structs.replace(silent, lease_end=time.time() + 0.3), LeaseExpired)
        owner.ask("release", lease=handle.lease)

    reading(resolve, test)


def test_an_owner_that_is_killed_and_comes_back() -> None:
    alive = ArenaOwner("encode/1", 8 * MIB)

    async def resolve(name: str) -> bytes:
        return alive.card

    async def test(arena: Arena) -> None:
        nonlocal alive
        old = [alive.publish(seed, 100_000) for seed in range(3)]
        assert await read_bytes(arena, old[0]) == content(0, 100_000)
        alive.kill()
        await refused(arena, old[1], HandOffFailed)
        await refused(arena, old[1], HandOffFailed)  # its metadata is still announced: connecting fails
        with pytest.raises(HandOffFailed):
            await arena.connect("encode/1")
        alive = ArenaOwner("encode/1", 8 * MIB)
        new = alive.publish(7, 100_000)
        await refused(arena, old[2], StaleHandle)
        assert await read_bytes(arena, new) == content(7, 100_000)
        await refused(arena, old[2], StaleHandle)
        assert arena.stats().peers == 1

    try:
        reading(resolve, test)
    finally:
        alive.kill()


def test_an_owner_that_comes_back_unnoticed() -> None:
    """The reader still holds the dead one's metadata when the new one's first handle comes."""
    alive = ArenaOwner("encode/1", MIB)

    async def resolve(name: str) -> bytes:
        return alive.card

    async def test(arena: Arena) -> None:
        nonlocal alive
        old = alive.publish(1, 1000, ends_on_read=False)
        assert await read_bytes(arena, old) == content(1, 1000)
        alive.kill()
        alive = ArenaOwner("encode/1", MIB)
        assert await read_bytes(arena, alive.publish(2, 1000)) == content(2, 1000)
        await refused(arena, old, StaleHandle)

    try:
        reading(resolve, test)
    finally:
        alive.kill()


def test_owners_killed_while_sixteen_readers_read() -> None:
    alive = ArenaOwner("encode/1", 64 * MIB)

    async def resolve(name: str) -> bytes:
        return alive.card

    async def test(arena: Arena) -> None:
        handles = [alive.publish(seed, 3 * MIB, ends_on_read=False) for seed in range(16)]
        right, failed = 0, 0

        async def reader(seed: int) -> None:
            nonlocal right, failed
            while True:
                try:
                    async with arena.read([handles[seed]], timeout=10) as (value,):
                        assert value[:64] == content(seed, 64)
                        assert value.nbytes == 3 * MIB
                        right += 1
                except HandOffFailed:
                    failed += 1
                    return

        readers = [asyncio.create_task(reader(seed)) for seed in range(16)]
        await until(lambda: right > 32)
        alive.kill()
        await asyncio.wait_for(asyncio.gather(*readers), 20)
        assert failed == 16
        await until(lambda: arena.stats().bytes_quarantined == 0)

    try:
        reading(resolve, test)
    finally:
        alive.kill()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> Iterator[ArenaOwner]:
    """Over TCP a READ needs its owner's help, so a stopped owner holds it in flight; over shared memory it does not."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    owner = ArenaOwner("encode/1", 16 * MIB)
    yield owner
    owner.kill()


def test_slots_of_a_read_that_was_given_up_wait_until_nothing_can_write_to_them(over_tcp: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        await arena.connect(over_tcp.name)
        handles = [over_tcp.publish(seed, 6 * MIB, ends_on_read=False) for seed in range(2)]
        over_tcp.stop()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await refused(arena, handles[0], TransferTimeout, timeout=0.5)
        assert ticks > 10, "the event loop has lived on"
        cancelled = asyncio.create_task(read_bytes(arena, handles[1]))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled
        ticking.cancel()
        stats = arena.stats()
        assert stats.bytes_quarantined == stats.bytes_used == 12 * MIB
        assert stats.reads_in_flight == 0
        with pytest.raises(Overloaded):
            await arena.reserve([6 * MIB], 0.1)
        over_tcp.go_on()
        (await arena.reserve([6 * MIB], 10)).free()
        await until(lambda: arena.stats().bytes_quarantined == 0)
        assert await read_bytes(arena, handles[1]) == content(1, 6 * MIB)

    reading(over_tcp.resolve, test, nbytes=16 * MIB)


def test_a_peer_that_holds_slots_for_too_long_is_cut_off(over_tcp: ArenaOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "FENCE_SECONDS", 0.3)

    async def test(arena: Arena) -> None:
        await arena.connect(over_tcp.name)
        handle = over_tcp.publish(1, 6 * MIB, ends_on_read=False)
        over_tcp.stop()
        await refused(arena, handle, TransferTimeout, timeout=0.2)
        assert arena.stats().bytes_quarantined == 6 * MIB
        await until(lambda: arena.stats().bytes_quarantined == 0)
        over_tcp.go_on()
        assert await read_bytes(arena, handle) == content(1, 6 * MIB), "and it may come back"

    reading(over_tcp.resolve, test, nbytes=16 * MIB)


def test_a_handshake_that_hangs_is_tried_again(over_tcp: ArenaOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CONNECT_SECONDS", 1.0)

    async def test(arena: Arena) -> None:
        over_tcp.stop()
        connecting = asyncio.create_task(arena.connect(over_tcp.name))
        await asyncio.sleep(1.2)
        over_tcp.go_on()
        await connecting
        over_tcp.stop()
        with pytest.raises(TransferTimeout):
            await arena.connect(over_tcp.name)
        over_tcp.go_on()
        await until(lambda: arena.stats().bytes_quarantined == 0)

    reading(over_tcp.resolve, test, nbytes=16 * MIB)


def test_an_owner_killed_with_reads_in_flight(over_tcp: ArenaOwner) -> None:
    async def test(arena: Arena) -> None:
        await arena.connect(over_tcp.name)
        handles = [over_tcp.publish(seed, 3 * MIB) for seed in range(4)]
        over_tcp.stop()
        reads = [asyncio.create_task(read_bytes(arena, handle)) for handle in handles]
        await asyncio.sleep(0.2)
        assert not any(read.done() for read in reads)
        over_tcp.kill()
        errors = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 10)
        assert all(isinstance(error, HandOffFailed) for error in errors)
        await until(lambda: arena.stats().bytes_quarantined == 0)

    reading(over_tcp.resolve, test, nbytes=16 * MIB)


def test_a_close_with_reads_in_flight(over_tcp: ArenaOwner) -> None:
    async def run() -> None:
        arena = await Arena.open(16 * MIB, owner="prefill/1", resolve=over_tcp.resolve)
        await arena.connect(over_tcp.name)
        handle = over_tcp.publish(1, 6 * MIB)
        over_tcp.stop()
        read = asyncio.create_task(read_bytes(arena, handle))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(arena.close(), 10)
        assert isinstance((await asyncio.gather(read, return_exceptions=True))[0], HandOffFailed)

    asyncio.run(run())


def serving(test: Callable[[Arena, dict[str, str]], Awaitable[None]]) -> None:
    """Run ``test`` with an arena that other processes read from, and its card for `Commands.read`."""

    async def nobody(owner: str) -> bytes:
        raise LookupError(owner)

    async def run() -> None:
        arena = await Arena.open(32 * MIB, owner="encode/9", resolve=nobody)
        try:
            await test(arena, {"card": base64.b64encode(arena.metadata()).decode()})
        finally:
            await arena.close()

    asyncio.run(run())


async def publish(arena: Arena, data: bytes, seconds: float) -> Handle:
    with await arena.reserve([len(data)], 5) as (slot,):
        slot.write(data)
        return arena.lease(slot.publish(), seconds)


def test_reader_processes_read_at_once_and_their_notices_end_the_leases() -> None:
    async def test(arena: Arena, card: dict[str, str]) -> None:
        data = [content(seed, 5 * MIB) for seed in range(3)]
        for reader, mine in zip(readers, data, strict=True):
            reader.begin("read", handle=msgspec.to_builtins(await publish(arena, mine, 60)), **card)
        answers = [await asyncio.to_thread(reader.answer) for reader in readers]
        assert [answer.get("sha256") for answer in answers] == [hashlib.sha256(mine).hexdigest() for mine in data]
        await until(lambda: arena.stats().leases == 0)
        assert arena.stats().bytes_used == 0

    with ThreadPoolExecutor() as pool:
        readers = list(pool.map(lambda number: ArenaOwner(f"prefill/{number}", 8 * MIB), range(3)))
    try:
        serving(test)
    finally:
        for reader in readers:
            reader.kill()


def test_a_reader_that_never_comes_holds_the_slot_only_as_long_as_its_lease(owner: ArenaOwner) -> None:
    handle = owner.publish(1, 100, seconds=0.2)
    assert owner.stats()["leases"] == 1
    assert math.isfinite(handle.lease_end)

    async def test(arena: Arena) -> None:
        await until(lambda: owner.stats()["leases"] == 0)

    reading(owner.resolve, test)
    assert owner.stats()["bytes_used"] == 0
