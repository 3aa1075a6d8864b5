# SPDX-License-Identifier: Apache-2.0
"""A validation: prompt → picture → caption → similarity. The processor conducts it stage by stage."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from components.giving_back import afterwards, drawing, give_back
from components.protocol import (
    PIXELS_SECONDS,
    Embedded,
    EmbedRequest,
    Generated,
    HttpRequest,
    Picture,
    ReleaseRequest,
    RenewRequest,
    Stage,
    Validated,
    ValidateRequest,
)
from dynamo_epd.errors import DeadlineExceeded, WorkerLost
from dynamo_epd.sdk.client import twice

if TYPE_CHECKING:
    from components.processor import Processor

REFERENCE = "image:0"


@dataclass(frozen=True)
class ValidationConfig:
    """How a made picture is described and judged (key ``validation``)."""

    threshold: float = 0.8
    """Cosine similarity of prompt and caption from which a picture is right."""
    question: str = "Describe the picture."
    """That the chat model is asked about each picture."""
    max_tokens: int = 128
    """Of its answer."""


class Validation:
    """One validation while it runs."""

    def __init__(self, processor: Processor, request: ValidateRequest):
        self._processor = processor
        self._request = request
        self._config = processor.config.validation

    async def results(self) -> AsyncGenerator[Validated, None]:
        """Each stage's result as it comes: image, caption, similarity. A lost worker is asked again elsewhere, once."""
        prompt = self._request.picture.prompt
        # Where the embed worker conditions the picture, that one call gives the prompt's vector too.
        ahead = None if self._processor.conditioned else asyncio.create_task(self._embed(prompt))
        worker = None
        try:
            async with asyncio.timeout(self._request.deadline - time.time()):
                made, worker = await twice(self._picture)
                assert made.done is not None
                assert made.pixels is not None
                renewing = asyncio.create_task(self._renew(made.pixels.lease, worker))
                try:
                    yield Validated(Stage("image", made.done.queue_seconds, made.done.run_seconds), picture=made)
                    caption, stage = await self._caption(made)
                finally:
                    renewing.cancel()
                    self._release(worker, ReleaseRequest([made.pixels.lease]))
                yield Validated(stage, caption=caption)
                said = await self._embed(caption) if caption else None  # of no text there is no vector
                vector = made.done.prompt_vector or (await (ahead or self._embed(prompt))).vectors[0]
                yield Validated(
                    Stage("similarity", said.queue_seconds if said else 0.0, said.run_seconds if said else 0.0),
                    similarity=cosine(vector, said.vectors[0]) if said else 0.0,
                    threshold=self._threshold,
                    prompt_vector=vector,
                    caption_vector=said.vectors[0] if said else None,
                )
        except (asyncio.CancelledError, GeneratorExit, TimeoutError) as error:
            if worker is not None:  # the client's file may lie there unread
                self._release(worker, ReleaseRequest(request_ids=[self._request.picture.request_id]))
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time is up") from error
            raise
        finally:
            if ahead is not None:
                ahead.cancel()

    @property
    def _threshold(self) -> float:
        return self._config.threshold if self._request.threshold is None else self._request.threshold

    async def _picture(self) -> tuple[Generated, int]:
        """The picture, and the worker that keeps its pixels."""
        image_worker, picture = self._processor.image_worker, self._request.picture
        call = image_worker.generate(msgspec.structs.replace(picture, pixels=True))
        async with drawing(image_worker, call, picture.request_id):
            async for reply in call:
                if reply.done is not None:
                    return reply, call.instance
        raise WorkerLost("the ImageWorker ended without a picture")

    async def _caption(self, made: Generated) -> tuple[str, Stage]:
        began = perf_counter()
        part = {"type": "image_url", "image_url": {"url": REFERENCE}}
        content = [part, {"type": "text", "text": self._config.question}]
        asked = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": 0,
        }
        request = HttpRequest(
            f"{self._request.request_id}-caption",
            self._request.tenant,
            asked,
            [Picture(handle=made.pixels)],
            self._request.deadline,
        )
        body, queued = await self._processor.answered(request)
        caption = (json.loads(body)["choices"][0]["message"]["content"] or "").strip()
        return caption, Stage("caption", queued, perf_counter() - began - queued)

    async def _embed(self, text: str) -> Embedded:
        request = EmbedRequest(self._request.request_id, [text])
        found: Embedded = await twice(lambda: self._processor.embed_worker.embed(request).only())
        return found

    async def _renew(self, lease: str, worker: int) -> None:
        """Until it is cancelled. Two renewals in a row may be lost."""
        while True:
            await asyncio.sleep(PIXELS_SECONDS / 3)
            await give_back(self._processor.image_worker.renew(RenewRequest(lease), instance=worker))

    def _release(self, worker: int, request: ReleaseRequest) -> None:
        afterwards(give_back(self._processor.image_worker.release(request, instance=worker)))


def cosine(one: bytes, other: bytes) -> float:
    """Of two vectors of length 1, little-endian float32."""
    return sum(a * b for a, b in zip(array("f", one), array("f", other), strict=True))
