# SPDX-License-Identifier: Apache-2.0
"""An arena's owner beside its requests; between processes see test_transfer.py and the graphs."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from dynamo_epd import exchange
from dynamo_epd.errors import WorkerLost
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.transfer import Arena
from tests.test_arena import nobody


def test_an_owner_that_leaves_waits_for_what_it_laid_out() -> None:
    """Until it is given back here; until it is fetched, or its lease is over, elsewhere."""

    async def run() -> None:
        owner = ArenaOwner()
        owner.arena = await Arena.open(8192, owner="me", resolve=nobody)
        await owner.fetched()
        handles = [await owner.offer(bytes([number]) * 100, 60) for number in range(2)]
        leaving = asyncio.create_task(owner.fetched())
        for handle in handles:
            await asyncio.sleep(0.2)
            assert not leaving.done()
            owner.end_leases([handle.lease], [])
        await leaving
        await owner.close_arena()

    asyncio.run(run())


class ClientDouble:
    """Of a service with these instances."""

    def __init__(self, *instances: int):
        self.there = list(instances)

    def instances(self) -> list[int]:
        return self.there


def test_owners_are_met_as_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody READs from them; one that cannot be met is tried again, and keeps nobody else, and neither does
    one that does not answer, or a defect."""
    monkeypatch.setattr(exchange, "MEET_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "MEET_AGAIN_SECONDS", 0.1)
    client = ClientDouble(1)
    monkeypatch.setattr(exchange, "_clients", {"ns/EncodeWorker": client})

    async def run() -> None:
        arenas = {
            f"ns/EncodeWorker/{instance}": await Arena.open(8192, owner="", resolve=nobody) for instance in (1, 3)
        }
        asked: Counter[str] = Counter()

        async def resolve(name: str) -> bytes:
            asked[name] += 1
            if name == "ns/EncodeWorker/0":
                await asyncio.sleep(3600)
            if name == "ns/EncodeWorker/2":
                raise WorkerLost("it is gone")
            if name == "ns/EncodeWorker/4":
                raise ZeroDivisionError("a defect")
            return arenas[name].metadata()

        reader = ArenaOwner()
        reader.arena = await Arena.open(8192, owner="reader", resolve=resolve)
        reader._meeting = asyncio.create_task(reader._meet_owners())

        async def peers(count: int) -> None:
            async with asyncio.timeout(20):
                while reader.arena.stats().peers < count:
                    await asyncio.sleep(0.01)

        await peers(1)
        client.there = [0, 1, 2, 4]
        async with asyncio.timeout(20):
            while min(asked[f"ns/EncodeWorker/{instance}"] for instance in (2, 4)) < 2:
                await asyncio.sleep(0.01)
        client.there.append(3)
        await peers(2)
        assert asked["ns/EncodeWorker/0"] == 1, "its first try still waits"
        assert asked["ns/EncodeWorker/1"] == asked["ns/EncodeWorker/3"] == 1
        stats = reader.arena.stats()
        assert (stats.transfers, stats.transfer_failures) == (0, 0)
        await reader.close_arena()
        for arena in arenas.values():
            await arena.close()

    asyncio.run(run())
