# SPDX-License-Identifier: Apache-2.0
"""Questions with pictures, their answers token by token, and what counts as the same answer."""

from __future__ import annotations

import base64
import io
import json
import random
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MODEL = "tiny-llava"

SIZES = ((56, 56), (60, 50), (224, 32), (32, 224), (400, 300), (29, 31), (120, 121), (300, 90))
"""Width and height of the pictures: squares, odd ones, and ratios up to seven."""

NEAR_TIE = 1e-3
"""Two tokens whose logits lie this near may change places without either being wrong."""

SAME_TOKEN = 5e-3
"""Log probabilities of one token may differ by this much from engine to engine. Random weights emit bytes that are no
text, which all look alike: their log probabilities tell them apart."""

WORDS = ("what", "is", "in", "this", "picture", "say", "more", "about", "the", "left", "side", "compare")


def picture(seed: int, size: tuple[int, int] = (60, 50), kind: str = "PNG") -> bytes:
    """A file with coarse coloured blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user's message: its pictures, then its text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A greedy request that asks for what a comparison needs."""
    settings = {"max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    return {"model": MODEL, "messages": list(messages), **settings, **fields}


def question(seed: int) -> dict[str, Any]:
    """One of endlessly many: up to four pictures of different sizes, up to three turns, at times a system message."""
    draw = random.Random(seed)
    pictures = seed % 5
    turns = draw.choice((1, 1, 2, 3))
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": f"You are helper {seed}. Answer in short."})
    turn_of = sorted(draw.randrange(turns) for _ in range(pictures))
    for turn in range(turns):
        parts: list[dict[str, Any]] = []
        for number in [index for index, of in enumerate(turn_of) if of == turn]:
            kind = draw.choice(("PNG", "JPEG"))
            url = data_url(picture(seed * 8 + number, draw.choice(SIZES), kind), kind.lower())
            parts.append({"type": "image_url", "image_url": {"url": url}})
        parts.insert(draw.randrange(len(parts) + 1), {"type": "text", "text": f"{seed} {_text(draw)}"})
        messages.append({"role": "user", "content": parts})
        if turn < turns - 1:
            messages.append({"role": "assistant", "content": _text(draw)})
    return chat(*messages, max_tokens=draw.choice((4, 12, 24)))


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(2, 12)))


@dataclass(frozen=True)
class Token:
    text: str
    logprob: float
    margin: float
    """How far the second most likely token lay behind the first."""


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    prompt_tokens: int

    @classmethod
    def of(cls, reply: dict[str, Any]) -> Said:
        choice = reply["choices"][0]
        return cls(
            choice["message"]["content"],
            tuple(_token(one) for one in choice["logprobs"]["content"]),
            choice["finish_reason"],
            reply["usage"]["prompt_tokens"],
        )


def _token(content: dict[str, Any]) -> Token:
    first, second = sorted((one["logprob"] for one in content["top_logprobs"]), reverse=True)[:2]
    return Token(content["token"], content["logprob"], first - second)


def difference(expected: Said, got: Said) -> str | None:
    """What differs, in words, beginning with ``near tie`` where the expected engine was itself undecided; else None."""
    if got.prompt_tokens != expected.prompt_tokens:
        return f"{got.prompt_tokens} prompt tokens, not {expected.prompt_tokens}"
    for index, (want, have) in enumerate(zip(expected.tokens, got.tokens, strict=False)):
        if want.text != have.text or abs(want.logprob - have.logprob) > SAME_TOKEN:
            kind = "near tie" if want.margin < NEAR_TIE else "other token"
            return (
                f"{kind} at {index} of {len(expected.tokens)}: {have.text!r} ({have.logprob:.4f}), not "
                f"{want.text!r} ({want.logprob:.4f}, {want.margin:.4f} before the next); answers {got.text!r}, not "
                f"{expected.text!r}"
            )
    if len(got.tokens) != len(expected.tokens) or got.finish_reason != expected.finish_reason:
        return (
            f"{len(got.tokens)} tokens and {got.finish_reason}, not {len(expected.tokens)} and {expected.finish_reason}"
        )
    return None if got.text == expected.text else f"text {got.text!r}, not {expected.text!r}"


def assert_same(expected: Sequence[Said], got: Sequence[Said], ties: float = 0.01) -> None:
    """Every answer is the expected one; at most ``ties`` of them differ where the reference was undecided."""
    found = [difference(want, have) for want, have in zip(expected, got, strict=True)]
    wrong = [f"{index}: {one}" for index, one in enumerate(found) if one and not one.startswith("near tie")]
    near = [f"{index}: {one}" for index, one in enumerate(found) if one and one.startswith("near tie")]
    assert not wrong, f"{len(wrong)} of {len(found)} differ:\n" + "\n".join(wrong[:10])
    allowed = max(1, int(ties * len(found)))
    assert len(near) <= allowed, f"{len(near)} of {len(found)} near ties, {allowed} allowed:\n" + "\n".join(near[:10])


class Refused(Exception):
    """A reply that is none of 200."""

    def __init__(self, status: int, body: str, headers: dict[str, str]):
        super().__init__(f"{status} {body[:500]}")
        self.status = status
        self.error: dict[str, Any] = json.loads(body).get("error", {}) if body.startswith("{") else {}
        self.size = len(body)
        self.headers = headers


def post(url: str, body: Any, timeout: float = 120, **headers: str) -> dict[str, Any]:
    """The JSON of a 200. Raises Refused for anything else."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, raw, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            found: dict[str, Any] = json.loads(reply.read())
            return found
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode(), dict(error.headers)) from None


def ask(url: str, body: dict[str, Any], **fields: Any) -> Said:
    return Said.of(post(f"{url}/v1/chat/completions", body | fields, timeout=300))


def ask_all(url: str, bodies: Sequence[dict[str, Any]], at_once: int = 1, **fields: Any) -> list[Said]:
    """All answers, in order; ``at_once`` of them are asked for at the same time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda body: ask(url, body, **fields), bodies))
