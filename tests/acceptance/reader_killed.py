# SPDX-License-Identifier: Apache-2.0
"""A reader that dies within its READ over TCP. Run by `test_reader_killed` in a process of its own."""

from __future__ import annotations

import asyncio

import msgspec
from arena_owner import ArenaOwner, content

from dynamo_epd.transfer import Arena
from tests.test_transfer import MIB, over_tcp, publish, read_bytes, serving, until

__all__ = ["over_tcp"]


def test_a_reader_killed_while_it_reads_gives_no_notice_and_its_lease_ends_by_itself(over_tcp: ArenaOwner) -> None:
    async def test(arena: Arena, card: dict[str, str]) -> None:
        first = await publish(arena, content(1, MIB), 60)
        over_tcp.begin("read", handle=msgspec.to_builtins(first), **card)
        assert "sha256" in await asyncio.to_thread(over_tcp.answer)
        await until(lambda: arena.stats().leases == 0)
        handle = await publish(arena, content(2, 15 * MIB), 1)
        over_tcp.begin("read", handle=msgspec.to_builtins(handle), **card)
        await asyncio.sleep(0.005)
        over_tcp.kill()
        assert arena.stats().leases == 1
        await until(lambda: arena.stats().leases == 0)
        assert arena.stats().leases_expired == 1
        assert arena.stats().bytes_used == 0
        assert bytes(await own(arena)) == b"still here"

    async def own(arena: Arena) -> bytes:
        return await read_bytes(arena, await publish(arena, b"still here", 60))

    serving(test)
