# SPDX-License-Identifier: Apache-2.0
"""The frontend: HTTP, as OpenAI's clients speak it. It checks, passes on, and passes bytes back.

Pictures that came in a body go into this process' arena and stay there until the request is over: a retry READs them
again. Only handles travel on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.requests import ClientDisconnect

from components.beside_chat import BesideChat, first_reply
from components.embed_worker import EmbedWorker
from components.image_worker import ImageWorker
from components.planner import Planner
from components.processor import REFERENCE, Processor
from components.protocol import (
    HealthQuery,
    HttpRequest,
    ModelsQuery,
    Picture,
)
from dynamo_epd.errors import EpdError, InternalError, NotFound, Overloaded
from dynamo_epd.flights import Flights
from dynamo_epd.http.auth import AuthConfig, Callers, Keys, Signer, signing_key
from dynamo_epd.http.body import (
    BodyLimits,
    ChatBody,
    CompletionBody,
    ImageRef,
    chat_fields,
    check_chat,
    check_completion,
    completion_fields,
)
from dynamo_epd.http.embeddings import EMBEDDINGS
from dynamo_epd.http.errors import error_event
from dynamo_epd.http.held import HeldStream
from dynamo_epd.http.images import IMAGES, JOB
from dynamo_epd.http.limits import RequestBounds, guard, request_log
from dynamo_epd.http.openapi import describe
from dynamo_epd.http.predict import PREDICT
from dynamo_epd.http.rates import Rates
from dynamo_epd.http.strict_json import LARGE_BODY, parsed
from dynamo_epd.http.validations import VALIDATIONS
from dynamo_epd.images.addresses import check_url
from dynamo_epd.images.config import MediaConfig
from dynamo_epd.images.data_url import parse_data_url
from dynamo_epd.jobs import JobsConfig
from dynamo_epd.page.mount import PATH, Page, PageSettings
from dynamo_epd.sdk import async_on_start, depends, dynamo_context, on_shutdown, service, service_config
from dynamo_epd.sdk.client import Policy, twice
from dynamo_epd.sdk.http_server import TlsConfig
from dynamo_epd.store import StoreConfig
from dynamo_epd.transfer.slots import MAX_LEASE_SECONDS

HEALTH_SECONDS = 2.0
"""A processor that does not say within this long how its stages are counts as gone."""
LAST_BYTES_SECONDS = 30.0
"""After a request's deadline, for what is on its way to the client: then its place is another's."""
HEALTH_KEPT = 0.5
"""Seconds that one answer of ``/health`` is given to all: the route is open, and each look costs a processor work."""


@dataclass(frozen=True)
class Admission:
    """How much is taken on at once."""

    max_in_flight: int = 256
    """Requests of one frontend worker; one more is refused."""
    deadline: float = 300.0
    """Seconds that one request may take, and that its pictures are leased for."""
    max_readers: int = 128
    """Stored pictures that are sent at once; each has a megabyte or two in memory. Whoever has an address may read half
    a kilobyte a second: that keeps other readers out, and nobody who asks for work. Together with ``max-in-flight`` it
    is half of the connections that a process takes where it may open 1024 files."""

    @property
    def to_read(self) -> float:
        """Seconds for a stream, its last bytes on their way to a slow reader included."""
        return self.deadline + LAST_BYTES_SECONDS

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "max_readers"):
            if getattr(self, name) < 1:
                raise ValueError(f"admission.{name.replace('_', '-')} must be 1 at least")
        if not 0 < self.deadline <= MAX_LEASE_SECONDS:
            raise ValueError(f"admission.deadline must be above 0 and at most {MAX_LEASE_SECONDS:g}")


@dataclass(frozen=True)
class Limits:
    """What one tenant may ask of one worker of the frontend; without keys everyone is one tenant."""

    requests_per_minute: int | None = None
    """As many may come at once after a minute of rest. Default: any number."""
    concurrent: int | None = None
    """Requests at once, streams until their end. Default: any number."""
    body_bytes: int = 64 * 1024 * 1024
    """Of one request."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "concurrent", "body_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"limits.{name.replace('_', '-')} must be 1 at least")


@dataclass(frozen=True)
class Routing:
    """How a worker of each stage is chosen that the frontend asks by itself."""

    processor: Policy = "least-loaded"
    """Or ``round-robin``, as of all stages."""
    image: Policy = "least-loaded"
    """For pictures that no validation asks for."""
    embed: Policy = "least-loaded"
    """For embeddings that no validation asks for."""


@dataclass(frozen=True)
class FrontendConfig:
    """Keys of the ``Frontend`` section."""

    routing: Routing = field(default_factory=Routing)
    arena_bytes: int = 256 * 1024 * 1024
    """Pictures that came in the bodies of requests that are running."""
    media: MediaConfig = field(default_factory=MediaConfig)
    admission: Admission = field(default_factory=Admission)
    limits: Limits = field(default_factory=Limits)
    auth: AuthConfig | None = None
    """Who may ask. Default: everyone who reaches the port."""
    tls: TlsConfig | None = None
    """Default: HTTP without TLS."""
    ui: bool = True
    """Whether there is a page for browsers at ``/ui``."""
    store: StoreConfig = field(default_factory=StoreConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    public_url: str | None = None
    """Under which clients reach this frontend, for the addresses of pictures. Default: as the request came."""

    @property
    def request_seconds(self) -> float:
        return self.admission.to_read


CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; only metrics and log ever see it."""

app = FastAPI(title="dynamo-epd", docs_url=None, redoc_url=None)

BODIES = {
    "/v1/chat/completions": chat_fields(BodyLimits()).schema,
    "/v1/completions": completion_fields(BodyLimits()).schema,
    "/v1/embeddings": EMBEDDINGS.schema,
    "/v1/images/generations": IMAGES.schema,
    "/v1/images/jobs": JOB.schema,
    "/v1/models/{model}:predict": PREDICT.schema,
    "/v1/validations": VALIDATIONS.schema,
}
"""Of the routes that read one, as ``/openapi.json`` has them."""

ANSWERS: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/images/jobs"): {"status_code": 202},
    ("POST", "/text-to-image"): {"status_code": 202},
    ("GET", "/v1/images/{id}"): {"response_class": Response, "responses": {200: {"content": {"image/*": {}}}}},
    ("GET", "/metrics"): {"response_class": PlainTextResponse},
}
"""What ``/openapi.json`` says of an answer that is not 200 with JSON."""


@service(dynamo={"namespace": "dynamo"}, config=FrontendConfig, app=app)
class Frontend(BesideChat):
    """OpenAI's routes for the stages that the graph links, ``/health``, ``/live`` and ``/metrics``."""

    reads = ("ImageWorker",)

    processor = depends(Processor)
    embed_worker = depends(EmbedWorker)
    image_worker = depends(ImageWorker)
    planner = depends(Planner)

    def __init__(self) -> None:
        self.config = service_config(FrontendConfig)
        self.in_flight = 0
        self._looks: Flights[None] = Flights()
        self._named: Flights[dict[str, Any]] = Flights()
        self._health: tuple[bool, dict[str, int]] = (False, {})
        self._looked = -math.inf
        for path, route, method in (
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.complete, "POST"),
            ("/v1/embeddings", self.embed, "POST"),
            ("/v1/images/generations", self.generate_images, "POST"),
            ("/v1/images/jobs", self.submit_job, "POST"),
            ("/v1/images/jobs/{id}", self.job, "GET"),
            ("/v1/images", self.pictures, "GET"),
            ("/v1/images/{id}", self.picture, "GET"),
            ("/v1/images/{id}", self.picture, "HEAD"),
            ("/v1/images/{id}", self.remove_picture, "DELETE"),
            ("/text-to-image", self.text_to_image, "POST"),
            ("/results/{id}", self.result, "GET"),
            ("/v1/models/{model}:predict", self.predict, "POST"),
            ("/v1/validations", self.validate, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/health", self.health, "GET"),
            ("/live", self.live, "GET"),
            ("/metrics", self.scrape, "GET"),
        ):
            said = ANSWERS.get((method, path), {})
            app.add_api_route(path, route, methods=[method], response_model=None, **said)
        describe(app, BODIES, keys=self.config.auth is not None)
        self.page = Page()
        if self.config.ui:
            app.mount(PATH, self.page)
        limits, auth = self.config.limits, self.config.auth
        self.signer = Signer(signing_key(auth.signing_key_file)) if auth else None
        guard(
            app,
            RequestBounds(body_bytes=limits.body_bytes),
            Callers(Keys(auth.keys_file) if auth else None, self.signer),
            Rates(limits.requests_per_minute, limits.concurrent),
        )

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.metrics import Metrics

        routing = self.config.routing
        self.processor.route(routing.processor)
        self.image_worker.route(routing.image)
        self.embed_worker.route(routing.embed)
        metrics = Metrics(dynamo_context["namespace"], "Frontend", "")
        self.metrics = metrics.requests()
        await self.open_arena(self.config.arena_bytes)
        if self.image_worker:
            await self.open_results(metrics)
        metrics.watch_arena(self.arena.stats, cache=False)
        if self.config.ui and self._tabs():
            settings = PageSettings.of_worker(
                tabs=self._tabs(),
                deadline=self.config.admission.deadline,
                upload_bytes=self.config.media.max_bytes,
                cert_file=self.config.tls.cert_file if self.config.tls else None,
            )
            self.page.open(settings, dynamo_context.get("stopping"))

    def _tabs(self) -> list[str]:
        """Of the page."""
        chat, pictures = bool(self.processor), bool(self.image_worker)
        linked = {"validate": chat and pictures and bool(self.embed_worker), "chat": chat, "gallery": pictures}
        return [name for name, there in linked.items() if there]

    @on_shutdown
    async def stop(self) -> None:
        await self.page.close()
        if self.image_worker:
            await self.close_results()
        await self.close_arena()

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        limits = BodyLimits(max_images=self.config.media.max_images)
        return await self._answer(request, self._chain().chat, lambda body: check_chat(body, limits))

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        limits = BodyLimits()
        return await self._answer(request, self._chain().complete, lambda body: check_completion(body, limits))

    def _chain(self) -> Any:
        """The processor, where the graph links one."""
        if not self.processor:
            raise NotFound("this graph has no chat model")
        return self.processor

    async def models(self) -> Response:
        """``GET /v1/models``: of every linked stage that clients name a model to. However many ask, the stages are
        asked once at a time."""
        return JSONResponse(await self._named.join("models", self._models))

    async def _models(self) -> dict[str, Any]:
        query = ModelsQuery()
        models: dict[str, Any] = {"object": "list", "data": []}
        if self.processor:
            reply = await twice(lambda: self.processor.models(query).only())
            models = json.loads(reply.body)
        for stage in self._beside():
            named = await self._asked(stage.models, query)
            models["data"] += [
                {"id": name, "object": "model", "created": 0, "owned_by": "dynamo-epd"} for name in named.names
            ]
        return models

    def _beside(self) -> list[Any]:
        """The linked stages beside the chat chain: without them chat goes on."""
        return [stage for stage in (self.embed_worker, self.image_worker) if stage]

    async def health(self) -> Response:
        """``GET /health``, with every stage: 200 while the chat chain is whole, or all that a graph without one has."""
        if time.monotonic() > self._looked + HEALTH_KEPT:
            await self._looks.join("health", self._look)
        whole, stages = self._health
        return JSONResponse({"status": "ready" if whole else "unavailable", "stages": stages}, 200 if whole else 503)

    async def _look(self) -> None:
        """Finds whether what must be there is, and how many workers each linked stage has."""
        beside = {stage.name: len(stage.instances()) for stage in self._beside()}
        whole, stages = all(beside.values()), {"Frontend": 1}
        if self.processor:
            whole, chain = await self._look_at_chain()
            stages |= chain
        self._health, self._looked = (whole, stages | beside), time.monotonic()

    async def _look_at_chain(self) -> tuple[bool, dict[str, int]]:
        stages = {"Processor": len(self.processor.instances())}
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                stages |= (await twice(lambda: self.processor.health(HealthQuery()).only())).stages
        except (EpdError, TimeoutError):
            return False, stages
        return all(stages.values()), stages

    async def live(self) -> Response:
        """``GET /live``: this process answers."""
        return JSONResponse({"status": "live"})

    async def scrape(self) -> Response:
        """``GET /metrics``: this process' own; every other stage serves its own on its system port."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return PlainTextResponse(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(
        self, request: Request, stage: Callable[..., Any], check: Callable[[dict[str, Any]], ChatBody | CompletionBody]
    ) -> Response:
        """Checks a body and passes it to a processor. What the request holds is freed when its last byte is out."""
        async with AsyncExitStack() as held:
            account = held.enter_context(self.accounted(request.state.request_id))
            held.enter_context(self.admitted())
            deadline = time.time() + self.config.admission.deadline
            checked = await parsed(await request.body(), check)
            images = checked.images if isinstance(checked, ChatBody) else ()
            account.images = len(images)
            message = HttpRequest(
                request.state.request_id,
                request.state.tenant,
                checked.body,
                await held.enter_async_context(self._pictures(request, images, deadline)),
                deadline,
            )
            call, head = await self._in_time(request, first_reply(stage, message))
            await held.enter_async_context(aclosing(call))
            account.status = head.status or 500
            if head.body is not None:
                return Response(head.body, account.status, media_type="application/json")
            return HeldStream(
                events(call, account, head.event), held.pop_all(), account.status, seconds=self.config.admission.to_read
            )

    @contextmanager
    def accounted(self, request_id: str) -> Iterator[Account]:
        """Measures one request and writes its one line, whatever its end."""
        account, began = Account(), time.perf_counter()
        try:
            yield account
        except EpdError as error:
            account.status = error.status
            raise
        except ClientDisconnect:
            account.status = CLIENT_GONE
            raise
        except Exception:  # a defect, perhaps in the middle of a stream
            account.status = InternalError.status
            raise
        finally:
            seconds = time.perf_counter() - began
            self.metrics.duration.observe(seconds)
            self.metrics.count(account.status)
            request_log.info("%s %d images=%d %.0f ms", request_id, account.status, account.images, seconds * 1e3)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        if self.in_flight >= self.config.admission.max_in_flight:
            raise Overloaded(f"{self.in_flight} requests are being answered; try again later")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @asynccontextmanager
    async def _pictures(
        self, request: Request, images: tuple[ImageRef, ...], deadline: float
    ) -> AsyncIterator[list[Picture]]:
        """The request's pictures in order, those from the body leased until the request is over.

        The body's parts then say where in this list their picture is. All room is reserved at once.
        """
        pictures: list[Picture] = []
        bodies: list[tuple[int, bytes, str]] = []
        for index, image in enumerate(images):
            url = image.url
            if url[:5].lower() == "data:":
                bodies.append((index, *await decoded(url, self.config.media.max_bytes)))
                pictures.append(Picture())
            else:
                check_url(url, self.config.media)
                pictures.append(Picture(url=url))
            image.replace(f"{REFERENCE}{index}")
        if not bodies:
            yield pictures
            return
        seconds = max(0.0, deadline - time.time())
        with await self._in_time(request, self.arena.reserve([len(data) for _, data, _ in bodies], seconds)) as slots:
            leases = []
            try:
                for slot, (index, data, content) in zip(slots, bodies, strict=True):
                    slot.write(data)
                    handle = self.arena.lease(slot.publish(), seconds, ends_on_read=False)
                    leases.append(handle.lease)
                    pictures[index] = Picture(handle=handle, content=content)
                yield pictures
            finally:
                for lease in leases:
                    self.arena.release(lease)


@dataclass
class Account:
    """How one request ended, as its metrics and its line in the log say it."""

    status: int = 500
    images: int = 0


async def decoded(url: str, max_bytes: int) -> tuple[bytes, str]:
    """The bytes of a ``data:`` URL and their SHA-256 in hex; large ones are decoded in a thread."""

    def both() -> tuple[bytes, str]:
        data = parse_data_url(url, max_bytes)
        return data, hashlib.sha256(data).hexdigest()

    return await asyncio.to_thread(both) if len(url) > LARGE_BODY else both()


async def events(call: Any, account: Account, first: str | None = None) -> AsyncGenerator[bytes, None]:
    """A stream, of which ``first`` is there. Where it breaks off it ends in an error event, and not in silence."""
    try:
        if first is not None:
            yield first.encode()
        async for reply in call:
            yield reply.event.encode()
    except EpdError as error:
        account.status = error.status
        yield error_event(error)
