# SPDX-License-Identifier: Apache-2.0
"""What is known of one object, and the names of objects."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

_ENDINGS = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpg", "application/json": "json"}


class Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """One object without its bytes. This is the record that makes it exist."""

    id: str
    media_type: str
    size: int
    """Bytes."""
    etag: str
    """XXH3-128 of the bytes, 32 hex characters, without the quotes that HTTP puts around it."""
    created: float
    """Unix seconds."""
    expires: float
    """Unix seconds."""
    about: dict[str, Any] = {}
    """Small JSON: prompt, seed, model, width, height, ..."""
    key: str = ""
    """Where the store keeps the bytes; nobody else's business."""

    @property
    def expired(self) -> bool:
        return time.time() >= self.expires

    @property
    def file_name(self) -> str:
        """What a person who saves it would call it."""
        return f"{self.id}.{_ENDINGS.get(self.media_type, 'bin')}"


def new_id() -> str:
    """``img-`` and 32 hex characters. Sorted, the newest comes first: the first page of a listing is a gallery."""
    return f"img-{2**64 - 1 - time.time_ns():016x}{secrets.token_hex(8)}"
