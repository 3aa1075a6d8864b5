# SPDX-License-Identifier: Apache-2.0
"""Processes that lay bytes out for others to READ: over an arena, over NIXL alone, over Dynamo's own connector.

Each runs in a process of its own and obeys one command: so many bytes are laid out anew, filled from a seed. It replies
with what a reader needs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
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


class Owner(Obedient):
    """The reader's end."""

    def __init__(self, kind: str):
        super().__init__(f"the {kind} owner", [sys.executable, "-m", "benchmarks.owners", kind])
        self.card: Any = self.answer()

    def lay_out(self, nbytes: int) -> Any:
        """What it takes to READ ``nbytes`` that were laid out just now."""
        return self.ask("lay out", nbytes=nbytes)


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


async def asked() -> int | None:
    """The next number of bytes; None at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return int(json.loads(line)["nbytes"]) if line else None


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
    laid_out: list[Any] = []
    while (nbytes := await asked()) is not None:
        tensor = torch.frombuffer(bytearray(content(nbytes)), dtype=torch.uint8)
        readable = await connector.create_readable(nixl_connect.Descriptor(tensor))
        laid_out = [*laid_out[-15:], (tensor, readable)]
        say({"metadata": readable.metadata().model_dump(mode="json")})


if __name__ == "__main__":
    asyncio.run({"arena": own_arena, "nixl": own_nixl, "connector": own_connector}[sys.argv[1]]())
