# SPDX-License-Identifier: Apache-2.0
"""The image stage: a prompt becomes a picture, by a diffusers pipeline."""

from __future__ import annotations

import asyncio
import io
import re
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from components.embed_worker import EmbedWorker
from components.protocol import (
    PIXELS_SECONDS,
    Completed,
    Done,
    Generated,
    GenerateRequest,
    Handle,
    ModelNames,
    ModelsQuery,
    ReleaseRequest,
    RenewRequest,
    StatesRequest,
)
from dynamo_epd import tracing
from dynamo_epd.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    Overloaded,
    StageUnavailable,
)
from dynamo_epd.exchange import ArenaOwner
from dynamo_epd.failures import Failures
from dynamo_epd.http.images import MAX_SEED, WantedPicture
from dynamo_epd.jobs import JobQueue, JobsConfig
from dynamo_epd.sdk import (
    async_on_start,
    depends,
    dynamo_context,
    endpoint,
    liveness,
    on_drain,
    on_shutdown,
    service,
    service_config,
)
from dynamo_epd.sdk.client import twice
from dynamo_epd.sdk.nats import nats_url
from dynamo_epd.store import Store, StoreConfig, Stored

if TYPE_CHECKING:
    import numpy

    from dynamo_epd.diffusion.generator import Made, Wanted
    from dynamo_epd.diffusion.text_encoder import Conditioning, Row
    from dynamo_epd.job import Job
    from dynamo_epd.metrics import Visit

NO_DEADLINE = 60.0
"""Seconds that a request may take which names none."""
SIZE = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class ImageConfig:
    """Keys of the ``ImageWorker`` section."""

    model: str
    """A diffusers pipeline: a directory, a name on the hub or ``s3://bucket/prefix``."""
    served_model_name: str | list[str] | None = None
    """What clients call it; the first of several is the one in replies. Default: ``model``."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """``auto``: bfloat16 on a GPU, float32 elsewhere."""
    sizes: dict[str, str] = field(default_factory=lambda: {"default": "1024x1024"})
    """Named choices, ``WIDTHxHEIGHT``; ``default`` is taken where a request says none or ``auto``."""
    max_pixels: int = 2048 * 2048
    """Width times height of one picture."""
    qualities: dict[str, int] = field(default_factory=dict)
    """Named choices of denoise steps, for OpenAI's ``quality``."""
    num_inference_steps: int | None = None
    """Where a request says neither. Default: the pipeline's own."""
    max_steps: int = 100
    """Denoise steps that a request may ask for."""
    guidance_scale: float | None = None
    """Where a request says none. Default: the pipeline's own."""
    attention_slicing: bool = False
    """Less memory for attention, in more time."""
    vae_slicing: bool = False
    """Less memory for decoding several pictures, in more time."""
    cpu_offload: bool = False
    """Only the part of the pipeline that works is on the GPU."""
    compile: bool = False
    """Faster steps, after minutes at the start and at each new size."""
    loras: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by the name that requests give them: directory, name on the hub or ``s3://bucket/prefix``."""
    max_batch: int = 8
    """Pictures in one denoise step. 1 gives the pixels of plain diffusers; with more they may differ by rounding,
    depending on what else is made. With ``compile`` or ``cpu-offload`` it is 1."""
    store: StoreConfig = field(default_factory=StoreConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    arena_bytes: int = 128 * 1024 * 1024
    """Pictures that wait for their READ, and states being READ."""
    lease_seconds: float = 30.0
    """How long a picture waits for its READ, and this worker for a prompt's token states."""
    max_waiting: int = 256
    """Pictures that may wait for their turn; one more is refused. By default as many as a frontend lets in at once."""
    engine_silence: float = 600.0
    """Seconds without a denoise step or a picture while some are made, after which the pipeline counts as hung and the
    worker ends. More than the longest step takes, with ``compile`` the first of a new size; a pipeline that does not
    tell of its steps is heard of once a picture."""

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError("max-batch must be 1 at least")


@service(dynamo={"namespace": "dynamo"}, config=ImageConfig)
class ImageWorker(ArenaOwner):
    """Makes pictures, each with a scheduler of its own; those that are made at once share their denoise steps."""

    reads = ("EmbedWorker",)

    embed_worker = depends(EmbedWorker)

    def __init__(self) -> None:
        self.config = service_config(ImageConfig)
        self.names = ModelNames.of(self.config.served_model_name, self.config.model)
        self.name = self.names.names[0]
        self.waiting = 0
        self.failures = Failures(self.config.engine_silence)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.diffusion.generator import Generator
        from dynamo_epd.metrics import Metrics

        config = self.config
        self.loop = asyncio.get_running_loop()
        self.threads = ThreadPoolExecutor(config.max_batch, thread_name_prefix="denoise")
        metrics = Metrics(dynamo_context["namespace"], "ImageWorker", config.model)
        self.metrics = metrics.stage()
        self.steps = metrics.denoise_steps()
        self.images = metrics.images()
        self.job_queue = metrics.job_queue()
        await self.open_arena(config.arena_bytes)
        metrics.watch_arena(self.arena.stats, cache=False)
        self.generator = await asyncio.to_thread(
            Generator,
            config.model,
            dtype=config.dtype,
            ask=self._condition if self.embed_worker else None,
            attention_slicing=config.attention_slicing,
            vae_slicing=config.vae_slicing,
            cpu_offload=config.cpu_offload,
            compile=config.compile,
            loras=config.loras,
            max_batch=config.max_batch,
            on_batch=metrics.denoise_batch_size().observe,
        )
        self.store = Store(config.store, on_stored=metrics.stored().inc)
        self.jobs = JobQueue(dynamo_context["namespace"], config.jobs)
        metrics.watch_jobs(lambda: self.jobs.waiting)
        await self.jobs.open(nats_url())
        self.jobs.work(self._job, dynamo_context["stopping"])

    @endpoint()
    async def check(self, request: GenerateRequest) -> AsyncIterator[Completed]:
        """Refuses what `generate` refuses before a picture is begun: a job is accepted before its turn comes."""
        await asyncio.to_thread(self.generator.check, self._wanted(request))
        yield Completed()

    @endpoint()
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Generated]:
        """Progress after every step, partial pictures where they are asked for, and the picture."""
        tracing.generation("generate_content", {"model": self.name, "seed": request.seed})
        wanted = self._wanted(request)
        if self.waiting >= self.config.max_waiting:
            raise Overloaded(f"{self.waiting} pictures wait already; try again later")
        async for event in self._generated(wanted, request):
            yield event

    async def _generated(self, wanted: Wanted, request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        self.waiting += 1
        making = _Making(self, wanted, request)
        try:
            with self.metrics.visit() as visit:
                async for event in making.events(visit):
                    yield event
        finally:
            making.stop.set()
            self.waiting -= 1

    async def _job(self, job: Job, lain: float) -> None:
        """Makes and stores the pictures of a job; those that an earlier delivery stored stand.

        ``lain``: seconds that it lay in the queue. They count with its first picture: whoever finds that stored knows
        that they have been counted.
        """
        for index, name in enumerate(job.pictures):
            with suppress(NotFound):
                await self.store.head(job.tenant, name)
                continue
            request = generate_request(job.id, job.wanted, index, tenant=job.tenant, keep=name)
            async with aclosing(self._generated(self._wanted(request), request)) as events:
                async for _ in events:
                    pass
            if index == 0:  # right after its visit: the planner divides the one by the number of the others
                self.job_queue.observe(lain)

    @endpoint(addressed=True)
    async def release(self, request: ReleaseRequest) -> AsyncIterator[Completed]:
        """Ends leases on pixels that nobody will READ any more."""
        self.end_leases(request.leases, request.request_ids)
        yield Completed()

    @endpoint(addressed=True)
    async def renew(self, request: RenewRequest) -> AsyncIterator[Completed]:
        """Keeps pixels for those who have not READ them yet. A lease that has ended stays so."""
        self.arena.renew(request.lease, PIXELS_SECONDS)
        yield Completed()

    @endpoint()
    async def models(self, query: ModelsQuery) -> AsyncIterator[ModelNames]:
        """For ``GET /v1/models``."""
        yield self.names

    @liveness
    def alive(self) -> bool:
        """A stage that fails whatever it is asked, or hangs, ends and is started again."""
        return self.failures.alive()

    @on_drain
    async def finish_job(self) -> None:
        """The one that it has, which is no request that would be waited for. What it does not finish within the drain
        is given back by `stop`."""
        await self.jobs.finished()

    @on_shutdown
    async def stop(self) -> None:
        await self.jobs.close()
        await asyncio.to_thread(self.threads.shutdown)  # a thread may wait for this loop, in `_condition`
        await self.close_arena()

    def _wanted(self, request: GenerateRequest) -> Wanted:
        """What the generator is asked for. Raises `InvalidRequest` or `ModelNotFound`."""
        from dynamo_epd.diffusion.generator import Wanted

        if request.model not in (None, *self.names.names):
            raise ModelNotFound(f"the image model here is {self.name!r}", param="model")
        width, height = self._size(request.size)
        steps = self._steps(request)
        guidance = request.guidance_scale if request.guidance_scale is not None else self.config.guidance_scale
        return Wanted(
            request.prompt, request.seed, width, height, steps, guidance, request.negative_prompt, request.lora
        )

    def _steps(self, request: GenerateRequest) -> int:
        if request.quality not in (None, "auto", *self.config.qualities):
            known = ", ".join(("auto", *self.config.qualities))
            raise InvalidRequest(f"'quality' must be one of {known}", param="quality")
        named = self.config.qualities.get(request.quality or "auto")
        steps = request.steps or named or self.config.num_inference_steps or self.generator.steps
        if steps > self.config.max_steps:
            most = self.config.max_steps
            raise InvalidRequest(f"'num_inference_steps' may be {most} at most", param="num_inference_steps")
        return steps

    def _size(self, size: str | None) -> tuple[int, int]:
        named = self.config.sizes.get("default" if size in (None, "auto") else str(size), size)
        found = SIZE.fullmatch(named or "")
        if found is None:
            raise InvalidRequest(
                f"'size' must be WIDTHxHEIGHT or one of {', '.join(sorted(self.config.sizes))}", param="size"
            )
        width, height = int(found[1]), int(found[2])
        if width * height > self.config.max_pixels:
            raise InvalidRequest(f"'size' may have {self.config.max_pixels} pixels at most", param="size")
        return width, height

    def _condition(self, row: Row) -> Conditioning:
        """Asked by the pipeline, in its thread, where its own T5 would be asked."""
        asked = asyncio.run_coroutine_threadsafe(self._states(row), self.loop)
        try:
            return asked.result(self.config.lease_seconds)
        except TimeoutError as error:
            asked.cancel()
            raise StageUnavailable("the EmbedWorker does not answer in time") from error

    async def _states(self, row: Row) -> Conditioning:
        from dynamo_epd.diffusion.text_encoder import Conditioning

        request = StatesRequest("", list(row.ids), row.real, row.masked)

        async def had() -> Conditioning:
            reply = await self.embed_worker.states(request).only()
            async with self.arena.read([reply.handle], timeout=self.config.lease_seconds) as (states,):
                return Conditioning(states.clone(), reply.vector)

        return await twice(had)


class _Making:
    """One picture: its thread, and what comes out of it."""

    def __init__(self, worker: ImageWorker, wanted: Any, request: GenerateRequest):
        self._worker = worker
        self._wanted = wanted
        self._request = request
        self._events: asyncio.Queue[tuple[int, numpy.ndarray | None]] = asyncio.Queue()
        self._last = 0.0
        self.stop = threading.Event()

    async def events(self, visit: Visit) -> AsyncIterator[Generated]:
        worker, wanted, arrived = self._worker, self._wanted, perf_counter()
        began: float | None = None
        counted = ExitStack()

        def begins() -> None:  # later than its thread, which waits for a place among those that are made
            nonlocal began
            began = self._last = perf_counter()
            counted.enter_context(worker.failures.counted())

        def work() -> Made:
            if self.stop.is_set():  # its client left while it waited
                raise asyncio.CancelledError
            with worker.failures.under_way():
                return worker.generator.generate(wanted, self._on_step, self.stop, begins)

        limit = self._request.deadline - time.time() if self._request.deadline else None
        task = asyncio.ensure_future(worker.loop.run_in_executor(worker.threads, work))
        try:
            async with asyncio.timeout(limit):
                async for step, partial in self._until(task):
                    handle = None if partial is None else await self._offered(partial)
                    yield Generated(step, wanted.steps, wanted.width, wanted.height, handle)
                with counted:
                    made = await task
        except TimeoutError as error:
            raise DeadlineExceeded("the request's time is up") from error
        finally:
            self.stop.set()
            task.cancel()
            visit.waited = (began or perf_counter()) - arrived
        assert began is not None
        queued, ran = began - arrived, perf_counter() - began
        worker.images.inc()
        handle = stored = None
        if self._request.keep:
            stored = await self._stored(made.pixels)
        else:
            handle = await self._offered(made.pixels)
        pixels = await self._kept(made.pixels) if self._request.pixels else None
        done = Done(worker.name, made.prompt_tokens, made.image_tokens, queued, ran, made.prompt_vector)
        yield Generated(wanted.steps, wanted.steps, wanted.width, wanted.height, handle, stored, pixels, done)

    async def _until(self, task: asyncio.Future[Any]) -> AsyncIterator[tuple[int, Any]]:
        while True:
            getter = asyncio.ensure_future(self._events.get())
            try:
                await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    return
                yield getter.result()
            finally:
                getter.cancel()

    def _on_step(self, step: int, steps: int, preview: Any) -> None:
        self._worker.failures.heard()
        now = perf_counter()
        self._worker.steps.observe(now - self._last)
        self._last = now
        wanted = self._request.partial_images
        due = {round(steps * (index + 1) / (wanted + 1)) for index in range(wanted)}
        partial = preview() if step in due and step < steps else None
        self._worker.loop.call_soon_threadsafe(self._events.put_nowait, (step, partial))

    async def _offered(self, image: numpy.ndarray) -> Handle:
        data = await asyncio.to_thread(encoded, image, self._request.format, self._request.compression)
        return self._given(await self._worker.offer(data, self._worker.config.lease_seconds))

    def _given(self, handle: Handle) -> Handle:
        self._worker.give(self._request.request_id, handle)
        return handle

    async def _stored(self, image: numpy.ndarray) -> Stored:
        """In the object store, once under its name. Raises StageUnavailable where that cannot be reached."""
        request, wanted = self._request, self._wanted
        assert request.keep is not None
        about = {
            "prompt": request.prompt,
            "seed": request.seed,
            "model": self._worker.name,
            "size": f"{wanted.width}x{wanted.height}",
            "num_inference_steps": wanted.steps,
        }
        for name in ("guidance_scale", "negative_prompt", "lora"):
            if getattr(request, name) is not None:
                about[name] = getattr(request, name)
        data = await asyncio.to_thread(encoded, image, request.format, request.compression)
        return await self._worker.store.put(request.tenant, request.keep, data, f"image/{request.format}", about)

    async def _kept(self, image: numpy.ndarray) -> Handle:
        """For a stage that may have to READ it more than once, as long as the processor lives that asked for it."""
        import torch

        seconds = max(1.0, self._request.deadline - time.time()) if self._request.deadline else NO_DEADLINE
        return self._given(
            await self._worker.offer(
                torch.from_numpy(image), seconds, ends_on_read=False, renewed_within=PIXELS_SECONDS
            )
        )


def generate_request(
    request_id: str, wanted: WantedPicture, index: int, *, tenant: str, keep: str | None
) -> GenerateRequest:
    """The message for the ``index``-th picture of a body."""
    return GenerateRequest(
        request_id=f"{request_id}-{index}.{secrets.token_hex(4)}",
        prompt=wanted.prompt,
        seed=(wanted.seed + index) % (MAX_SEED + 1),
        size=wanted.size,
        quality=wanted.quality,
        model=wanted.model,
        steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        negative_prompt=wanted.negative_prompt,
        lora=wanted.lora,
        format=wanted.format,
        compression=wanted.compression,
        tenant=tenant,
        keep=keep,
    )


def encoded(image: numpy.ndarray, format: str, compression: int) -> bytes:
    """A file. image: uint8 (height, width, 3). ``compression``: quality in percent, for webp and jpeg."""
    from PIL import Image

    file = io.BytesIO()
    options = {} if format == "png" else {"quality": compression}
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()
