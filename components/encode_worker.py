# SPDX-License-Identifier: Apache-2.0
"""The encode stage: a picture becomes an embedding that lies in this worker's arena until it is READ."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from components.protocol import Completed, Encoded, EncodeRequest, Picture, ReleaseRequest
from dynamo_epd.batching import Batcher, one_thread
from dynamo_epd.errors import MediaError
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.flights import Flights
from dynamo_epd.images.config import MediaConfig
from dynamo_epd.sdk import async_on_start, dynamo_context, endpoint, liveness, on_shutdown, service, service_config
from dynamo_epd.transfer import Entry

if TYPE_CHECKING:
    import numpy

HOLD_SECONDS = 0.25
CPU_PATCHES = 1024
"""A layer of ViT-L makes 17 MB of them in its widest tensor."""
SMALL = 256 * 1024
"""Bytes that are hashed sooner than a thread would have begun."""


@dataclass(frozen=True)
class EncodeConfig:
    """Keys of the ``EncodeWorker`` section beside vLLM's engine arguments."""

    arena_bytes: int = 256 * 1024 * 1024
    """Embeddings kept and pictures being READ, together."""
    lease_seconds: float = 30.0
    """How long an embedding waits for the prefill worker that was promised it."""
    max_batch: int = 16
    """Images in one forward of the vision tower."""
    max_batch_patches: int | None = None
    """Patches of the images in one forward, together; an image that has more runs alone. Default: 1024 on a CPU, where
    the tensors of more fit no cache and one by one is faster; no bound on a GPU."""
    max_waiting: int = 1024
    """Images that may wait for the tower; one more is refused."""
    engine_silence: float = 240.0
    """Seconds that one forward of the vision tower may take, after which it counts as hung and the worker ends. More
    than the longest takes; less than ``admission.deadline`` leaves time to ask another worker."""
    media: MediaConfig = field(default_factory=MediaConfig)
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_batch < 1 or (self.max_batch_patches is not None and self.max_batch_patches < 1):
            raise ValueError("max-batch and max-batch-patches must be 1 at least")


@service(dynamo={"namespace": "dynamo"}, config=EncodeConfig, engine_args=True)
class EncodeWorker(ArenaOwner):
    """Fetches, decodes, batches, runs vision tower and projector, and keeps what it encoded, keyed on content."""

    reads = ("Frontend", "ImageWorker")

    def __init__(self) -> None:
        self.config = service_config(EncodeConfig)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.engine.environment import prepare
        from dynamo_epd.images.fetch import Fetcher
        from dynamo_epd.metrics import Metrics

        prepare(self.config.engine_args)
        from dynamo_epd.engine.checkpoint import revision_of
        from dynamo_epd.engine.encoder import load_encoder

        loop, thread = asyncio.get_running_loop(), one_thread()
        self.encoder = await loop.run_in_executor(thread, load_encoder, self.config.engine_args)
        await loop.run_in_executor(thread, self._warm_up)
        self.revision = revision_of(self.config.engine_args)
        metrics = Metrics(dynamo_context["namespace"], "EncodeWorker", self.config.engine_args["model"])
        self.metrics = metrics.stage()
        self.batcher = self.batches(self.encoder.embed, self.config.max_batch, metrics.batch_size().observe, thread)
        self.flights: Flights[tuple[Entry, float]] = Flights()
        self.fetcher = Fetcher(self.config.media)
        self.metadata: WeakKeyDictionary[Entry, dict[str, list[int]]] = WeakKeyDictionary()
        await self.open_arena(self.config.arena_bytes)
        metrics.watch_arena(self.arena.stats, cache=True)

    @endpoint()
    async def encode(self, request: EncodeRequest) -> AsyncIterator[Encoded]:
        """One picture in, one handle out. The reply is the work-complete event; the bytes stay here."""
        with self.metrics.visit() as visit:
            visit.waited = 0.0  # fetching is no waiting, however it ends
            entry, queued, known = None, 0.0, request.picture.content
            if known is not None:
                uuid = self._uuid(request.tenant, b"", known)
                entry = self.arena.lookup(uuid)
            if entry is None:
                data = await self._data(request.picture)
                small = (len(data) if isinstance(data, bytes) else data.nbytes) <= SMALL
                content = content_of(data) if small else await asyncio.to_thread(content_of, data)
                uuid = self._uuid(request.tenant, *content)
                entry = self.arena.lookup(uuid, again=known is not None)
            if entry is None:
                visit.waited = None  # until its batch has run
                entry, queued = await self.flights.join(uuid, lambda: self._encode(uuid, data))
            visit.waited = queued
        handle = self.arena.lease(entry, self.config.lease_seconds)
        if self.give(request.request_id, handle):
            yield Encoded(handle, uuid, self.metadata[entry], queued)

    @endpoint(addressed=True)
    async def release(self, request: ReleaseRequest) -> AsyncIterator[Completed]:
        """Ends leases whose request is over before they were READ."""
        self.end_leases(request.leases, request.request_ids)
        yield Completed()

    @liveness
    def alive(self) -> bool:
        """A stage that fails whatever it is asked, or hangs, ends and is started again."""
        return self.batcher.failures.alive()

    @on_shutdown
    async def stop(self) -> None:
        self.batcher.close()
        self.fetcher.close()
        await self.close_arena()

    async def _data(self, picture: Picture) -> bytes | numpy.ndarray:
        """A file, or the pixels of a picture that was made in this graph: uint8 (height, width, 3)."""
        if picture.handle is None:
            return await self.fetcher.fetch(picture.url or "")
        async with self.arena.read([picture.handle], timeout=self.config.lease_seconds) as (view,):
            return bytes(view) if picture.handle.dtype == "bytes" else view.numpy().copy()

    async def _encode(self, uuid: str, data: bytes | numpy.ndarray) -> tuple[Entry, float]:
        """The embedding in the arena, and the seconds that it waited for its batch."""
        item = await asyncio.to_thread(self._process, data)
        ran = await self.batcher.submit(item)
        embedding = ran.result
        size = embedding.numel() * embedding.element_size()
        with await self.arena.reserve([size], timeout=self.config.lease_seconds) as (slot,):
            slot.write(embedding)
            entry = slot.publish(uuid)
            self.metadata[entry] = self.encoder.metadata(item)
        # Until those who wait for it have leases of their own: a full arena could evict it before they run.
        hold = self.arena.lease(entry, HOLD_SECONDS, ends_on_read=False)
        asyncio.get_running_loop().call_later(HOLD_SECONDS, self.arena.release, hold.lease)
        return entry, ran.queue_seconds

    def batches(
        self,
        embed: Callable[[Sequence[Any]], Sequence[Any]],
        most: int,
        observe: Callable[[int], None] = lambda size: None,
        thread: ThreadPoolExecutor | None = None,
    ) -> Batcher[Any, Any]:
        """Of ``most`` images at most, and of as many patches as the configuration says (`make bench ROW=4`)."""
        from dynamo_epd.engine.environment import cpu_build

        room = self.config.max_batch_patches or (CPU_PATCHES if cpu_build() else sys.maxsize)
        return Batcher(
            embed,
            most=most * room,  # which ``most`` images weigh, and so do ``room`` patches
            waiting=self.config.max_waiting,
            weight=lambda item: max(room, most * self.encoder.patches(item)),
            observe=observe,
            silence=self.config.engine_silence,
            thread=thread,
        )

    def _warm_up(self) -> None:
        """One grey picture: a worker that says it is ready has encoded once, and the first request meets a warm one."""
        from PIL import Image

        self.encoder.embed([self.encoder.process(Image.new("RGB", (224, 224), "grey"))])

    def _process(self, data: bytes | numpy.ndarray) -> Any:
        from PIL import Image

        from dynamo_epd.images.decode import decode

        image = decode(data, self.config.media.max_pixels) if isinstance(data, bytes) else Image.fromarray(data)
        try:
            return self.encoder.process(image)
        except ValueError as error:
            raise MediaError(f"the model's image processor refuses this image: {error}") from error

    def _uuid(self, tenant: str, kind: bytes, content: str) -> str:
        """H(tenant, content, processor and tower revision): never the address that the content came from."""
        return hashlib.sha256(b"\0".join((tenant.encode(), kind, content.encode(), self.revision.encode()))).hexdigest()


def content_of(data: bytes | numpy.ndarray) -> tuple[bytes, str]:
    """What the bytes are, nothing for a file, and their SHA-256 in hex."""
    if isinstance(data, bytes):
        return b"", hashlib.sha256(data).hexdigest()
    return repr(data.shape).encode(), hashlib.sha256(data.tobytes()).hexdigest()
