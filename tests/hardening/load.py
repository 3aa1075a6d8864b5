# SPDX-License-Identifier: Apache-2.0
"""What clients ask of content validation while something is done to it, and whether they were told what is right.

Greedy tokens and seeded pictures are the same every time, so each answer is first had in peace and then compared.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import openai

from models import world
from tests.pixels import pixels, same_picture
from tests.questions import data_url, picture
from tests.serving import Graph, at_rest

CHAT = ("Frontend", "Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker")
STAGES = (*CHAT, "ImageWorker", "EmbedWorker")
QUESTIONS = 6
"""Of each kind."""
PATIENCE = 120.0
"""Seconds that one request may take before it counts as failed."""
ROUNDED = 0.002
"""Two of the last place to which `KINDS` round numbers: a text's vector may differ in its last bits with what else is
in the batch, and then be rounded to the other side."""
PNG = "iVBORw0KGgo"
"""How the base64 of one begins."""

Answers = dict[tuple[str, int], str]
"""By a kind's name and a question's number."""


class SilentEnd(Exception):
    """A stream ended with neither ``[DONE]`` nor an error event."""


@dataclass(frozen=True)
class Kind:
    """One kind of request. ``ask(client, number)`` returns the answer as text."""

    name: str
    stages: tuple[str, ...]
    ask: Callable[[openai.OpenAI, int], str]
    retried: bool = True
    """Whether a client may ask again for itself: nobody can for a stream that has begun."""


def messages(number: int) -> list[dict[str, object]]:
    url = data_url(picture(number, (64, 64)))
    parts = [{"type": "text", "text": f"Describe the picture. ({number})"}]
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *parts]}]


def prompt(number: int) -> str:
    scenes = world.scenes(random.Random(number), held_out=False, pairs=0)
    return next(scenes).caption


def chat(client: openai.OpenAI, number: int) -> str:
    reply = client.chat.completions.create(
        model="tiny-llava",
        messages=messages(number),  # type: ignore[arg-type]
        max_tokens=48,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return str(reply.choices[0].message.content)


def streamed_chat(client: openai.OpenAI, number: int) -> str:
    """The text of a stream. Raises SilentEnd, or APIError for an error event."""
    body = {
        "model": "tiny-llava",
        "messages": messages(number),
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, ended = "", False
    with httpx.stream("POST", f"{client.base_url}chat/completions", json=body, timeout=PATIENCE) as reply:
        if reply.status_code != 200:
            reply.read()
            raise openai.OpenAIError(f"status {reply.status_code}")
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise openai.OpenAIError("error event")
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if not ended:
        raise SilentEnd
    return text


def image(client: openai.OpenAI, number: int) -> str:
    reply = client.images.generate(prompt=prompt(number), extra_body={"seed": number, "num_inference_steps": 8})
    assert reply.data is not None
    return str(reply.data[0].b64_json)


def validation(client: openai.OpenAI, number: int) -> str:
    body = {"prompt": prompt(number), "seed": number, "num_inference_steps": 8}
    one = client.post("/validations", body=body, cast_to=dict[str, object])["data"][0]  # type: ignore[index]
    return json.dumps([one["b64_json"], one["caption"], round(one["similarity"], 4)])


def embedding(client: openai.OpenAI, number: int) -> str:
    """Rounded: a text's vector may differ in its last bits with what else is in the batch."""
    vector = client.embeddings.create(model="tiny-t5", input=prompt(number), encoding_format="float").data[0].embedding
    return json.dumps([round(value, 3) + 0.0 for value in vector])


KINDS = (
    Kind("chat", CHAT, chat),
    Kind("streamed chat", CHAT, streamed_chat, retried=False),
    Kind("image", ("Frontend", "ImageWorker", "EmbedWorker"), image),
    Kind("validation", STAGES, validation),
    Kind("embedding", ("Frontend", "EmbedWorker"), embedding),
)


def client_of(graph: Graph, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=retries, timeout=PATIENCE)


def in_peace(graph: Graph) -> Answers:
    """The right answer to every question of every kind."""
    with client_of(graph, retries=0) as client:
        return {(kind.name, number): kind.ask(client, number) for kind in KINDS for number in range(QUESTIONS)}


def alike(first: str, second: str) -> bool:
    """Whether two answers are the same; numbers of a list are rounded, and so are pictures, bare or in a list."""
    if not (first.startswith("[") and second.startswith("[")):
        return _same(first, second)
    with suppress(ValueError):
        return all(_same(a, b) for a, b in zip(json.loads(first), json.loads(second), strict=True))
    return first == second


def _same(first: object, second: object) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) < ROUNDED
    if isinstance(first, str) and isinstance(second, str) and first.startswith(PNG) and second.startswith(PNG):
        return same_picture(pixels(first), pixels(second))
    return first == second


def held_at_the_end(graph: Graph) -> str:
    """What is not given back a minute after the last request. Empty where nothing is."""
    try:
        at_rest(graph, 60)
    except AssertionError as error:
        return str(error)
    return ""


@dataclass
class Fault:
    """What was done to a stage, and when the first request that began later and crossed the stage was answered."""

    what: str
    stage: str
    at: float
    recovered: float | None = None


@dataclass
class Seen:
    """What the clients saw. Guarded by ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def note(self, who: str, kind: Kind, outcome: str, began: float) -> None:
        with self.lock:
            self.outcomes[who, outcome] += 1
            if outcome != "right":
                self.said.append(f"{who} {kind.name}: {outcome}")
            else:
                for fault in self.faults:
                    if fault.recovered is None and began >= fault.at and fault.stage in kind.stages:
                        fault.recovered = time.monotonic()


class Load(threading.Thread):
    """One client that asks until it is told to stop."""

    def __init__(self, graph: Graph, expected: Answers, seen: Seen, patient: bool, seed: str):
        super().__init__(name=seed)
        self.stop = threading.Event()
        self._who = "patient" if patient else "impatient"
        self._kinds = [kind for kind in KINDS if kind.retried or not patient]
        self._client = client_of(graph, retries=2 if patient else 0)
        self._expected = expected
        self._seen = seen
        self._chance = random.Random(seed)

    def run(self) -> None:
        while not self.stop.is_set():
            kind, number = self._chance.choice(self._kinds), self._chance.randrange(QUESTIONS)
            began = time.monotonic()
            try:
                answer = kind.ask(self._client, number)
                outcome = "right" if alike(answer, self._expected[kind.name, number]) else "wrong"
            except SilentEnd:
                outcome = "silent end"
            except (openai.OpenAIError, httpx.HTTPError) as error:
                outcome = f"failed ({getattr(error, 'status_code', None) or type(error).__name__}: {error})"[:160]
            self._seen.note(self._who, kind, outcome, began)
