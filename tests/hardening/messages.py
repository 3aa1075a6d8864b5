# SPDX-License-Identifier: Apache-2.0
"""Messages to a graph's endpoints, drawn from the very classes that they are decoded into, and at times spoilt."""

from __future__ import annotations

import json
from itertools import cycle, islice
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from components.decode_worker import DecodeWorker
from components.embed_worker import EmbedWorker
from components.encode_worker import EncodeWorker
from components.image_worker import ImageWorker
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from dynamo_epd import errors
from dynamo_epd.errors import EpdError, InternalError
from dynamo_epd.sdk.service import info_of
from dynamo_epd.sdk.wire import request_type
from tests.drawing import ANYTHING, values
from tests.hardening import stranger
from tests.hardening.edge import HELLO
from tests.hardening.fuzz import addresses

STAGES = (Processor, EncodeWorker, PrefillWorker, DecodeWorker, EmbedWorker, ImageWorker)
ENDPOINTS: dict[str, Any] = {
    f"dynamo/{info_of(stage).name.lower()}/{mark.name}": request_type(getattr(stage, attribute))
    for stage in STAGES
    for attribute, mark in info_of(stage).marked("endpoint").items()
}
"""Every endpoint of every stage, and what it is sent."""

_SAMPLING: tuple[Any, ...] = (
    {"max_tokens": 1}, {"max_tokens": 2, "temperature": 0.0}, {"max_tokens": -1}, {"n": "x"}, [], None
)  # fmt: skip
SAMPLING = tuple(json.dumps(one) for one in _SAMPLING)


REFUSALS = {one.__name__ for one in vars(errors).values() if isinstance(one, type) and issubclass(one, EpdError)} - {
    InternalError.__name__
}
"""Classes of errors that a message may be answered with: what a stage did not foresee is none."""
LONGEST = 2048


def _likely(port: int) -> dict[str, st.SearchStrategy[Any]]:
    """Of fields whose class knows less than their reader, and whose right value would only make an answer long."""
    return {
        "steps": st.none() | st.integers(-1, 2),
        "size": st.sampled_from((None, "64x64", "8x8", "-1x5", "x")),
        "sampling": st.sampled_from(SAMPLING),
        "url": st.none() | st.sampled_from(addresses(port)),
        "body": st.sampled_from(({**HELLO, "model": "tiny-llava"}, {"prompt": "Hello", "max_tokens": 2}, {})),
        "partial_images": st.integers(-1, 2),
    }


@st.composite
def messages(draw: st.DrawFn, address: str, port: int) -> bytes:
    """A message for this endpoint, as msgpack: two of three as its class has them, one with fields changed."""
    (schema,), defined = msgspec.json.schema_components([ENDPOINTS[address]], ref_template="#/$defs/{name}")
    message = _put(draw, draw(values(schema, defined)), _likely(port))
    if message and draw(st.integers(0, 2)) == 2:
        name = draw(st.sampled_from(sorted(message)))
        message[name] = draw(ANYTHING)
        if draw(st.booleans()):
            del message[name]
    return msgspec.msgpack.encode(message)


def _put(draw: st.DrawFn, value: Any, likely: dict[str, st.SearchStrategy[Any]]) -> Any:
    if isinstance(value, list):
        return [_put(draw, one, likely) for one in value]
    if isinstance(value, dict):
        return {name: draw(likely[name]) if name in likely else _put(draw, one, likely) for name, one in value.items()}
    return value


def drawn(count: int, number: int, port: int) -> list[tuple[str, bytes]]:
    """``count`` messages, to every endpoint in turn; the same for the same ``number``."""
    each = -(-count // len(ENDPOINTS))
    some = {address: _to(address, each, number, port) for address in ENDPOINTS}
    return [(address, some[address][index]) for index in range(each) for address in ENDPOINTS][:count]


def _to(address: str, count: int, number: int, port: int) -> list[bytes]:
    found: list[bytes] = []

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(messages(address, port))
    def draw(message: bytes) -> None:
        found.append(message)

    draw()
    return list(islice(cycle(found), count))  # it ends early where it believes to have seen all


def judged(frames: list[Any]) -> str | None:
    """What is wrong with what came back, if anything: it is an answer, or a short error of a class of ours."""
    if not stranger.ended(frames):
        return f"it was not answered to its end: {json.dumps(frames)[-300:]}"
    for frame in frames:
        error = frame.get("error", frame) if isinstance(frame, dict) else None
        if error is not None and (error.get("class") not in REFUSALS or len(json.dumps(frame)) >= LONGEST):
            return f"no refusal of ours {json.dumps(frame)[:300]}"
    return None
