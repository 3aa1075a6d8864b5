# SPDX-License-Identifier: Apache-2.0
"""The decode stage: a KV cache that another engine filled, or a prompt of its own, becomes a stream of tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from components.protocol import Completed, DecodeRequest, Delta, RejectRequest
from dynamo_epd.errors import Preempted
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.given import Given
from dynamo_epd.sdk import async_on_start, dynamo_context, endpoint, liveness, on_shutdown, service, service_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeConfig:
    """Keys of the ``DecodeWorker`` section beside vLLM's engine arguments."""

    arena_bytes: int = 64 * 1024 * 1024
    """Embeddings of the prompts that are prefilled here."""
    transfer_timeout: float = 10.0
    """Seconds for the READ of one prompt's embeddings, waiting for room included."""
    engine_silence: float = 120.0
    """Seconds without any output while requests wait or run, after which the engine counts as hung and the worker ends.
    More than its longest step takes."""
    delta_seconds: float = 0.005
    """Tokens that follow the last ones sent sooner than this travel together: nobody sees it, and each message takes
    its part of five processes. A model whose steps take longer is streamed token by token; so is any at 0."""
    engine_args: dict[str, Any] = field(default_factory=dict)


@service(dynamo={"namespace": "dynamo"}, config=DecodeConfig, engine_args=True)
class DecodeWorker(ArenaOwner):
    """Streams token deltas. A request whose KV cache the engine gives up fails as `Preempted`, never wrongly."""

    reads = ("EncodeWorker",)

    def __init__(self) -> None:
        self.config = service_config(DecodeConfig)
        self._taken_over: Given[dict[str, Any]] = Given()

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.engine.environment import prepare
        from dynamo_epd.metrics import Metrics

        prepare(self.config.engine_args)
        from dynamo_epd.engine.language import LanguageEngine, Role

        # What this engine must be able to do is the graph's to say, not a flag's: with prefill workers in it, KV caches
        # are taken over; without, prompts are prefilled here.
        role: Role = "decode" if "PrefillWorker" in dynamo_context["graph"].services else "both"
        config = self.config
        self.engine = await LanguageEngine.start(config.engine_args, role, config.engine_silence, config.delta_seconds)
        metrics = Metrics(dynamo_context["namespace"], "DecodeWorker", self.config.engine_args["model"])
        self.metrics = metrics.stage()
        await self.open_arena(self.config.arena_bytes)
        metrics.watch_arena(self.arena.stats, cache=False)

    @endpoint()
    async def generate(self, request: DecodeRequest) -> AsyncIterator[Delta]:
        """One answer. Leaving early aborts it in the engine."""
        if request.kv is not None:
            self._take_over(request, request.kv)
        with self.metrics.visit() as visit:
            async with AsyncExitStack() as held:
                images = await held.enter_async_context(
                    self.prompt_images(request.images, self.config.transfer_timeout)
                )
                deltas = self.engine.generate(
                    request.request_id,
                    request.token_ids,
                    images,
                    sampling=request.sampling,
                    cache_salt=request.cache_salt,
                    streamed=request.streamed,
                    reasoning=request.reasoning,
                    kv=request.kv,
                )
                async with aclosing(deltas):
                    async for delta in deltas:
                        # The engine has its own copy by the first token: the arena's room is for the next prompt.
                        await held.aclose()
                        if delta.queue_seconds is not None:
                            visit.waited = delta.queue_seconds
                        yield delta

    def _take_over(self, request: DecodeRequest, kv: dict[str, Any]) -> None:
        """From here on this worker alone answers for ``kv``: its engine pulls it, or says to the one that prefilled it
        that nobody will. Were that said by another, this engine could pull what is another prompt's by then.

        Raises Preempted where it is not ours any more: another worker was asked, or the caller has left.
        """
        if dynamo_context["stopping"].is_set():  # who has seen this worker leave asks another
            raise Preempted("this decode worker leaves")
        if (late := time.time() - request.kv_until) > 0:
            log.warning("%s: its KV cache came %.1f s late (stood still, or clocks disagree)", request.request_id, late)
            raise Preempted("the KV cache was not taken over in time")
        if not self._taken_over.give(request.request_id, kv):
            raise Preempted("the KV cache was given back")

    @endpoint(addressed=True)
    async def reject(self, request: RejectRequest) -> AsyncIterator[Completed]:
        """Lets a prefill worker free the blocks of a KV cache that nobody will decode. Of a request that came here that
        is done already; one that comes later is refused."""
        if not self._taken_over.take_back(request.request_id):
            await self.engine.reject(request.request_id, request.kv)
        yield Completed()

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
