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

from components.protocol import Done, Embedded, EmbedRequest, Generated, GenerateRequest, HttpRequest, ValidateRequest
from components.validation import Validation, ValidationConfig

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

    def __init__(self, caption: str | None):
        self._caption = caption
        self.texts: list[str] = []
        self.image_worker = SimpleNamespace(
            generate=lambda _: CallDouble(Generated(1, 1, 8, 8, done=Done("m", 1, 1, 0.0, 0.0)))
        )
        self.embed_worker = SimpleNamespace(embed=self._embed)

    def _embed(self, request: EmbedRequest) -> CallDouble:
        self.texts += request.texts
        vectors = [PROMPT if text == "prompt" else OTHER for text in request.texts]
        return CallDouble(Embedded(vectors, [1], "m", 0.25, 0.5))

    async def answered(self, _: HttpRequest) -> tuple[str, float]:
        return json.dumps({"choices": [{"message": {"content": self._caption}}]}), 0.0


def validated(processor: ProcessorDouble) -> list[Any]:
    async def main() -> list[Any]:
        until = time.time() + 60
        request = ValidateRequest("id", "", GenerateRequest("id", "prompt", 1, deadline=until), None, until)
        return [one async for one in Validation(processor, request).results()]  # type: ignore[arg-type]

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
