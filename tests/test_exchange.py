# SPDX-License-Identifier: Apache-2.0
"""An arena's owner beside its requests; between processes see test_transfer.py and the graphs."""

from __future__ import annotations

import asyncio

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
