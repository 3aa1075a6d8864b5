# SPDX-License-Identifier: Apache-2.0
"""Routes of the stages beside the chat chain: embeddings, pictures, validations. Part of the `Frontend`."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from components.giving_back import afterwards, drawing, give_back
from components.image_worker import generate_request
from components.protocol import (
    EmbedRequest,
    Generated,
    GenerateRequest,
    ModelsQuery,
    ReleaseRequest,
    Validated,
    ValidateRequest,
)
from components.results import Results
from dynamo_epd.errors import (
    DeadlineExceeded,
    EpdError,
    ModelNotFound,
    NotFound,
    WorkerLost,
)
from dynamo_epd.exchange import ArenaOwner, instance_of
from dynamo_epd.http.embeddings import check_embeddings, embeddings_reply
from dynamo_epd.http.errors import error_event
from dynamo_epd.http.held import HeldStream
from dynamo_epd.http.images import (
    Usage,
    WantedPicture,
    check_images,
    event,
    image_event,
    images_reply,
)
from dynamo_epd.http.predict import check_predict, predicted_pictures, predicted_texts
from dynamo_epd.http.strict_json import parsed
from dynamo_epd.http.validations import ValidationsBody, check_validations
from dynamo_epd.sdk.client import twice
from dynamo_epd.store import new_id

if TYPE_CHECKING:
    from components.frontend import Account

Result = TypeVar("Result")

READ_SECONDS = 30.0
"""For the READ of one picture from its image worker."""
LAST_WORD_SECONDS = 0.5
"""After a request's deadline. Each stage says for itself that the time is up; what does not, a READ or a store that
hangs, is not waited for any longer."""


class BesideChat(Results, ArenaOwner):
    """What the `Frontend` answers by stages that a graph may link or not."""

    processor: Any

    async def embed(self, request: Request) -> Response:
        """``POST /v1/embeddings``, in a graph with an embed worker."""
        if not self.embed_worker:
            raise NotFound("this graph has no embedding model")
        async with AsyncExitStack() as held:
            account = held.enter_context(self.accounted(request.state.request_id))
            held.enter_context(self.admitted())
            body = await parsed(await request.body(), check_embeddings)
            message = EmbedRequest(request.state.request_id, list(body.texts), body.model)
            found = await self._in_time(request, self._asked(self.embed_worker.embed, message))
            pieces = embeddings_reply(found.vectors, found.tokens, found.model, encoded=body.base64)
            account.status = 200
            return HeldStream(
                pieces,
                held.pop_all(),
                headers={"content-type": "application/json"},
                seconds=self.config.admission.to_read,
            )

    async def generate_images(self, request: Request) -> Response:
        """``POST /v1/images/generations``, in a graph with an image worker. Several pictures go to several workers."""
        if not self.image_worker:
            raise NotFound("this graph has no image model")
        async with AsyncExitStack() as held:
            account = held.enter_context(self.accounted(request.state.request_id))
            held.enter_context(self.admitted())
            body = await parsed(await request.body(), check_images)
            wanted, account.images = body.picture, body.n
            messages = [
                self._generate(request, wanted, index, partial_images=body.partial_images, as_url=body.as_url)
                for index in range(body.n)
            ]
            if body.stream:
                around, call, head = await self._in_time(request, first_drawn(self.image_worker, messages[0]))
                await held.enter_async_context(around)
                account.status = 200
                stream = self._image_events(chained(head, call), wanted, account)
                return HeldStream(stream, held.pop_all(), seconds=self.config.admission.to_read)
            made = await self._in_time(request, all_of(self._picture(request, message) for message in messages))
            account.status = 200
            usage = sum((usage_of(last) for _, last in made[1:]), usage_of(made[0][1]))
            pictures = [shown | {"seed": one.seed} for (shown, _), one in zip(made, messages, strict=True)]
            return JSONResponse(images_reply(pictures, wanted, size_of(made[0][1]), usage))

    async def validate(self, request: Request) -> Response:
        """``POST /v1/validations``, in a graph with a processor, image and embed workers."""
        if not (self.processor and self.image_worker and self.embed_worker):
            raise NotFound("this graph lacks the model for images, for chat or for embeddings")
        async with AsyncExitStack() as held:
            account = held.enter_context(self.accounted(request.state.request_id))
            held.enter_context(self.admitted())
            body = await parsed(await request.body(), check_validations)
            account.images = body.n
            messages = [
                ValidateRequest(
                    f"{request.state.request_id}-{index}", picture.tenant, picture, body.threshold, picture.deadline
                )
                for index, picture in enumerate(
                    self._generate(request, body.picture, k, as_url=body.as_url) for k in range(body.n)
                )
            ]
            if body.stream:
                call, head = await self._in_time(request, first_reply(self.processor.validate, messages[0]))
                await held.enter_async_context(aclosing(call))
                account.status = 200
                stream = self._validation_events(request, chained(head, call), messages[0], body, account)
                return HeldStream(stream, held.pop_all(), seconds=self.config.admission.to_read)
            found = await self._in_time(
                request, all_of(self._validated(request, message, body) for message in messages)
            )
            account.status = 200
            return JSONResponse(
                {
                    "id": f"val-{uuid.uuid4().hex}",
                    "object": "validation",
                    "created": int(time.time()),
                    "prompt": body.picture.prompt,
                    "data": found,
                }
            )

    async def predict(self, request: Request, model: str) -> Response:
        """``POST /v1/models/{model}:predict``."""
        with self.accounted(request.state.request_id) as account, self.admitted():
            began = time.time()  # to ask who serves the model takes of the request's time
            instances = await parsed(await request.body(), check_predict)
            if await self._serves(self.embed_worker, model):
                texts = check_embeddings({"input": predicted_texts(instances)}).texts
                message = EmbedRequest(request.state.request_id, list(texts), model)
                found = await self._in_time(request, self._asked(self.embed_worker.embed, message))
                predictions: list[Any] = [array("f", vector).tolist() for vector in found.vectors]
            elif await self._serves(self.image_worker, model):
                pictures = predicted_pictures(instances, model)
                account.images = len(pictures)
                until = began + self.config.admission.deadline
                messages = [
                    msgspec.structs.replace(self._generate(request, picture, 0), deadline=until) for picture in pictures
                ]
                made = await self._in_time(request, all_of(self._picture(request, message) for message in messages))
                predictions = [
                    {
                        "model_name": model,
                        "prompt": message.prompt,
                        "seed": message.seed,
                        "image": {"format": message.format.upper(), "b64": shown["b64_json"]},
                    }
                    for (shown, _), message in zip(made, messages, strict=True)
                ]
            else:
                raise ModelNotFound("there is no such image or embedding model", param="model")
            account.status = 200
            return JSONResponse({"predictions": predictions})

    async def _serves(self, stage: Any, model: str) -> bool:
        return bool(stage) and model in (await self._asked(stage.models, ModelsQuery())).names

    def _generate(
        self, request: Request, wanted: WantedPicture, index: int, *, partial_images: int = 0, as_url: bool = False
    ) -> GenerateRequest:
        """The message for the ``index``-th picture of a body."""
        message = generate_request(
            request.state.request_id, wanted, index, tenant=request.state.tenant, keep=new_id() if as_url else None
        )
        deadline = time.time() + self.config.admission.deadline
        return msgspec.structs.replace(message, partial_images=partial_images, deadline=deadline)

    async def _validated(self, request: Request, message: ValidateRequest, body: ValidationsBody) -> dict[str, Any]:
        """All stages of one validation as one object."""

        async def validated() -> dict[str, Any]:
            found: dict[str, Any] = {"seed": message.picture.seed}
            stages = []
            async with aclosing(self.processor.validate(message)) as call:
                async for result in call:
                    found |= await self._shown(request, result, body)
                    stages.append(stage_of(result))
            return found | {"stages": stages}

        found = await twice(validated)
        await self._noted(message, found)
        return found

    async def _noted(self, message: ValidateRequest, found: dict[str, Any]) -> None:
        """Lays what a validation found beside the picture, where that is kept: for galleries."""
        if message.picture.keep is not None:
            about: dict[str, Any] = {
                name: found[name] for name in ("caption", "similarity", "threshold", "verdict") if name in found
            }
            with suppress(EpdError):  # the client has its answer all the same
                await self.store.annotate(message.tenant, message.picture.keep, about)

    async def _shown(self, request: Request, result: Validated, body: ValidationsBody) -> dict[str, Any]:
        """One stage's result as a client sees it."""
        if result.picture is not None:
            return await self._file_of(request, result.picture) | {
                "output_format": body.picture.format,
                "size": size_of(result.picture),
            }
        if result.caption is not None:
            return {"caption": result.caption}
        assert result.similarity is not None
        assert result.threshold is not None
        shown: dict[str, Any] = {
            "similarity": round(result.similarity, 6),
            "threshold": result.threshold,
            "verdict": "match" if result.similarity >= result.threshold else "mismatch",
        }
        if body.include_embeddings:
            shown["prompt_embedding"] = array("f", result.prompt_vector or b"").tolist()
            shown["caption_embedding"] = array("f", result.caption_vector or b"").tolist()
        return shown

    async def _validation_events(
        self,
        request: Request,
        results: AsyncIterator[Validated],
        message: ValidateRequest,
        body: ValidationsBody,
        account: Account,
    ) -> AsyncGenerator[bytes, None]:
        """An event a stage, the moment its result is there. Where it breaks off it ends in an error event."""
        try:
            found: dict[str, Any] = {}
            async for result in results:
                shown = await self._shown(request, result, body)
                found |= shown
                data = {"seed": message.picture.seed, **shown, "stage": stage_of(result)}
                yield event(f"validation.{result.stage.name}", data)
            await self._noted(message, found)
        except EpdError as error:
            account.status = error.status  # 200 has been sent; what is counted and logged is how it ended
            yield error_event(error)

    async def _picture(self, request: Request, message: GenerateRequest) -> tuple[dict[str, Any], Generated]:
        """A picture as a client gets it, and the worker's last word on it."""

        async def made() -> tuple[dict[str, Any], Generated]:
            call = self.image_worker.generate(message)
            async with drawing(self.image_worker, call, message.request_id):
                async for reply in call:
                    if reply.done is not None:
                        return await self._file_of(request, reply), reply
            raise WorkerLost("the ImageWorker ended without a picture")

        return await twice(made)

    async def _file_of(self, request: Request, reply: Generated) -> dict[str, Any]:
        """``url`` of a picture that is kept, ``b64_json`` of one that is not."""
        if reply.stored is not None:
            return {"id": reply.stored.id, "url": self.address_of(request, reply.stored)}
        return {"b64_json": base64.b64encode(await self._file(reply)).decode()}

    async def _file(self, reply: Generated) -> bytes:
        handle = reply.handle
        assert handle is not None
        try:
            async with self.arena.read([handle], timeout=READ_SECONDS) as (view,):
                return bytes(view)
        except (asyncio.CancelledError, EpdError):  # `drawing` spares what is asked for again, and sees no error event
            release = self.image_worker.release(ReleaseRequest([handle.lease]), instance=instance_of(handle))
            afterwards(give_back(release))
            raise

    async def _image_events(
        self, replies: AsyncIterator[Generated], wanted: WantedPicture, account: Account
    ) -> AsyncGenerator[bytes, None]:
        """Partial pictures as they come, then the picture. Where it breaks off it ends in an error event."""
        partial = 0
        try:
            async for reply in replies:
                if reply.handle is None:
                    continue
                file = await self._file(reply)
                if reply.done is None:
                    yield image_event("partial_image", file, wanted, size_of(reply), partial_image_index=partial)
                    partial += 1
                else:
                    usage = usage_of(reply).to_openai()
                    yield image_event("completed", file, wanted, size_of(reply), usage=usage)
        except EpdError as error:
            account.status = error.status  # 200 has been sent; what is counted and logged is how it ended
            yield error_event(error)

    async def _in_time(self, request: Request, work: Awaitable[Result]) -> Result:
        """`unless_gone`, for as long as a request has."""
        return await unless_gone(request, work, self.config.admission.deadline + LAST_WORD_SECONDS)

    async def _asked(self, stage: Callable[..., Any], message: Any) -> Any:
        """The one reply of a stage."""
        try:
            async with asyncio.timeout(self.config.admission.deadline):
                return await twice(lambda: stage(message).only())
        except TimeoutError as error:
            raise DeadlineExceeded("the request's time is up") from error


def stage_of(result: Validated) -> dict[str, Any]:
    stage = result.stage
    return {"name": stage.name, "queue_seconds": stage.queue_seconds, "run_seconds": stage.run_seconds}


def size_of(reply: Generated) -> str:
    return f"{reply.width}x{reply.height}"


def usage_of(reply: Generated) -> Usage:
    assert reply.done is not None
    return Usage(reply.done.prompt_tokens, reply.done.image_tokens)


async def all_of(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def chained(head: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield head
    async for reply in rest:
        yield reply


async def first_reply(stage: Callable[..., Any], message: Any) -> tuple[Any, Any]:
    """The call and its first reply."""

    async def begun() -> tuple[Any, Any]:
        call = stage(message)
        try:
            return call, await anext(call)
        except BaseException:
            await call.aclose()
            raise

    return await twice(begun)


async def first_drawn(image_worker: Any, message: GenerateRequest) -> tuple[AsyncExitStack, Any, Generated]:
    """The first reply of a call for a picture, and the call within its `drawing`: that reply may hand over a partial
    picture already, and whoever leaves before it has heard of none."""

    async def begun() -> tuple[AsyncExitStack, Any, Generated]:
        call = image_worker.generate(message)
        async with AsyncExitStack() as around:
            await around.enter_async_context(drawing(image_worker, call, message.request_id))
            head = await anext(call)
            return around.pop_all(), call, head

    return await twice(begun)


async def unless_gone(request: Request, work: Awaitable[Result], seconds: float) -> Result:
    """The result of ``work``, which is cancelled when the client goes away first, or ``seconds`` have gone. Raises
    ClientDisconnect or DeadlineExceeded then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(request.receive())
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise DeadlineExceeded("the request's time is up")
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
