# SPDX-License-Identifier: Apache-2.0
"""What a NATS server says of itself when one connects."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any
from urllib.parse import urlsplit


def nats_url() -> str:
    """Of the server that this process is told to use."""
    return os.environ.get("NATS_SERVER", "nats://127.0.0.1:4222")


async def server_info(url: str, timeout: float = 5.0) -> dict[str, Any]:
    """The INFO line of the server at ``nats://host:port`` (NATS client protocol), ``max_payload`` among it.

    Raises OSError when nothing answers within ``timeout`` seconds, ValueError when what answers is not NATS.
    """
    parts = urlsplit(url if "//" in url else f"nats://{url}")
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
            try:
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise OSError(f"no answer from {url} within {timeout:g} s") from error
    if not line.startswith(b"INFO "):
        raise ValueError(f"{url} is not a NATS server")
    found: dict[str, Any] = json.loads(line[5:])
    return found
