# SPDX-License-Identifier: Apache-2.0
"""The aggregated graph for text, with an engine that says the prompt again: all of it is real but the arithmetic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from components.decode_worker import DecodeConfig, DecodeWorker
from components.frontend import Frontend
from components.processor import Processor
from components.protocol import Delta
from dynamo_epd.sdk import async_on_start, dynamo_context, service, service_config

SAMPLED = 16
"""vLLM's default of ``max_tokens``: its sampling parameters are sent without what is a default."""


@dataclass(frozen=True)
class EchoConfig(DecodeConfig):
    """Keys of the ``EchoWorker`` section beside those of a ``DecodeWorker``."""

    slots: int = 6
    """Answers at once; others wait."""
    token_seconds: float = 0.05


class EchoEngine:
    """As `LanguageEngine`, for prompts without pictures."""

    alive = True

    def __init__(self, slots: int, token_seconds: float):
        self.unfinished = 0
        self._slots = asyncio.Semaphore(slots)
        self._token_seconds = token_seconds

    async def generate(
        self, request_id: str, token_ids: list[int], images: Any, *, sampling: str, **_: Any
    ) -> AsyncGenerator[Delta, None]:
        """The prompt's first ``max_tokens`` tokens, one every ``token_seconds`` once there is a slot."""
        arrived = perf_counter()
        answer = token_ids[: json.loads(sampling).get("max_tokens", SAMPLED)]
        self.unfinished += 1
        try:
            async with self._slots:
                queued = perf_counter() - arrived
                for place, token in enumerate(answer, 1):
                    await asyncio.sleep(self._token_seconds)
                    yield Delta(
                        [token],
                        finish_reason="length" if place == len(answer) else None,
                        prompt_tokens=len(token_ids) if place == 1 else None,
                        queue_seconds=queued if place == 1 else None,
                    )
        finally:
            self.unfinished -= 1

    def close(self) -> None:
        """There is nothing to end."""


@service(dynamo={"namespace": "dynamo"}, config=EchoConfig, engine_args=True)
class EchoWorker(DecodeWorker):
    def __init__(self) -> None:
        super().__init__()
        self.config: EchoConfig = service_config(EchoConfig)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.metrics import Metrics

        self.engine: Any = EchoEngine(self.config.slots, self.config.token_seconds)
        metrics = Metrics(dynamo_context["namespace"], "EchoWorker", "echo")
        self.metrics = metrics.stage()
        await self.open_arena(self.config.arena_bytes)


Frontend.link(Processor)  # type: ignore[attr-defined]
Processor.link(EchoWorker)  # type: ignore[attr-defined]
