# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""Front asks Back, which is told to end while it opens its HTTP server, and runs that call by then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from dynamo_epd.errors import EpdError
from dynamo_epd.sdk import async_on_start, depends, endpoint, service

asked = asyncio.Event()


def told_before() -> bool:
    return Path(os.environ["TOLD"]).exists()


def tell(text: str) -> None:
    with Path(os.environ["TOLD"]).open("a") as told:
        told.write(text)


@contextlib.asynccontextmanager
async def life(_: FastAPI) -> AsyncIterator[None]:
    if not told_before():
        await asked.wait()
        tell("ended early, ")
        os.kill(os.getpid(), signal.SIGTERM)
    yield


@service(app=FastAPI(lifespan=life))
class Back:
    @endpoint()
    async def answer(self) -> AsyncIterator[int]:
        asked.set()
        for index in range(4):
            yield index
            await asyncio.sleep(0.2)


@service
class Front:
    back = depends(Back)

    @async_on_start
    async def ask(self) -> None:
        await self.back.ready()
        try:
            tell(str([index async for index in self.back.answer()]))
        except EpdError as error:
            tell(type(error).__name__)

    @endpoint()
    async def free(self) -> AsyncIterator[int]:
        yield 1


Front.link(Back)
