# SPDX-License-Identifier: Apache-2.0
"""``/v1/embeddings``: what its body may say, and its reply."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_epd.errors import InvalidRequest, UnsupportedParameter
from dynamo_epd.http.fields import checked, entries, one_of, text

MAX_TEXTS = 2048
"""Texts of one body, as at OpenAI's."""
MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class EmbeddingsBody:
    """A body that passed."""

    texts: tuple[str, ...]
    model: str | None
    base64: bool
    """Vectors as base64 of little-endian float32, which OpenAI's client asks for unless it is told otherwise."""


def check_embeddings(body: Mapping[str, Any]) -> EmbeddingsBody:
    """Raises `InvalidRequest` with ``param`` for whatever is not a text or a list of texts."""
    clean = checked(
        body,
        {
            "input": _texts,
            "model": text(1, 256),
            "encoding_format": lambda value, name: one_of(value, name, "float", "base64"),
        },
        nullable=("dimensions",),
    )
    if "input" not in clean:
        raise InvalidRequest("'input' is required", param="input")
    return EmbeddingsBody(clean["input"], clean.get("model"), clean.get("encoding_format") == "base64")


def _texts(value: Any, name: str) -> tuple[str, ...]:
    one = text(1, MAX_CHARACTERS)
    if isinstance(value, str):
        return (one(value, name),)
    if any(isinstance(item, (int, list)) and not isinstance(item, bool) for item in entries(value, name, 1, None)):
        raise UnsupportedParameter(
            f"'{name}' holds token ids, which are another model's: send texts (OpenAIEmbeddings of langchain does with "
            "check_embedding_ctx_length=False)",
            param=name,
        )
    return tuple(one(item, f"{name}[{index}]") for index, item in enumerate(entries(value, name, 1, MAX_TEXTS)))


def embeddings_reply(vectors: Sequence[bytes], tokens: Sequence[int], model: str, *, encoded: bool) -> dict[str, Any]:
    """OpenAI's list. ``vectors``: little-endian float32; ``tokens``: of each text; ``encoded``: as base64."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector).decode() if encoded else array("f", vector).tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
    return {"object": "list", "data": data, "model": model, "usage": usage}
