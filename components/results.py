# SPDX-License-Identifier: Apache-2.0
"""Routes of what stays: jobs, stored pictures, and the thin routes of older systems. Part of the `Frontend`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Query, Request
from fastapi.responses import JSONResponse, Response

from components.image_worker import generate_request
from dynamo_epd.errors import EpdError, InvalidRequest, NotFound, Overloaded, StageUnavailable, WorkerLost
from dynamo_epd.http.auth import Signer
from dynamo_epd.http.files import plan
from dynamo_epd.http.held import HeldStream
from dynamo_epd.http.images import PICTURE, ImagesBody, check_job
from dynamo_epd.http.strict_json import parsed
from dynamo_epd.job import JobState
from dynamo_epd.jobs import JobQueue
from dynamo_epd.page.graph_api import HERE
from dynamo_epd.sdk import dynamo_context
from dynamo_epd.sdk.nats import nats_url
from dynamo_epd.store import Store, Stored

if TYPE_CHECKING:
    from components.frontend import Account, FrontendConfig

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
MOST_LISTED = 100
CHECK_SECONDS = 2.0
"""For an image worker to look at a job before it is accepted. One that says nothing in time does not hold it up."""

Prompt = Annotated[str, Query(json_schema_extra=PICTURE["prompt"].schema)]

log = logging.getLogger(__name__)


class Results:
    """What the `Frontend` answers from the job queue and the object store."""

    config: FrontendConfig
    image_worker: Any
    embed_worker: Any
    store: Store
    jobs: JobQueue
    signer: Signer | None
    """None without keys: then addresses need no signature."""
    accounted: Callable[[str], AbstractContextManager[Account]]
    admitted: Callable[[], AbstractContextManager[None]]
    readers = 0
    """Pictures that are being sent."""

    async def open_results(self, metrics: Any) -> None:
        """Opens both, and begins to sweep."""
        self.store = Store(self.config.store, on_expired=metrics.expired().inc)
        self.jobs = JobQueue(dynamo_context["namespace"], self.config.jobs)
        await self.jobs.open(nats_url())
        self._sweeping = asyncio.create_task(self._sweep())

    async def close_results(self) -> None:
        self._sweeping.cancel()
        await self.jobs.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.store.sweep_seconds)
            try:
                expired = await self.store.sweep()
            except EpdError as error:
                log.warning("the store was not swept: %s", error)
            except Exception:  # nobody awaits this task: it must not end of a defect
                log.exception("the store was not swept")
            else:
                log.info("%d pictures expired", expired)

    def address_of(self, request: Request, stored: Stored) -> str:
        """Where anyone finds a picture of the request's tenant: in the store itself where that signs addresses and the
        client may go there, else here, signed where there are keys."""
        tenant = request.state.tenant
        direct = None if HERE in request.headers else self.store.address(stored, tenant)
        if direct is not None:
            return direct
        base = self.config.public_url or str(request.base_url)
        path = f"/v1/images/{stored.id}"
        query = ""
        if self.signer is not None:
            expires = min(stored.expires, time.time() + self.config.store.url_seconds)
            query = f"?{self.signer.query(tenant, path, math.floor(expires))}"
        return f"{base.rstrip('/')}{path}{query}"

    async def submit_job(self, request: Request) -> Response:
        """``POST /v1/images/jobs``: 202 once the queue has taken the job."""
        self._need_images()
        with self.accounted(request.state.request_id) as account, self.admitted():
            raw = await request.body()
            state = await self._submitted(request, account, await parsed(raw, check_job), raw)
            place = f"/v1/images/jobs/{state.id}"
            return JSONResponse(await self._shown_job(request, state), 202, headers={"Location": place})

    async def _submitted(self, request: Request, account: Account, body: ImagesBody, raw: bytes) -> JobState:
        account.images = body.n
        key = request.headers.get("idempotency-key")
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidRequest("an Idempotency-Key has 1 to 255 visible ASCII characters")
        message = generate_request(request.state.request_id, body.picture, 0, tenant=request.state.tenant, keep=None)
        # A worker refuses at once what it would refuse in its turn. Without one the job waits, as jobs do.
        with suppress(StageUnavailable, WorkerLost, TimeoutError):
            async with asyncio.timeout(CHECK_SECONDS):
                await self.image_worker.check(message).only()
        digest = hashlib.sha256(raw).hexdigest()
        state = await self.jobs.submit(request.state.tenant, body.picture, body.n, digest=digest, key=key)
        account.status = 202
        return state

    async def job(self, request: Request, id: str) -> Response:
        """``GET /v1/images/jobs/{id}``."""
        self._need_images()
        with self.admitted():
            return JSONResponse(await self._shown_job(request, await self.jobs.state(request.state.tenant, id)))

    async def _shown_job(self, request: Request, state: JobState) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "id": state.id,
            "object": "image.job",
            "created_at": int(state.created),
            "status": state.status,
            "prompt": state.prompt,
            "n": len(state.pictures),
            "attempts": state.attempts,
        }
        if state.ended is not None:
            shown["ended_at"] = int(state.ended)
        if state.error is not None:
            shown["error"] = state.error
        if state.status == "completed":
            shown["data"] = [self._shown_picture(request, one) for one in await self._still_there(state)]
        return shown

    async def _still_there(self, state: JobState) -> list[Stored]:
        found = []
        for name in state.pictures:
            with suppress(NotFound):  # deleted, or its time is over
                found.append(await self.store.head(state.tenant, name))
        return found

    def _shown_picture(self, request: Request, stored: Stored) -> dict[str, Any]:
        return {
            **stored.about,
            "id": stored.id,
            "object": "image",
            "url": self.address_of(request, stored),
            "created": int(stored.created),
            "expires": int(stored.expires),
            "bytes": stored.size,
            "media_type": stored.media_type,
        }

    async def pictures(self, request: Request, limit: int = 24) -> Response:
        """``GET /v1/images``: the newest stored pictures, with what is known of them."""
        self._need_images()
        if not 1 <= limit <= MOST_LISTED:
            raise InvalidRequest(f"'limit' must be from 1 to {MOST_LISTED}", param="limit")
        with self.admitted():
            found = await self.store.recent(request.state.tenant, limit)
            return JSONResponse({"object": "list", "data": [self._shown_picture(request, one) for one in found]})

    async def picture(self, request: Request, id: str) -> Response:
        """``GET`` and ``HEAD /v1/images/{id}``: the file, or the part of it that is asked for."""
        self._need_images()
        async with AsyncExitStack() as held:
            held.enter_context(self._sending())
            stored = await self.store.head(request.state.tenant, id)
            planned = plan(stored, request.headers, request.method)
            if request.method != "GET" or planned.end == planned.start:
                return Response(planned.body, planned.status, planned.headers)
            pieces = self.store.pieces(request.state.tenant, stored, planned.start, planned.end)
            await held.enter_async_context(aclosing(pieces))
            first = await anext(pieces)  # what cannot be read at all is an error, and no file that breaks off
            return HeldStream(begun(first, pieces), held.pop_all(), planned.status, planned.headers)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """A place among the readers until the last byte is taken. They have places of their own: who has an address and
        reads slowly must not keep those out who ask for work."""
        if self.readers >= self.config.admission.max_readers:
            raise Overloaded(f"{self.readers} pictures are being sent; try again later")
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    async def remove_picture(self, request: Request, id: str) -> Response:
        """``DELETE /v1/images/{id}``."""
        self._need_images()
        with self.admitted():
            await self.store.delete(request.state.tenant, id)
        return JSONResponse({"id": id, "object": "image", "deleted": True})

    async def text_to_image(self, request: Request, text: Prompt = "") -> Response:
        """``POST /text-to-image?text=``: a job by another name."""
        self._need_images()
        with self.accounted(request.state.request_id) as account, self.admitted():
            state = await self._submitted(request, account, check_job({"prompt": text}), text.encode())
        return JSONResponse({"job-id": state.id, "message": "the picture is being made"}, 202)

    async def result(self, request: Request, id: str) -> Response:
        """``GET /results/{uid}``: PENDING, SUCCESS with the picture's address, or ERROR with a message."""
        self._need_images()
        with self.admitted():
            state = await self.jobs.state(request.state.tenant, id)
            there = await self._still_there(state) if state.over and state.error is None else []
        if not state.over:
            return JSONResponse({"status": "PENDING", "message": f"the job is {state.status.replace('_', ' ')}"})
        if there:
            return JSONResponse({"status": "SUCCESS", "url": self.address_of(request, there[0])})
        message = state.error["message"] if state.error else "the picture is not kept any more"
        return JSONResponse({"status": "ERROR", "message": message})

    def _need_images(self) -> None:
        if not self.image_worker:
            raise NotFound("this graph has no image model")


async def begun(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for piece in rest:
        yield piece
