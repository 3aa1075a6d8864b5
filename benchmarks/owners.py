# SPDX-License-Identifier: Apache-2.0
"""Processes that lay bytes out for others to READ: over an arena, over NIXL alone, over Dynamo's own connector.

Each runs in a process of its own and obeys one command: so many bytes are laid out anew, filled from a seed. It replies
with what a reader needs. The connector's reader has a process of its own too: the thread of an agent, made as the
connector makes it, takes a whole core for as long as its process lives, so both are stopped out of their turn.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.obedient import Obedient

MIB = 2**20
ROOM = 160 * MIB
"""Of an owner: sixteen of the largest size at once."""
SEED = 7
ANSWER_SECONDS = 60.0


def content(nbytes: int) -> bytes:
    """What every owner lays out: the same bytes in every process."""
    import numpy as np

    return np.random.default_rng(SEED).bytes(nbytes)


def check(value: Any, nbytes: int) -> None:
    """Raises ValueError for bytes that are not those that were laid out: the run is void."""
    if hashlib.sha256(value).digest() != hashlib.sha256(content(nbytes)).digest():
        raise ValueError("an arm handed on wrong bytes")


class Owner(Obedient):
    """The reader's end."""

    def __init__(self, kind: str):
        super().__init__(f"the {kind} owner", [sys.executable, "-m", "benchmarks.owners", kind])
        self.card: Any = self.answer()

    def lay_out(self, nbytes: int) -> Any:
        """What it takes to READ ``nbytes`` that were laid out just now."""
        return self.ask("lay out", nbytes=nbytes)

    def take(self, nbytes: int, laid_out: Any) -> float:
        """Of a reader: the seconds in which it READ what somebody laid out."""
        return float(self.ask("take", nbytes=nbytes, **laid_out)["seconds"])


@contextlib.contextmanager
def owner(kind: str) -> Iterator[Owner]:
    """An `Owner` in a process of its own, ended with the block."""
    one = Owner(kind)
    try:
        yield one
    finally:
        one.close()


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


async def ordered() -> Any:
    """The next command; None at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line else None


async def asked() -> int | None:
    """The next number of bytes; None at the end."""
    order = await ordered()
    return int(order["nbytes"]) if order else None


async def own_arena() -> None:
    import msgspec

    from dynamo_epd.transfer import Arena

    async def nobody(owner: str) -> bytes:
        raise LookupError(owner)

    arena = await Arena.open(ROOM, owner="owner", resolve=nobody)
    say({"card": base64.b64encode(arena.metadata()).decode()})
    while (nbytes := await asked()) is not None:
        with await arena.reserve([nbytes], 10.0) as (slot,):
            slot.write(content(nbytes))
            say(msgspec.to_builtins(arena.lease(slot.publish(), ANSWER_SECONDS)))
    await arena.close()


async def own_nixl() -> None:
    from dynamo_epd.transfer.agent import Agent
    from dynamo_epd.transfer.memory import Memory

    memory = Memory(ROOM)
    agent = Agent("owner", memory.address, memory.nbytes)
    say({"card": base64.b64encode(agent.metadata()).decode()})
    while (nbytes := await asked()) is not None:
        memory.write(0, content(nbytes))
        say({"address": memory.address})
    agent.close()


async def own_connector() -> None:
    import torch

    from dynamo import nixl_connect

    connector = nixl_connect.Connector()
    say({"card": None})
    laid_out: Any = None
    while (nbytes := await asked()) is not None:
        tensor = torch.frombuffer(bytearray(content(nbytes)), dtype=torch.uint8)
        readable = await connector.create_readable(nixl_connect.Descriptor(tensor))
        laid_out = (tensor, readable)  # those under way and no others, as Dynamo's own sender  # noqa: F841
        say({"metadata": readable.metadata().model_dump(mode="json")})


async def read_by_connector() -> None:
    import torch

    from dynamo import nixl_connect

    connector = nixl_connect.Connector()

    async def read(metadata: Any, tensor: Any) -> float:
        """The operation ends with this call, and with it what it keeps of its peer, as in Dynamo's own receiver."""
        began = time.perf_counter()
        async with asyncio.timeout(ANSWER_SECONDS):
            with await connector.begin_read(metadata, nixl_connect.Descriptor(tensor)) as operation:
                await operation.wait_for_completion()
        return time.perf_counter() - began

    say({"card": None})
    while (order := await ordered()) is not None:
        tensor = torch.empty(order["nbytes"], dtype=torch.uint8)
        seconds = await read(nixl_connect.RdmaMetadata.model_validate(order["metadata"]), tensor)
        check(memoryview(tensor.numpy()), order["nbytes"])
        say({"seconds": seconds})


KINDS = {"arena": own_arena, "nixl": own_nixl, "connector": own_connector, "connector-reader": read_by_connector}

if __name__ == "__main__":
    asyncio.run(KINDS[sys.argv[1]]())
