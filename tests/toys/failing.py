# SPDX-License-Identifier: Apache-2.0
"""Toy graphs that do not come up, or not stay up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator

from dynamo_epd.sdk import async_on_start, depends, endpoint, liveness, on_shutdown, readiness, service
from dynamo_epd.sdk.config import ConfigError


@service
class Broken:
    @async_on_start
    async def start(self) -> None:
        raise RuntimeError("the tower cannot be loaded")

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1


@service
class Root:
    broken = depends(Broken)


@service
class Misconfigured:
    def __init__(self) -> None:
        raise ConfigError("model: no such directory")


@service
class Halfway:
    """Refuses its configuration in its start hook, and has nothing yet of what its end wants to close."""

    @async_on_start
    async def start(self) -> None:
        raise ConfigError("model: no such directory")

    @on_shutdown
    async def stop(self) -> None:
        self.engine.close()  # type: ignore[attr-defined]

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1


@service
class Forking:
    """Leaves a child behind in its process group, and dies hard."""

    def __init__(self) -> None:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            while True:
                signal.pause()

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1


@service
class Locking:
    """Holds a named semaphore, as vLLM's processes do, and tells its name."""

    def __init__(self) -> None:
        self.lock = multiprocessing.get_context("spawn").Lock()
        with open(os.environ["TOLD"], "a") as told:
            told.write(self.lock._semlock.name + "\n")  # type: ignore[attr-defined]

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1


@service
class Ailing:
    """Comes up once it was asked three times, lives while it does, and soon says that it does not live any more."""

    def __init__(self) -> None:
        self.asked = self.waited = 0

    @readiness
    async def fit(self) -> bool:
        self.waited += 1
        print(f"asked {self.waited} times", flush=True)
        return self.waited >= 3

    @liveness
    def alive(self) -> bool:
        self.asked += self.waited >= 3
        return self.asked < 2

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1


@service
class Dawdling:
    """Stands still in its first start, with a marker file to know it by."""

    def __init__(self) -> None:
        marker = os.environ["MARKER"]
        if not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(600)

    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        yield 1
