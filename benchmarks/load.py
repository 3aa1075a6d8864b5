# SPDX-License-Identifier: Apache-2.0
"""Clients: one streamed chat and what was seen of it, many one after the other, and many at a fixed rate."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import aiohttp

from models import world

MODEL = "bench"
"""Under which every arm serves."""
TIMEOUT = aiohttp.ClientTimeout(total=60)
"""Many times what any answer takes: an arm that has lost one must not take the others' time."""


@dataclass(frozen=True)
class Told:
    """One answer. Times in seconds; ``gaps`` between deltas are inter-token latencies."""

    text: str
    first: float
    whole: float
    gaps: list[float] = field(default_factory=list)
    failed: str = ""


@lru_cache(maxsize=2048)
def picture(number: int, side: int = 64) -> str:
    """The ``number``-th picture as a data: URL: no two are the same, and every arm gets the same."""
    chance = random.Random(f"bench {number}")
    scene = next(world.scenes(chance, held_out=False, pairs=0.5))
    file = io.BytesIO()
    world.draw(scene, chance, side=side).image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(text: str, pictures: Sequence[str] = (), *, tokens: int = 16, before: str = "") -> dict[str, Any]:
    """A body that every arm takes: greedy, streamed. ``before`` the pictures: what no prefix cache has seen."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": text}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Told:
    """One streamed chat. What goes wrong is told in ``failed``, never raised."""
    began = time.perf_counter()
    text, at = "", []
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as reply:
            if reply.status != 200:
                return Told("", 0.0, 0.0, failed=in_a_line(f"{reply.status}: {await reply.text()}"))
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Told(text, 0.0, 0.0, failed=in_a_line(event["error"]))
                said = "".join((one.get("delta") or {}).get("content") or "" for one in event.get("choices") or ())
                if said:
                    at.append(time.perf_counter())
                    text += said
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return Told(text, 0.0, 0.0, failed=in_a_line(f"{type(error).__name__}: {error}"))
    whole = time.perf_counter() - began
    if not at:
        return Told("", 0.0, whole, failed="nothing was said")
    return Told(text, at[0] - began, whole, [later - sooner for sooner, later in pairwise(at)])


def in_a_line(said: object) -> str:
    """Its beginning, as a note or a cell of a table can hold it."""
    return " ".join(str(said).split())[:200]


async def within(seconds: float, asked: Awaitable[Told]) -> Told:
    """What was told; nothing, and no failure either, where that took longer."""
    try:
        return await asyncio.wait_for(asked, seconds)
    except TimeoutError:
        return Told("", 0.0, 0.0)


async def prompt_tokens(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> int:
    """How long the arm says that this prompt is, pictures and template included. Raises ClientError for a refusal."""
    async with session.post(f"{url}/v1/chat/completions", json=body | {"stream": False}) as reply:
        reply.raise_for_status()
        return int((await reply.json())["usage"]["prompt_tokens"])


async def at_rate(rate: float, seconds: float, seed: int, one: Callable[[int], Awaitable[Told]]) -> list[Told]:
    """Poisson arrivals, ``rate`` a second, that wait for nobody (open loop). ``one`` sends the k-th request."""
    chance = random.Random(seed)
    begun: list[asyncio.Task[Told]] = []
    began = due = time.perf_counter()
    while (due := due + chance.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        begun.append(asyncio.ensure_future(one(len(begun))))
    return list(await asyncio.gather(*begun))


def settled() -> None:
    """Takes what there is by now from the garbage collector's rounds. One over the models of the rows before stops the
    process for hundreds of milliseconds, which would be taken for an answer's. The services do so once they have
    started."""
    gc.collect()
    gc.freeze()


def session() -> aiohttp.ClientSession:
    """For every arm, `settled`; connections are kept, but for less time than the servers keep them (uvicorn 5 s): a
    question would fail on one that its server is just closing."""
    settled()
    return aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0))
