# SPDX-License-Identifier: Apache-2.0
"""An arena in a process of its own, for tests: run as a program it obeys JSON lines, `ArenaOwner` sends them."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.obedient import Obedient
from dynamo_epd.errors import HandOffFailed
from dynamo_epd.transfer import Arena, Entry, Handle


def content(seed: int, nbytes: int) -> bytes:
    """The bytes that a seed stands for: the same in both processes, different for every seed."""
    return random.Random(seed).randbytes(nbytes)


class ArenaOwner(Obedient):
    """The test's end. Its calls wait for the other process's answer."""

    def __init__(self, name: str, nbytes: int, **environment: str):
        root = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        super().__init__(name, [sys.executable, __file__], environment=os.environ | root | environment)
        self.card = base64.b64decode(self.ask("open", name=name, nbytes=nbytes)["card"])

    async def resolve(self, owner: str) -> bytes:
        """For the reader's `Arena.open`."""
        assert owner == self.name
        return self.card

    def publish(self, seed: int, nbytes: int, *, seconds: float = 60.0, **arguments: Any) -> Handle:
        """Publish `content` of ``seed`` and lease it. Arguments: key, shape, dtype, ends_on_read."""
        return msgspec.convert(self.ask("publish", seed=seed, nbytes=nbytes, seconds=seconds, **arguments), Handle)

    def stats(self) -> Any:
        return self.ask("stats")

    def stop(self) -> None:
        """`pause`, and wait until no thread of it runs: NIXL's own would still send for a while."""
        self.pause()
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
            time.sleep(0.001)


class Commands:
    """The other process's end: one method for each command."""

    arena: Arena

    async def open(self, name: str, nbytes: int) -> dict[str, Any]:
        self.others: dict[str, bytes] = {}

        async def resolve(owner: str) -> bytes:
            return self.others[owner]

        self.arena = await Arena.open(nbytes, owner=name, resolve=resolve)
        return {"card": base64.b64encode(self.arena.metadata()).decode()}

    async def publish(
        self,
        seed: int,
        nbytes: int,
        seconds: float,
        key: str | None = None,
        shape: list[int] | None = None,
        dtype: str = "bytes",
        ends_on_read: bool = True,
    ) -> dict[str, Any]:
        with await self.arena.reserve([nbytes], 5.0) as (slot,):
            slot.write(content(seed, nbytes))
            entry: Entry = slot.publish(key, (nbytes,) if shape is None else tuple(shape), dtype)
        return msgspec.to_builtins(self.arena.lease(entry, seconds, ends_on_read=ends_on_read))

    async def read(self, handle: dict[str, Any], card: str) -> dict[str, Any]:
        """Be a reader: READ the handle of the owner with this card; reply with a digest of the bytes or the error."""
        self.others[handle["owner"]] = base64.b64decode(card)
        try:
            async with self.arena.read([msgspec.convert(handle, Handle)], timeout=30.0) as (value,):
                return {"sha256": hashlib.sha256(value).hexdigest()}
        except HandOffFailed as error:
            return {"error": type(error).__name__}

    async def release(self, lease: str) -> dict[str, Any]:
        self.arena.release(lease)
        return {}

    async def flip(self, offset: int) -> dict[str, Any]:
        """A fault that no caller can cause: one bit of published memory changes."""
        self.arena._memory.bytes_at(offset, 1)[0] ^= 1
        return {}

    async def stats(self) -> dict[str, Any]:
        return dataclasses.asdict(self.arena.stats())


async def obey() -> None:
    commands = Commands()
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        reply = await getattr(commands, request.pop("what"))(**request)
        print(json.dumps(reply), flush=True)
    await commands.arena.close()


if __name__ == "__main__":
    asyncio.run(obey())
