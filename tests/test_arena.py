# SPDX-License-Identifier: Apache-2.0
"""One arena in one process. What happens between processes is in test_transfer.py."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import torch

from dynamo_epd.errors import DigestMismatch, HandOffFailed, LeaseExpired, Overloaded
from dynamo_epd.transfer import Arena

MIB = 1 << 20


BYTES_ONLY = """
import asyncio, sys
from dynamo_epd.transfer import Arena

async def run():
    arena = await Arena.open(4096, owner="me", resolve=None)
    with await arena.reserve([5], 1) as (slot,):
        slot.write(b"hello")
        handle = arena.lease(slot.publish(), 60)
    async with arena.read([handle], timeout=5) as (value,):
        print(bytes(value), "torch" in sys.modules)
    await arena.close()

asyncio.run(run())
"""


def test_who_hands_on_only_bytes_never_loads_torch() -> None:
    done = subprocess.run([sys.executable, "-c", BYTES_ONLY], capture_output=True, text=True, check=True)
    assert done.stdout == "b'hello' False\n"


async def nobody(owner: str) -> bytes:
    raise LookupError(owner)


def on_arena(test: Callable[[Arena], Awaitable[None]], nbytes: int = MIB) -> None:
    async def run() -> None:
        arena = await Arena.open(nbytes, owner="me", resolve=nobody)
        try:
            await test(arena)
        finally:
            await arena.close()

    asyncio.run(run())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "int32", "uint8"])
def test_a_tensor_is_written_published_and_read_back(dtype: str) -> None:
    async def test(arena: Arena) -> None:
        tensor = (torch.randn(3, 5, 7) * 100).abs().to(getattr(torch, dtype)).transpose(0, 1)
        with await arena.reserve([tensor.numel() * tensor.element_size()], 1) as (slot,):
            slot.write(tensor)
            handle = arena.lease(slot.publish("key"), 60)
        assert handle.shape == (5, 3, 7)
        assert handle.dtype == dtype
        async with arena.read([handle], timeout=5) as (copy,):
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor)
        assert arena.stats().leases == 0, "the read has ended the lease"
        with pytest.raises(LeaseExpired):
            async with arena.read([handle], timeout=5):
                raise AssertionError("yielded after the lease")
        assert arena.lookup("key") is not None

    on_arena(test)


def test_a_slot_is_filled_through_its_view() -> None:
    async def test(arena: Arena) -> None:
        with await arena.reserve([4 * 6, 5, 0], 1) as (tensor_slot, bytes_slot, empty_slot):
            torch.arange(6, dtype=torch.float32, out=tensor_slot.view((6,), "float32"))
            bytes_slot.view()[:] = b"hello"
            empty_slot.write(b"")
            entries = [tensor_slot.publish(), bytes_slot.publish(), empty_slot.publish(shape=(0, 4), dtype="float32")]
        handles = [arena.lease(entry, 60) for entry in entries]
        async with arena.read(handles, timeout=5) as (numbers, text, empty):
            assert numbers.tolist() == [0, 1, 2, 3, 4, 5]
            assert bytes(text) == b"hello"
            assert tuple(empty.shape) == (0, 4)
            assert empty.dtype == torch.float32
        assert arena.stats().bytes_used == 0

    on_arena(test)


def test_a_view_made_into_a_tensor_of_another_size_is_refused() -> None:
    async def test(arena: Arena) -> None:
        with await arena.reserve([8], 1) as (slot,):
            with pytest.raises(ValueError, match="does not fit"):
                slot.view((3,), "float32")
            with pytest.raises(HandOffFailed):
                slot.view((2,), "complex64")
            with pytest.raises(TypeError):
                slot.write(torch.zeros(1, dtype=torch.complex64))
        assert arena.stats().bytes_used == 0

    on_arena(test)


def test_a_full_arena_serves_the_waiter_when_a_lease_ends_else_says_overloaded() -> None:
    async def test(arena: Arena) -> None:
        with await arena.reserve([MIB], 1) as (slot,):
            slot.write(b"x")
            handle = arena.lease(slot.publish("x"), 60, ends_on_read=False)
        with pytest.raises(Overloaded):
            await arena.reserve([1], 0.05)
        with pytest.raises(Overloaded):
            async with arena.read([handle], timeout=0.05):
                raise AssertionError("read into no room")
        waiting = asyncio.create_task(arena.reserve([1], 10))
        await asyncio.sleep(0)
        arena.release(handle.lease)
        (await waiting).free()

    on_arena(test)


def test_a_byte_flipped_in_place_is_noticed() -> None:
    async def test(arena: Arena) -> None:
        with await arena.reserve([100], 1) as (slot,):
            view = slot.view()
            view[:] = bytes(100)
            handle = arena.lease(slot.publish(), 60)
        view[99] = 1
        with pytest.raises(DigestMismatch):
            async with arena.read([handle], timeout=5):
                raise AssertionError("wrong bytes were handed on")
        assert arena.stats().digest_failures == 1

    on_arena(test)


def test_stats_are_plain_numbers() -> None:
    async def test(arena: Arena) -> None:
        stats = msgspec.to_builtins(arena.stats())
        assert stats["bytes_capacity"] == MIB
        assert all(type(value) in (int, float) for value in stats.values())

    on_arena(test)


def test_close_refuses_what_waits_and_what_comes() -> None:
    async def run() -> None:
        async def never(owner: str) -> bytes:
            await asyncio.Event().wait()
            return b""

        arena = await Arena.open(MIB, owner="me", resolve=never)
        held = await arena.reserve([MIB], 1)
        waits = [asyncio.create_task(arena.reserve([1], 30)), asyncio.create_task(arena.connect("other"))]
        await asyncio.sleep(0.01)
        await arena.close()
        await arena.close()
        errors = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(error) for error in errors] == [Overloaded, HandOffFailed]
        held.free()
        with pytest.raises(HandOffFailed):
            await arena.reserve([1], 1)

    asyncio.run(run())


def test_open_and_close_leave_no_descriptor_no_shared_memory_and_no_mapping() -> None:
    def left() -> tuple[int, int, list[str]]:
        mapped = Path("/proc/self/maps").read_text().count("/dev/shm")
        return len(os.listdir("/proc/self/fd")), mapped, sorted(os.listdir("/dev/shm"))

    async def test(arena: Arena) -> None:
        with await arena.reserve([100], 1) as (slot,):
            slot.write(b"x" * 100)
            handle = arena.lease(slot.publish(), 60)
        async with arena.read([handle], timeout=5):
            pass

    on_arena(test)  # NIXL's own first-time files are not ours
    before = left()
    for _ in range(3):
        on_arena(test)
    assert left() == before


def test_a_tensor_that_outlives_the_arena_stays_readable() -> None:
    kept: list[torch.Tensor] = []

    async def test(arena: Arena) -> None:
        with await arena.reserve([8], 1) as (slot,):
            kept.append(slot.view((2,), "float32").fill_(3))

    on_arena(test)
    assert kept[0].tolist() == [3, 3]


def test_an_idle_arena_takes_no_processor_time() -> None:
    async def test(arena: Arena) -> None:
        with await arena.reserve([8], 1) as (slot,):
            slot.write(b"x" * 8)
            arena.lease(slot.publish(), 60, ends_on_read=False)
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(1)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used < 0.1, "NIXL's progress thread spins unless told not to"

    on_arena(test)


def test_who_finds_no_room_or_leaves_is_no_failed_transfer() -> None:
    async def run() -> None:
        arena = await Arena.open(4096, owner="me", resolve=nobody)
        with await arena.reserve([4096], 1) as (slot,):
            slot.write(b"x" * 4096)
            handle = arena.lease(slot.publish(), 60)

        async def read() -> None:
            async with arena.read([handle], timeout=30):
                """Never: nothing is free."""

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        with pytest.raises(Overloaded):
            async with arena.read([handle], timeout=0.05):
                """Nor now."""
        assert arena.stats().transfer_failures == 0
        await arena.close()

    asyncio.run(run())
