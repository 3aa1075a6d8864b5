# SPDX-License-Identifier: Apache-2.0
"""``/v1/embeddings``: what its body may say, and its reply."""

from __future__ import annotations

import asyncio
import base64
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from dynamo_epd.errors import UnsupportedParameter
from dynamo_epd.http.fields import Check, Fields, entries, list_of, one_of, text

MAX_TEXTS = 2048
"""Texts of one body, as at OpenAI's."""
MAX_CHARACTERS = 1_000_000
PIECE = 64 * 1024
"""Bytes of a reply, and at most one vector more, that are written before the loop has its turn: some 0.2 ms."""


@dataclass(frozen=True)
class EmbeddingsBody:
    """A body that passed."""

    texts: tuple[str, ...]
    model: str | None
    base64: bool
    """Vectors as base64 of little-endian float32, which OpenAI's client asks for unless it is told otherwise."""


def check_embeddings(body: Mapping[str, Any]) -> EmbeddingsBody:
    """Raises `InvalidRequest` with ``param`` for whatever is not a text or a list of texts."""
    clean = EMBEDDINGS.check(body)
    return EmbeddingsBody(clean["input"], clean.get("model"), clean.get("encoding_format") == "base64")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_TEXT(value, name),)
    if any(isinstance(item, (int, list)) and not isinstance(item, bool) for item in entries(value, name, 1, None)):
        raise UnsupportedParameter(
            f"'{name}' holds token ids, which are another model's: send texts (OpenAIEmbeddings of langchain does with "
            "check_embedding_ctx_length=False)",
            param=name,
        )
    return tuple(_LIST(value, name))


_TEXT = text(1, MAX_CHARACTERS)
_LIST = list_of(_TEXT, 1, MAX_TEXTS)
EMBEDDINGS = Fields(
    {
        "input": Check(_texts, {"anyOf": [_TEXT.schema, _LIST.schema]}),
        "model": text(1, 256),
        "encoding_format": one_of("float", "base64"),
    },
    required=("input",),
    nullable=("dimensions",),
)
"""Of an embeddings body."""


def embeddings_reply(
    vectors: Sequence[bytes], tokens: Sequence[int], model: str, *, encoded: bool
) -> AsyncGenerator[bytes, None]:
    """OpenAI's list as JSON, piece by piece: 2,048 vectors of 4,096 floats are 180 MB, and whoever wrote them at once,
    on the loop or in a thread that holds the GIL, would stop every other stream meanwhile.

    Args:
        vectors: float32 (width,), little-endian, of each text.
        tokens: of each text.
        encoded: the vectors as base64.

    Raises ValueError, before the first piece, for NaN or infinity, which JSON has no number for.
    """
    if not encoded and not all(np.isfinite(np.frombuffer(vector, "<f4")).all() for vector in vectors):
        raise ValueError("a vector holds what is no number in JSON")
    return _pieces(vectors, sum(tokens), model, encoded)


async def _pieces(vectors: Sequence[bytes], tokens: int, model: str, encoded: bool) -> AsyncGenerator[bytes, None]:
    piece = bytearray(b'{"object":"list","data":[')
    for index, vector in enumerate(vectors):
        embedding = base64.b64encode(vector).decode() if encoded else array("f", vector).tolist()
        piece += b"," * (index > 0)
        piece += msgspec.json.encode({"object": "embedding", "index": index, "embedding": embedding})
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)  # a send gives no turn away while its client keeps up
    rest = msgspec.json.encode({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    yield bytes(piece) + b"]," + rest[1:]  # without its brace, since the one above is still open
