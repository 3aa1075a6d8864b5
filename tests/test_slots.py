# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from dynamo_epd.errors import HandOffFailed, Overloaded, PayloadTooLarge
from dynamo_epd.transfer import slots as slots_module
from dynamo_epd.transfer.allocator import ALIGNMENT
from dynamo_epd.transfer.memory import Memory
from dynamo_epd.transfer.slots import Entry, Slots

BLOCK = ALIGNMENT


def on_slots(blocks: int, test: Callable[[Slots], Awaitable[None]], max_waiters: int = 8) -> None:
    """Run ``test`` on an arena of so many blocks."""

    async def run() -> None:
        memory = Memory(BLOCK * (blocks + 1))
        slots = Slots(memory, max_waiters=max_waiters)
        await test(slots)
        slots.close()
        memory.close()

    asyncio.run(run())


async def publish(slots: Slots, key: str | None, blocks: int = 1) -> Entry:
    with await slots.reserve([BLOCK * blocks], 0.05) as (slot,):
        slot.write(b"%d" % blocks * BLOCK)
        return slot.publish(key)


def test_the_least_recently_used_goes_first_and_the_leased_stay() -> None:
    async def test(slots: Slots) -> None:
        for key in "abcd":
            await publish(slots, key)
        leased = slots.lookup("b")
        assert leased is not None
        lease = slots.lease(leased, 60, ends_on_read=True)
        assert slots.lookup("a") is not None, "now c is the oldest"
        await publish(slots, "e")
        assert [key for key in "abcde" if slots.lookup(key)] == ["a", "b", "d", "e"]
        await publish(slots, "big", blocks=2)
        assert [key for key in "abde" if slots.lookup(key)] == ["b"], "a went in vain, b never"
        with pytest.raises(Overloaded):
            await slots.reserve([BLOCK * 4], 0.05)
        assert slots.lookup("big") is not None, "room that cannot be had costs no cache"
        slots.release(lease)
        (await slots.reserve([BLOCK * 4], 0.05)).free()

    on_slots(4, test)


def test_fragments_are_evicted_until_it_fits() -> None:
    async def test(slots: Slots) -> None:
        for key in "abcdef":
            await publish(slots, key)
        for key in "ace":  # make b, d, f the oldest
            slots.lookup(key)
        (await slots.reserve([BLOCK * 2], 0.05)).free()
        assert slots.lookup("f") is None
        assert slots.evictions == 4, "b, d, f leave three single gaps; a joins two"
        assert slots.lookup("c") is not None
        assert slots.lookup("e") is not None

    on_slots(6, test)


def test_a_waiter_is_served_when_a_lease_ends_and_in_order() -> None:
    async def test(slots: Slots) -> None:
        entry = await publish(slots, "a", blocks=2)
        lease = slots.lease(entry, 60, ends_on_read=True)
        order: list[str] = []

        async def wait(name: str, blocks: int) -> None:
            with await slots.reserve([BLOCK] * blocks, 5):
                order.append(name)
                await asyncio.sleep(0)

        waits = [asyncio.create_task(wait("large", 2))]
        await asyncio.sleep(0)
        waits.append(asyncio.create_task(wait("small", 1)))
        await asyncio.sleep(0)
        assert slots.waiters == 2
        assert not order
        slots.notice(lease)
        await asyncio.gather(*waits)
        assert order == ["large", "small"]
        assert slots.bytes_used == 0

    on_slots(2, test)


def test_waiting_is_bounded_in_time_and_number() -> None:
    async def test(slots: Slots) -> None:
        with pytest.raises(PayloadTooLarge):
            await slots.reserve([BLOCK, BLOCK], 5)
        held = await slots.reserve([BLOCK], 5)
        waits = [asyncio.create_task(slots.reserve([BLOCK], 0.05)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="already wait"):
            await slots.reserve([BLOCK], 5)
        assert [type(error) for error in await asyncio.gather(*waits, return_exceptions=True)] == [Overloaded] * 2
        assert slots.waiters == 0
        held.free()
        (await slots.reserve([BLOCK], 0.05)).free()

    on_slots(1, test, max_waiters=2)


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    async def test(slots: Slots) -> None:
        held = await slots.reserve([BLOCK] * 2, 5)
        first = asyncio.create_task(slots.reserve([BLOCK] * 2, 5))
        await asyncio.sleep(0)
        second = asyncio.create_task(slots.reserve([BLOCK], 5))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        third = asyncio.create_task(slots.reserve([BLOCK], 5))
        await asyncio.sleep(0)
        held.free()  # serves second and third at this moment
        third.cancel()  # which has its slot already, and does not know yet
        await asyncio.gather(third, return_exceptions=True)
        (await second).free()
        assert slots.bytes_used == 0
        assert slots.waiters == 0

    on_slots(2, test)


def test_all_at_once_never_deadlocks() -> None:
    async def test(slots: Slots) -> None:
        rng = random.Random(7)

        async def user() -> None:
            for _ in range(20):
                with await slots.reserve([BLOCK * rng.randint(1, 3) for _ in range(rng.randint(1, 3))], 30):
                    await asyncio.sleep(0)

        await asyncio.gather(*[user() for _ in range(16)])
        assert slots.bytes_used == 0

    on_slots(9, test, max_waiters=16)


def test_several_leases_hold_one_entry() -> None:
    async def test(slots: Slots) -> None:
        entry = await publish(slots, None)
        leases = [slots.lease(entry, 60, ends_on_read=ends) for ends in (True, True, False)]
        for lease in leases:
            slots.notice(lease)
        assert (slots.leases, slots.bytes_used) == (1, BLOCK), "a notice does not end the lease of a request"
        slots.release(leases[2])
        slots.release(leases[2])
        assert slots.bytes_used == 0, "an entry without key goes with its last lease"
        with pytest.raises(HandOffFailed):
            slots.lease(entry, 60, ends_on_read=True)

    on_slots(1, test)


def test_a_lease_ends_by_itself_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "GRACE_SECONDS", 0.2)

    async def test(slots: Slots) -> None:
        slots.lease(await publish(slots, None), 0.05, ends_on_read=True)
        with pytest.raises(Overloaded):
            await slots.reserve([BLOCK], 0.1)
        (await slots.reserve([BLOCK], 5)).free()
        assert slots.expired == 1
        assert slots.leases == 0

    on_slots(1, test)


def test_a_lease_that_is_renewed_ends_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "GRACE_SECONDS", 0.0)

    async def test(slots: Slots) -> None:
        kept = slots.lease(await publish(slots, None), 0.05, ends_on_read=False)
        other = slots.lease(await publish(slots, None), 0.05, ends_on_read=False)
        assert slots.renew(kept, 60)
        with pytest.raises(Overloaded):
            await slots.reserve([2 * BLOCK], 0.3)
        assert slots.leased(kept) is not None
        assert slots.leased(other) is None
        assert not slots.renew(other, 60), "what has ended stays so"

    on_slots(2, test)


def test_the_newer_entry_of_a_key_wins() -> None:
    async def test(slots: Slots) -> None:
        old = await publish(slots, "a")
        lease = slots.lease(old, 60, ends_on_read=True)
        new = await publish(slots, "a")
        assert slots.lookup("a") is new
        assert slots.bytes_used == 2 * BLOCK
        slots.release(lease)
        assert slots.lookup("a") is new
        assert slots.bytes_used == BLOCK
        assert (slots.hits, slots.misses) == (2, 0)

    on_slots(2, test)


def test_what_is_published_can_be_leased_although_others_wait() -> None:
    async def test(slots: Slots) -> None:
        with await slots.reserve([BLOCK], 5) as (slot,):
            waiter = asyncio.create_task(slots.reserve([BLOCK], 5))
            await asyncio.sleep(0)
            slot.write(b"x")
            lease = slots.lease(slot.publish("a"), 60, ends_on_read=True)
        await asyncio.sleep(0.01)
        assert not waiter.done()
        slots.release(lease)
        (await waiter).free()

        with await slots.reserve([BLOCK], 5) as (slot,):
            waiter = asyncio.create_task(slots.reserve([BLOCK], 5))
            await asyncio.sleep(0)
            slot.write(b"x")
            slot.publish("b")
        (await waiter).free()  # nobody leased it: evicted for the waiter
        assert slots.lookup("b") is None

    on_slots(1, test)


def test_a_slot_refuses_what_does_not_fit() -> None:
    async def test(slots: Slots) -> None:
        with await slots.reserve([8], 5) as (slot,):
            with pytest.raises(ValueError, match="nothing was written"):
                slot.publish()
            with pytest.raises(ValueError, match="do not fit"):
                slot.write(b"123456789")
            with pytest.raises(ValueError, match="cannot publish"):
                slot.publish(shape=(3,), dtype="float32")
            slot.write(b"12345678")
            assert slot.publish(shape=(2,), dtype="int32").length == 8
            with pytest.raises(ValueError, match="cannot publish"):
                slot.publish()

    on_slots(1, test)
