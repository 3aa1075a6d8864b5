# SPDX-License-Identifier: Apache-2.0
"""The embed stage: T5's encoder. A text becomes a vector that says what it means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from components.protocol import Embedded, EmbedRequest, ModelNames, ModelsQuery, States, StatesRequest
from dynamo_epd import tracing
from dynamo_epd.batching import Batcher, one_thread
from dynamo_epd.errors import InvalidRequest, ModelNotFound
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.sdk import async_on_start, dynamo_context, endpoint, liveness, on_shutdown, service, service_config

MOST_CHARACTERS = 64
"""Of one token. SentencePiece makes no piece of more than 16 unless told to, and T5, mT5 and UMT5 were not; NFKC makes
one character of four at most. A longer text that fits all the same is runs of white space or of signs that T5 does not
know, each of which is one token."""
AT_ONCE = 32
"""Texts that are tokenized in one go: a request that is cancelled stops after them."""
SHORT = 8192
"""Characters of texts that are tokenized on the loop, in a millisecond or two; the way to a thread and back takes half
of one."""
PER_TEXT = 64
"""Characters that take as long as the call itself."""


@dataclass(frozen=True)
class EmbedConfig:
    """Keys of the ``EmbedWorker`` section."""

    model: str
    """A T5 encoder: a directory, a name on the hub or ``s3://bucket/prefix``."""
    served_model_name: str | list[str] | None = None
    """What clients call it; the first of several is the one in replies. Default: ``model``."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """``auto``: the checkpoint's own on a GPU, float32 elsewhere."""
    max_tokens: int = 512
    """Of one text; a longer one is refused."""
    batch_tokens: int = 16384
    """Tokens in one forward."""
    arena_bytes: int = 64 * 1024 * 1024
    """States that wait for their READ."""
    lease_seconds: float = 30.0
    """How long states wait for their READ."""
    max_waiting: int = 8192
    """Texts that may wait for a forward; one more is refused."""
    engine_silence: float = 240.0
    """Seconds that one batch of texts may take, after which it counts as hung and the worker ends. More than the
    longest takes; less than ``admission.deadline`` leaves time to ask another worker."""


@service(dynamo={"namespace": "dynamo"}, config=EmbedConfig)
class EmbedWorker(ArenaOwner):
    """Batches texts of all requests by their tokens."""

    def __init__(self) -> None:
        self.config = service_config(EmbedConfig)
        self.names = ModelNames.of(self.config.served_model_name, self.config.model)
        self.name = self.names.names[0]

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.metrics import Metrics
        from dynamo_epd.text.t5 import TextEncoder

        config = self.config
        loop, thread = asyncio.get_running_loop(), one_thread()
        load = partial(
            TextEncoder,
            config.model,
            dtype=config.dtype,
            max_tokens=config.max_tokens,
            batch_tokens=config.batch_tokens,
        )
        self.encoder = await loop.run_in_executor(thread, load)
        await loop.run_in_executor(thread, self.encoder.encode, [self.encoder.tokenize("ready", "input")])
        metrics = Metrics(dynamo_context["namespace"], "EmbedWorker", config.model)
        self.metrics = metrics.stage()
        self.batcher = Batcher(
            self.encoder.encode,
            most=config.batch_tokens,
            waiting=config.max_waiting,
            weight=len,  # the encoder splits what is more with the padding of its last row
            observe=metrics.embed_batch_size().observe,
            silence=config.engine_silence,
            thread=thread,
        )
        await self.open_arena(config.arena_bytes)
        metrics.watch_arena(self.arena.stats, cache=False)

    @endpoint()
    async def embed(self, request: EmbedRequest) -> AsyncIterator[Embedded]:
        """All texts of a request, or a refusal of all of them."""
        tracing.generation("embeddings", {"model": request.model or self.name})
        if request.model not in (None, *self.names.names):
            raise ModelNotFound(f"the embedding model here is {self.name!r}", param="model")
        if not request.texts:
            raise InvalidRequest("there is no text to embed", param="input")
        items = await tokenized(self.encoder.tokenize, request.texts, self.config.max_tokens)
        with self.metrics.visit() as visit:
            done = await self.batcher.submit_all(items)
            queued, ran = max(one.queue_seconds for one in done), max(one.run_seconds for one in done)
            visit.waited = queued
        tracing.response(self.name)
        tracing.usage(sum(len(ids) for ids in items))
        vectors = [one.result.vector.numpy().tobytes() for one in done]
        yield Embedded(vectors, [len(ids) for ids in items], self.name, queued, ran)

    @endpoint()
    async def states(self, request: StatesRequest) -> AsyncIterator[States]:
        """Token-level states for a picture, and the prompt's vector: of one row where the pipeline masks its padding,
        else of two in one batch."""
        if not 0 < request.real <= len(request.ids) <= self.config.batch_tokens:
            raise InvalidRequest(f"a prompt has from 1 to {self.config.batch_tokens} tokens")
        if not 0 <= min(request.ids) <= max(request.ids) < self.encoder.vocabulary:  # it would end the whole batch
            raise InvalidRequest("a prompt holds what is no token of this model")
        real = request.ids[: request.real]
        rows = [real] if request.masked else [request.ids, real]
        with self.metrics.visit() as visit:
            done = await self.batcher.submit_all(rows)
            visit.waited = max(one.queue_seconds for one in done)
        handle = await self.offer(done[0].result.states.contiguous(), self.config.lease_seconds)
        yield States(handle, done[-1].result.vector.numpy().tobytes())

    @endpoint()
    async def models(self, query: ModelsQuery) -> AsyncIterator[ModelNames]:
        """For ``GET /v1/models``."""
        yield self.names

    @liveness
    def alive(self) -> bool:
        """A stage that fails whatever it is asked, or hangs, ends and is started again."""
        return self.batcher.failures.alive()

    @on_shutdown
    async def stop(self) -> None:
        self.batcher.close()
        await self.close_arena()


async def tokenized(
    tokenize: Callable[[str, str], list[int]], texts: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """Token ids of each text, made beside the loop, which must go on saying that this worker lives; of few short ones
    on it.

    Raises `InvalidRequest` for a text of too many tokens, and unread for one of too many characters.
    """
    names = [f"input[{index}]" for index in range(len(texts))] if len(texts) > 1 else ["input"]
    for text, name in zip(texts, names, strict=True):
        if len(text) > MOST_CHARACTERS * max_tokens:
            message = f"'{name}' has {len(text)} characters, {max_tokens} tokens are the limit"
            raise InvalidRequest(message, param=name, code="text_too_long")
    if sum(map(len, texts)) + PER_TEXT * len(texts) <= SHORT:
        return list(map(tokenize, texts, names))
    found: list[list[int]] = []
    for first in range(0, len(texts), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        found += await asyncio.to_thread(list, map(tokenize, texts[some], names[some]))
    return found
