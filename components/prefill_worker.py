# SPDX-License-Identifier: Apache-2.0
"""The prefill stage: tokens and handles become a KV cache that waits for one decode worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from components.protocol import PrefillReply, PrefillRequest, Withdrawn, WithdrawRequest
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.sdk import async_on_start, dynamo_context, endpoint, liveness, on_shutdown, service, service_config


@dataclass(frozen=True)
class PrefillConfig:
    """Keys of the ``PrefillWorker`` section beside vLLM's engine arguments."""

    arena_bytes: int = 64 * 1024 * 1024
    """Embeddings of the prompts being prefilled."""
    transfer_timeout: float = 10.0
    """Seconds for the READ of one prompt's embeddings, waiting for room included."""
    engine_silence: float = 120.0
    """Seconds without any output while requests wait or run, after which the engine counts as hung and the worker ends.
    More than its longest step takes."""
    engine_args: dict[str, Any] = field(default_factory=dict)


@service(dynamo={"namespace": "dynamo"}, config=PrefillConfig, engine_args=True)
class PrefillWorker(ArenaOwner):
    """READs embeddings over NIXL into its own arena, checks them, prefills, and keeps the KV cache for one reader."""

    reads = ("EncodeWorker",)

    def __init__(self) -> None:
        self.config = service_config(PrefillConfig)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.engine.environment import prepare
        from dynamo_epd.metrics import Metrics

        prepare(self.config.engine_args)
        from dynamo_epd.engine.language import LanguageEngine

        self.engine = await LanguageEngine.start(self.config.engine_args, "prefill", self.config.engine_silence)
        metrics = Metrics(dynamo_context["namespace"], "PrefillWorker", self.config.engine_args["model"])
        self.metrics = metrics.stage()
        await self.open_arena(self.config.arena_bytes)
        metrics.watch_arena(self.arena.stats, cache=False)

    @endpoint()
    async def prefill(self, request: PrefillRequest) -> AsyncIterator[PrefillReply]:
        """Replies once, when the KV cache of the whole prompt is there."""
        with self.metrics.visit() as visit:
            async with self.prompt_images(request.images, self.config.transfer_timeout) as images:
                filled = await self.engine.prefill(
                    request.request_id,
                    request.token_ids,
                    images,
                    cache_salt=request.cache_salt,
                    streamed=request.streamed,
                    sampling=request.sampling,
                )
            visit.waited = filled.queue_seconds
        yield PrefillReply(filled.kv, filled.until, filled.token_ids, filled.queue_seconds, filled.first)

    @endpoint(addressed=True)
    async def withdraw(self, request: WithdrawRequest) -> AsyncIterator[Withdrawn]:
        """What was handed over to a caller that did not see it, so that a decode worker can reject it."""
        yield Withdrawn(await self.engine.withdraw(request.request_id))

    @liveness
    def alive(self) -> bool:
        """A stage without its engine ends, and is started again."""
        return self.engine.alive

    @on_shutdown
    async def stop(self) -> None:
        try:
            await self.close_arena()
        finally:
            self.engine.close()
