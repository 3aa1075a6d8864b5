# SPDX-License-Identifier: Apache-2.0
"""The frontend with something in the processor's place that says whom it was asked for: the edge without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from components.frontend import Frontend
from components.processor import Processor
from components.protocol import HealthQuery, HttpReply, HttpRequest, ModelsQuery, StageHealth
from dynamo_epd.sdk import async_on_start, endpoint, service


@service(dynamo={"namespace": "toys"})
class Asked(Processor):
    def __init__(self) -> None:
        pass

    @async_on_start
    async def start(self) -> None:
        pass

    @endpoint()
    async def chat(self, request: HttpRequest) -> AsyncIterator[HttpReply]:
        """A reply that takes ``max_tokens`` tenths of a second, in one piece or as as many events."""
        ticks = request.body.get("max_tokens") or 0
        if request.body.get("stream"):
            yield HttpReply(200)
            for index in range(ticks):
                yield HttpReply(event=f"data: {index}\n\n")
                await asyncio.sleep(0.1)
            yield HttpReply(event="data: [DONE]\n\n")
        else:
            await asyncio.sleep(ticks / 10)
            yield HttpReply(200, json.dumps({"tenant": request.tenant}))

    @endpoint()
    async def models(self, query: ModelsQuery) -> AsyncIterator[HttpReply]:
        yield HttpReply(200, json.dumps({"object": "list", "data": []}))

    @endpoint()
    async def health(self, query: HealthQuery) -> AsyncIterator[StageHealth]:
        yield StageHealth({})


Frontend.link(Asked)  # type: ignore[attr-defined]
