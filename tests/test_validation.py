# SPDX-License-Identifier: Apache-2.0
"""What a validation makes of unusual captions; whole ones run on a graph (test_validations.py)."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from components import validation
from components.protocol import (
    Completed,
    Done,
    Embedded,
    EmbedRequest,
    Generated,
    GenerateRequest,
    Handle,
    HttpRequest,
    ReleaseRequest,
    RenewRequest,
    ValidateRequest,
)
from components.validation import Validation, ValidationConfig

PIXELS = Handle("a/b/1", "incarnation", "lease", 0, 192, (8, 8, 3), "uint8", "", 0.0, ends_on_read=False)
PROMPT, OTHER = array("f", [1, 0]).tobytes(), array("f", [0.6, 0.8]).tobytes()


class CallDouble:
    """A call that has its one reply."""

    instance = 1

    def __init__(self, reply: Any):
        self._replies = [reply]

    def __aiter__(self) -> CallDouble:
        return self

    async def __anext__(self) -> Any:
        if not self._replies:
            raise StopAsyncIteration
        return self._replies.pop()

    async def aclose(self) -> None:
        pass

    async def only(self) -> Any:
        return self._replies.pop()


class ProcessorDouble:
    """Its stages make any picture, caption it as they are told, and embed every text but the empty one."""

    config = SimpleNamespace(validation=ValidationConfig(threshold=0.5))
    conditioned = False

    def __init__(self, caption: str | None, seconds: float = 0.0):
        self._caption = caption
        self._seconds = seconds
        self.texts: list[str] = []
        self.said: list[Any] = []
        """To the worker that keeps the pixels."""
        made = Generated(1, 1, 8, 8, pixels=PIXELS, done=Done("m", 1, 1, 0.0, 0.0))
        self.image_worker = SimpleNamespace(generate=lambda _: CallDouble(made), renew=self._say, release=self._say)
        self.embed_worker = SimpleNamespace(embed=self._embed)

    def _say(self, request: Any, *, instance: int) -> CallDouble:
        assert instance == CallDouble.instance
        self.said.append(request)
        return CallDouble(Completed())

    def _embed(self, request: EmbedRequest) -> CallDouble:
        self.texts += request.texts
        vectors = [PROMPT if text == "prompt" else OTHER for text in request.texts]
        return CallDouble(Embedded(vectors, [1], "m", 0.25, 0.5))

    async def answered(self, _: HttpRequest) -> tuple[str, float]:
        await asyncio.sleep(self._seconds)
        return json.dumps({"choices": [{"message": {"content": self._caption}}]}), 0.0


def validated(processor: ProcessorDouble) -> list[Any]:
    async def main() -> list[Any]:
        until = time.time() + 60
        request = ValidateRequest("id", "", GenerateRequest("id", "prompt", 1, deadline=until), None, until)
        results = [one async for one in Validation(processor, request).results()]  # type: ignore[arg-type]
        await asyncio.sleep(0.1)  # what is given back is given back afterwards
        return results

    return asyncio.run(main())


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_model_that_says_nothing_of_a_picture_is_a_mismatch(caption: str | None) -> None:
    processor = ProcessorDouble(caption)
    _, captioned, compared = validated(processor)
    assert captioned.caption == ""
    assert (compared.similarity, compared.threshold) == (0.0, 0.5)
    assert (compared.prompt_vector, compared.caption_vector) == (PROMPT, None)
    assert processor.texts == ["prompt"], "no empty text is embedded"


def test_a_caption_is_compared_without_the_space_around_it() -> None:
    processor = ProcessorDouble(" other ")
    _, captioned, compared = validated(processor)
    assert captioned.caption == "other"
    assert compared.similarity == pytest.approx(0.6)
    assert (compared.stage.queue_seconds, compared.stage.run_seconds) == (0.25, 0.5)
    assert compared.caption_vector == OTHER
    assert sorted(processor.texts) == ["other", "prompt"]


def test_pixels_are_renewed_while_they_may_be_read_and_then_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are not held until the request's deadline for a processor that died."""
    monkeypatch.setattr(validation, "PIXELS_SECONDS", 0.3)
    processor = ProcessorDouble("other", seconds=0.5)
    validated(processor)
    *renewed, last = processor.said
    assert len(renewed) >= 2
    assert set(renewed) == {RenewRequest("lease")}
    assert last == ReleaseRequest(["lease"])
