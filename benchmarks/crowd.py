# SPDX-License-Identifier: Apache-2.0
"""The aggregated graph with hundreds of workers that compute nothing, many of them in one process.

Frontend, processor, NATS, discovery, routing, pictures and the hand-off over NIXL are the real ones. Only the towers
and the language models are doubles, which take the time that a real one would and answer with the prompt. Members of a
process are workers of their own in discovery and to the router; they share the process' arena.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from components.decode_worker import DecodeConfig, DecodeWorker
from components.encode_worker import EncodeConfig, EncodeWorker
from components.frontend import Frontend
from components.processor import Processor
from components.protocol import Delta
from dynamo_epd.sdk import async_on_start, dynamo_context, on_shutdown, service, service_config
from dynamo_epd.sdk.handler import EndpointHandler, InFlight
from dynamo_epd.sdk.place import endpoint_path
from dynamo_epd.sdk.service import info_of

SAMPLED = 16
"""vLLM's default of ``max_tokens``: its sampling parameters are sent without what is a default."""


@dataclass(frozen=True)
class Crowded:
    """A key of both sections."""

    members: int = 1
    """Workers in one process."""


@dataclass(frozen=True)
class CrowdConfig(DecodeConfig, Crowded):
    """Keys of the ``CrowdWorker`` section beside those of a ``DecodeWorker``."""

    slots: int = 64
    """Answers at once, of one member; others wait."""
    prefill_seconds: float = 0.03
    token_seconds: float = 0.02


@dataclass(frozen=True)
class CrowdEncodeConfig(EncodeConfig, Crowded):
    """Keys of the ``CrowdEncodeWorker`` section beside those of an ``EncodeWorker``."""

    forward_seconds: float = 0.004
    """Of a batch, and besides for each of its pictures:"""
    picture_seconds: float = 0.006
    tokens: int = 576
    width: int = 4096
    """Of an embedding, in float16: LLaVA-1.5's for a picture."""


class Members:
    """Further instances of this process' service, each with a runtime of its own.

    The runtimes are made at construction, for naming an endpoint after another has begun to be served can stand still:
    see `ServiceClient.locate`.
    """

    def __init__(self, kind: type, count: int):
        from dynamo._core import DistributedRuntime

        discovery, plane = (os.environ.get(f"DYN_{name}") for name in ("DISCOVERY_BACKEND", "REQUEST_PLANE"))
        address = dynamo_context["namespace"], dynamo_context["component"]
        self._marks = info_of(kind).marked("endpoint")
        self._serving: list[asyncio.Future[Any]] = []
        self._runtimes = [
            DistributedRuntime(asyncio.get_running_loop(), discovery or "file", plane or "nats") for _ in range(count)
        ]
        self._endpoints = [
            {name: runtime.endpoint(endpoint_path(address, mark.name)) for name, mark in self._marks.items()}
            for runtime in self._runtimes
        ]

    def serve(self, members: Sequence[Any]) -> None:
        """One instance of the service for each runtime."""
        for member, endpoints in zip(members, self._endpoints, strict=True):
            for name, endpoint in endpoints.items():
                handler = EndpointHandler(getattr(member, name), self._marks[name], InFlight())
                self._serving.append(
                    asyncio.ensure_future(endpoint.serve_endpoint(handler.handle, graceful_shutdown=False))
                )

    async def close(self) -> None:
        """Leaves discovery; what runs is not waited for."""
        for endpoints in self._endpoints:
            for endpoint in endpoints.values():
                await endpoint.unregister_endpoint_instance()
        for runtime in self._runtimes:
            runtime.shutdown()
        if self._serving:
            await asyncio.wait(self._serving, timeout=2)


class PacedEngineDouble:
    """As `LanguageEngine`: takes its time, and says the prompt's first tokens."""

    alive = True

    def __init__(self, config: CrowdConfig):
        self._config = config
        self._slots = asyncio.Semaphore(config.slots)

    async def generate(
        self, request_id: str, token_ids: list[int], images: Any, *, sampling: str, **_: Any
    ) -> AsyncGenerator[Delta, None]:
        """The first token after ``prefill_seconds``, the others ``token_seconds`` apart, by the clock: lateness of one
        is not added to the next."""
        arrived = perf_counter()
        answer = token_ids[: json.loads(sampling).get("max_tokens", SAMPLED)]
        async with self._slots:
            queued = perf_counter() - arrived
            due = perf_counter() + self._config.prefill_seconds
            for place, token in enumerate(answer, 1):
                await asyncio.sleep(max(0.0, due - perf_counter()))
                due += self._config.token_seconds
                yield Delta(
                    [token],
                    finish_reason="length" if place == len(answer) else None,
                    prompt_tokens=len(token_ids) if place == 1 else None,
                    queue_seconds=queued if place == 1 else None,
                )

    def close(self) -> None:
        """There is nothing to end."""


class PacedEncoderDouble:
    """As `Encoder`: takes its time. The embedding has a real one's size."""

    def __init__(self, config: CrowdEncodeConfig):
        import torch

        self._config = config
        self._embedding = torch.zeros((config.tokens, config.width), dtype=torch.float16)

    def process(self, image: Any) -> Any:
        return image.size

    def embed(self, items: Sequence[Any]) -> list[Any]:
        time.sleep(self._config.forward_seconds + len(items) * self._config.picture_seconds)
        return [self._embedding] * len(items)

    def patches(self, item: Any) -> int:
        return 1

    def metadata(self, item: Any) -> dict[str, list[int]]:
        return {}


@service(dynamo={"namespace": "dynamo"}, config=CrowdConfig, engine_args=True)
class CrowdWorker(DecodeWorker):
    reads = ("CrowdEncodeWorker",)

    def __init__(self) -> None:
        super().__init__()
        self.config: CrowdConfig = service_config(CrowdConfig)
        self.members = Members(CrowdWorker, self.config.members - 1)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.metrics import Metrics

        self.engine: Any = PacedEngineDouble(self.config)
        self.metrics = Metrics(dynamo_context["namespace"], "CrowdWorker", "crowd").stage()
        await self.open_arena(self.config.arena_bytes)
        others = [copy.copy(self) for _ in range(self.config.members - 1)]
        for other in others:
            other.engine = PacedEngineDouble(self.config)
        self.members.serve(others)

    @on_shutdown
    async def stop(self) -> None:
        await self.members.close()
        await super().stop()


@service(dynamo={"namespace": "dynamo"}, config=CrowdEncodeConfig, engine_args=True)
class CrowdEncodeWorker(EncodeWorker):
    def __init__(self) -> None:
        super().__init__()
        self.config: CrowdEncodeConfig = service_config(CrowdEncodeConfig)
        self.members = Members(CrowdEncodeWorker, self.config.members - 1)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.engine import encoder

        encoder.load_encoder = lambda engine_args: PacedEncoderDouble(self.config)  # type: ignore
        await super().start()
        others = [copy.copy(self) for _ in range(self.config.members - 1)]
        for other in others:
            other.batcher = self.batches(self.encoder.embed, self.config.max_batch)
        self.members.serve(others)

    @on_shutdown
    async def stop(self) -> None:
        await self.members.close()
        await super().stop()


Frontend.link(Processor)  # type: ignore[attr-defined]
Processor.link(CrowdEncodeWorker)  # type: ignore[attr-defined]
Processor.link(CrowdWorker)  # type: ignore[attr-defined]
