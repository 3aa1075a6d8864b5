# SPDX-License-Identifier: Apache-2.0
"""Every message that crosses a process, grouped by who receives it.

A message has only the fields that its receiver reads. Bytes never travel here: a `Handle` says where they can be READ.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from dynamo_epd.engine.delta import Delta, Reasoning, TokenLogprobs
from dynamo_epd.store import Stored
from dynamo_epd.transfer.handle import Handle

__all__ = [
    "Completed",
    "DecodeRequest",
    "Delta",
    "Done",
    "EmbedRequest",
    "Embedded",
    "EncodeRequest",
    "Encoded",
    "GenerateRequest",
    "Generated",
    "Handle",
    "HealthQuery",
    "HttpReply",
    "HttpRequest",
    "ModelNames",
    "ModelsQuery",
    "Picture",
    "PrefillReply",
    "PrefillRequest",
    "PromptImage",
    "RejectRequest",
    "ReleaseRequest",
    "RenewRequest",
    "Stage",
    "StageHealth",
    "States",
    "StatesRequest",
    "Stored",
    "TokenLogprobs",
    "ValidateRequest",
    "Validated",
]


class Picture(msgspec.Struct, frozen=True, omit_defaults=True):
    """A picture: an address; bytes that came in the body and lie in the frontend's arena; or the pixels of one that
    was made here, uint8 (height, width, 3), in an image worker's.

    ``content``: SHA-256 of those bytes, in hex. An embedding that is kept under it is found before they are READ.
    """

    url: str | None = None
    handle: Handle | None = None
    content: str | None = None

    @property
    def key(self) -> str:
        """Equal pictures have equal keys, so that they meet in one encode worker and find its cache."""
        return self.handle.digest if self.handle is not None else self.url or ""


# To a stage that answers clients


class ModelsQuery(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


# To the processor


class HttpRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A checked OpenAI body. Its ``image_url`` parts say ``image:<index into pictures>``."""

    request_id: str
    tenant: str
    body: dict[str, Any]
    pictures: list[Picture]
    deadline: float
    """Unix seconds."""


class HealthQuery(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


class ValidateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Make a picture of a prompt, describe it, and compare."""

    request_id: str
    tenant: str
    picture: GenerateRequest
    threshold: float | None
    """Similarity from which the picture is right; None leaves it to the processor's configuration."""
    deadline: float
    """Unix seconds."""


# To the frontend


class Stage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one stage of a validation took."""

    name: str
    queue_seconds: float
    run_seconds: float


class Validated(msgspec.Struct, frozen=True, omit_defaults=True):
    """One stage's result, the moment it is there; fields of other stages are empty."""

    stage: Stage
    picture: Generated | None = None
    caption: str | None = None
    similarity: float | None = None
    threshold: float | None = None
    prompt_vector: bytes | None = None
    caption_vector: bytes | None = None


class HttpReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """First a status, with the whole body or, of a stream, its first server-sent events; then those that follow."""

    status: int | None = None
    body: str | None = None
    event: str | None = None


class ModelNames(msgspec.Struct, frozen=True, omit_defaults=True):
    """What clients call the model of a stage; the first name is the one in replies."""

    names: list[str]

    @classmethod
    def of(cls, served_model_name: str | list[str] | None, model: str) -> ModelNames:
        """As a configuration says them."""
        names = served_model_name or model
        return cls([names] if isinstance(names, str) else names)


class StageHealth(msgspec.Struct, frozen=True, omit_defaults=True):
    """Live workers of each linked stage, by component name."""

    stages: dict[str, int]


# To an encode or image worker


class ReleaseRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Leases that nobody will READ any more, and requests whose callers left without a reply."""

    leases: list[str] = []
    request_ids: list[str] = []


class RenewRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lease on a picture's pixels that are still wanted."""

    lease: str


PIXELS_SECONDS = 30.0
"""How long a picture's pixels are kept after whoever wants them has last said so."""


# To an encode worker


class EncodeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    """Of this call alone: by it the lease is given back if the reply does not arrive."""
    tenant: str
    picture: Picture


# To the processor, from an encode worker: the work-complete event


class Encoded(msgspec.Struct, frozen=True, omit_defaults=True):
    handle: Handle
    uuid: str
    """Identity for every cache: H(tenant, content, processor and tower revision)."""
    metadata: dict[str, list[int]] = {}
    """What the language model must know beside the embedding (`image_grid_thw`)."""
    queue_seconds: float = 0.0
    """0 where the embedding was there already."""


# To an embed worker


class EmbedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Texts that are to be compared."""

    request_id: str
    texts: list[str]
    model: str | None = None
    """What the client calls the model; None asks for whatever there is."""


class StatesRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A text as an image pipeline has tokenized it: `dynamo_epd.diffusion.text_encoder.Row`."""

    request_id: str
    ids: list[int]
    real: int
    masked: bool


# To whoever asked an embed worker


class Embedded(msgspec.Struct, frozen=True, omit_defaults=True):
    """In the order of the texts."""

    vectors: list[bytes]
    """Pooled, of length 1; little-endian float32."""
    tokens: list[int]
    model: str
    queue_seconds: float
    run_seconds: float


class States(msgspec.Struct, frozen=True, omit_defaults=True):
    """What conditions a picture, and what its prompt is compared by: of one call."""

    handle: Handle
    """(tokens, width): of the real tokens where the row was masked, else of all."""
    vector: bytes
    """Pooled over the real tokens, of length 1; little-endian float32."""


# To an image worker


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One picture. None leaves a value to the pipeline."""

    request_id: str
    """Of this call alone: by it what is laid out for the caller is given back, should the caller leave."""
    prompt: str
    seed: int
    size: str | None = None
    """``1024x1024``, or a name that the worker's configuration gives a size."""
    quality: str | None = None
    """A name that the worker's configuration gives a number of steps."""
    model: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    lora: str | None = None
    partial_images: int = 0
    format: Literal["png", "webp", "jpeg"] = "png"
    compression: int = 100
    pixels: bool = False
    """Whether a stage of the graph will READ the picture as a tensor, beside the file for the client."""
    tenant: str = ""
    keep: str | None = None
    """The name under which the file is stored, for a client that wants an address; it is then not handed on."""
    deadline: float = 0.0
    """Unix seconds."""


# To whoever asked an image worker


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    """Progress, a partial picture or, last, the picture."""

    step: int
    steps: int
    width: int
    height: int
    handle: Handle | None = None
    """The picture in the format that was asked for, where there is one by now."""
    stored: Stored | None = None
    """Where it was to be kept: instead of its handle."""
    pixels: Handle | None = None
    """uint8 (height, width, 3), leased until it is released or the request's deadline."""
    done: Done | None = None


class Done(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the picture took."""

    model: str
    prompt_tokens: int
    image_tokens: int
    queue_seconds: float
    run_seconds: float
    prompt_vector: bytes | None = None
    """The prompt's pooled vector, where an embed worker conditioned the picture."""


# To a prefill or decode worker


class PromptImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image of a prompt, in prompt order."""

    uuid: str
    handle: Handle | None = None
    """None where the KV cache is taken over and only the metadata is needed."""
    metadata: dict[str, list[int]] = {}


class PrefillRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    token_ids: list[int]
    images: list[PromptImage]
    cache_salt: str | None = None
    streamed: list[int] = []
    """The beginning of the answer, where there is one already."""
    sampling: str | None = None
    """How the answer's next token is sampled, for an answer that can go on elsewhere behind it."""


class DecodeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    request_id: str
    token_ids: list[int]
    images: list[PromptImage]
    sampling: str
    cache_salt: str | None = None
    streamed: list[int] = []
    """The beginning of the answer, where there is one already and ``token_ids`` do not end with it."""
    reasoning: Reasoning | None = None
    kv: dict[str, Any] | None = None
    kv_until: float = math.inf
    """Unix seconds: later nobody knows whose KV cache it is."""


class RejectRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A KV cache that was prefilled and will not be decoded."""

    request_id: str
    kv: dict[str, Any]


# To the processor, from a prefill worker


class WithdrawRequest(msgspec.Struct, frozen=True):
    """The caller of a prefill has left without its reply."""

    request_id: str


class Withdrawn(msgspec.Struct, frozen=True, omit_defaults=True):
    kv: dict[str, Any] | None = None
    """The KV cache that the lost reply handed over, if there was one."""


class PrefillReply(msgspec.Struct, frozen=True, omit_defaults=True):
    kv: dict[str, Any]
    kv_until: float
    """Unix seconds, until which a decode worker may take it over."""
    token_ids: list[int]
    """The prompt with its image tokens expanded, and what there was of the answer."""
    queue_seconds: float = 0.0
    first: Delta | None = None
    """The answer's next token, where ``sampling`` was told and the decode engine can go on behind it."""


class Completed(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request without a result was carried out."""
