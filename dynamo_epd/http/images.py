# SPDX-License-Identifier: Apache-2.0
"""``/v1/images/generations``: what its body may say, its reply and its events."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.fields import Check, Fields, boolean, integer, number, object_of, one_of, only, text

MAX_PROMPT = 32_000
"""Characters, as at OpenAI's."""
MAX_IMAGES = 10
MAX_PARTIAL = 3
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1

Format = Literal["png", "webp", "jpeg"]


@dataclass(frozen=True)
class WantedPicture:
    """What a body says of its picture. None leaves a value to the image worker."""

    prompt: str
    model: str | None
    size: str | None
    quality: str | None
    format: Format
    compression: int
    steps: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    lora: str | None
    seed: int
    """Of the first picture; drawn where the client gives none. The k-th picture after it has this plus k."""


@dataclass(frozen=True)
class ImagesBody:
    """A body that passed."""

    picture: WantedPicture
    n: int
    stream: bool
    partial_images: int
    as_url: bool
    """Whether the client wants an address instead of the bytes."""


_OWN: dict[str, Check] = {
    "negative_prompt": text(0, MAX_PROMPT),
    "num_inference_steps": integer(1, MAX_STEPS),
    "guidance_scale": number(0, 100),
    "seed": integer(0, MAX_SEED),
    "lora": text(1, 256),
}
"""What diffusion has and OpenAI's API lacks: at the top, or under ``nvext``."""


PICTURE: dict[str, Check] = {
    "prompt": text(1, MAX_PROMPT),
    "model": text(1, 256),
    "n": integer(1, MAX_IMAGES),
    "size": text(1, 32),
    "quality": text(1, 32),
    "output_format": one_of("png", "webp", "jpeg"),
    "output_compression": integer(0, 100),
    "stream": boolean,
    "response_format": one_of("b64_json", "url"),
    "nvext": object_of(_OWN),
    **_OWN,
}
"""Fields of every body that asks for pictures."""


def wanted_picture(clean: dict[str, Any]) -> WantedPicture:
    """The picture of a body whose fields passed `PICTURE`."""
    clean = clean.get("nvext", {}) | clean
    if not clean.get("prompt", "").strip():
        raise InvalidRequest("'prompt' is required", param="prompt")
    if clean.get("stream") and clean.get("n", 1) > 1:
        raise InvalidRequest("a stream has one picture: 'n' must be 1", param="n")
    form: Format = clean.get("output_format", "png")
    if form == "png" and clean.get("output_compression", 100) != 100:
        raise InvalidRequest("'output_compression' is for webp and jpeg", param="output_compression")
    if clean.get("stream") and clean.get("response_format") == "url":
        raise InvalidRequest(
            "a stream carries its pictures: 'response_format' must be b64_json", param="response_format"
        )
    return WantedPicture(
        prompt=clean["prompt"],
        model=clean.get("model"),
        size=clean.get("size"),
        quality=clean.get("quality"),
        format=form,
        compression=clean.get("output_compression", 100),
        steps=clean.get("num_inference_steps"),
        guidance_scale=clean.get("guidance_scale"),
        negative_prompt=clean.get("negative_prompt"),
        lora=clean.get("lora"),
        seed=clean["seed"] if "seed" in clean else secrets.randbelow(2**32),
    )


IMAGES = Fields(
    PICTURE
    | {
        "partial_images": integer(0, MAX_PARTIAL),
        "background": one_of("auto", "opaque"),
        "moderation": one_of("auto", "low"),
    },
    required=("prompt",),
    nullable=("style",),
    needs={"partial_images": "stream"},
)
"""Of a body whose pictures are made at once."""

JOB = Fields(
    {
        **IMAGES.checks,
        "stream": only(
            False,
            lambda name: InvalidRequest("a job cannot be streamed: ask how it is at its own address", param=name),
        ),
        "response_format": only(
            "url", lambda name: InvalidRequest(f"a job's pictures are fetched: '{name}' must be url", param=name)
        ),
        "partial_images": only(
            0, lambda name: InvalidRequest(f"a job is not streamed: '{name}' must be 0", param=name)
        ),
    },
    required=IMAGES.required,
    nullable=IMAGES.nullable,
)
"""Of a body whose pictures are made later, and fetched by their addresses."""


def check_images(body: Mapping[str, Any]) -> ImagesBody:
    """Raises `UnsupportedParameter` for a field that is not honoured, `InvalidRequest` for a value out of bounds."""
    return _images_body(IMAGES.check(body))


def check_job(body: Mapping[str, Any]) -> ImagesBody:
    """A job's body. Raises what `check_images` raises."""
    return _images_body(JOB.check(body) | {"response_format": "url"})


def _images_body(clean: dict[str, Any]) -> ImagesBody:
    return ImagesBody(
        wanted_picture(clean),
        clean.get("n", 1),
        clean.get("stream", False),
        clean.get("partial_images", 0),
        clean.get("response_format") == "url",
    )


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt for the text encoder, and of the pictures for the denoiser."""

    prompt_tokens: int
    image_tokens: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.image_tokens + other.image_tokens)

    def to_openai(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"text_tokens": self.prompt_tokens, "image_tokens": 0},
            "output_tokens": self.image_tokens,
            "total_tokens": self.prompt_tokens + self.image_tokens,
        }


def images_reply(pictures: Sequence[dict[str, Any]], wanted: WantedPicture, size: str, usage: Usage) -> dict[str, Any]:
    """OpenAI's reply. ``pictures``: ``b64_json`` or ``url``, and the seed of each."""
    return {
        "created": int(time.time()),
        "data": list(pictures),
        "background": "opaque",
        "output_format": wanted.format,
        "quality": wanted.quality or "auto",
        "size": size,
        "usage": usage.to_openai(),
    }


def image_event(
    kind: Literal["partial_image", "completed"], file: bytes, wanted: WantedPicture, size: str, **more: Any
) -> bytes:
    """One server-sent event of OpenAI's image stream."""
    data = {
        "b64_json": base64.b64encode(file).decode(),
        "created_at": int(time.time()),
        "size": size,
        "quality": wanted.quality or "auto",
        "background": "opaque",
        "output_format": wanted.format,
        **more,
    }
    return event(f"image_generation.{kind}", data)


def event(name: str, data: dict[str, Any]) -> bytes:
    """A server-sent event that says its type in its data too, as OpenAI's do."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
