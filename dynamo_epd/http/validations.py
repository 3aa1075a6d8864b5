# SPDX-License-Identifier: Apache-2.0
"""``/v1/validations``: what its body may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_epd.http.fields import Fields, boolean, number
from dynamo_epd.http.images import PICTURE, WantedPicture, wanted_picture


@dataclass(frozen=True)
class ValidationsBody:
    """A body that passed."""

    picture: WantedPicture
    n: int
    stream: bool
    threshold: float | None
    """None leaves it to the processor's configuration."""
    include_embeddings: bool
    as_url: bool


VALIDATIONS = Fields(PICTURE | {"threshold": number(-1, 1), "include_embeddings": boolean}, required=("prompt",))
"""Of a validation's body."""


def check_validations(body: Mapping[str, Any]) -> ValidationsBody:
    """Raises `UnsupportedParameter` for a field that is not honoured, `InvalidRequest` for a value out of bounds."""
    clean = VALIDATIONS.check(body)
    return ValidationsBody(
        wanted_picture(clean),
        clean.get("n", 1),
        clean.get("stream", False),
        clean.get("threshold"),
        clean.get("include_embeddings", False),
        clean.get("response_format") == "url",
    )
