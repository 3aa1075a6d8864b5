# SPDX-License-Identifier: Apache-2.0
"""What clients ask of content validation while something is done to it, and whether they were told what is right.

Greedy tokens and seeded pictures are the same every time, so each answer is first had in peace and then compared.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2  # what the OpenAI client raises where its lines are read
import openai
import psutil

from components.validation import ValidationConfig
from models import world
from tests.pixels import pixels, same_picture
from tests.questions import NEAR_TIE, data_url, picture
from tests.serving import Graph, at_rest

CHAT = ("Frontend", "Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker")
STAGES = (*CHAT, "ImageWorker", "EmbedWorker")
NATS = "nats"
QUESTIONS = 6
"""Of each kind."""
CANDIDATES = 10 * QUESTIONS
"""Numbers that are looked at for them, at most."""
RETRIES = openai.DEFAULT_MAX_RETRIES
"""How often a patient client asks again."""
TOKENS, STEPS = 48, 8
"""Of an answer, and of a picture."""
PATIENCE = 120.0
"""Seconds that one request may take before it counts as failed."""
LEASES_END = 45.0
"""Seconds after which each lease of somebody who was killed has ended by itself: after 30, and 2 of grace."""
SLOW_START = "400"
"""Seconds that a worker may take to start, where fourteen start at once."""
REST = 1.0
"""Seconds until a client whose request has failed asks its next question, as one that reads ``Retry-After`` does."""
ROUNDED = 0.002
"""Two of the last place to which `KINDS` round numbers: a text's vector may differ in its last bits with what else is
in the batch, and then be rounded to the other side."""
PNG = "iVBORw0KGgo"
"""How the base64 of one begins."""

Answers = dict[tuple[str, int], str]
"""By a kind's name and a question's number."""


class SilentEnd(Exception):
    """A stream ended with neither ``[DONE]`` nor an error event."""


class CutOff(Exception):
    """The connection of a stream that had begun broke off, or fell silent."""


class ErrorEvent(Exception):
    """A stream that had begun said that it cannot go on, and why."""


@dataclass(frozen=True)
class Kind:
    """One kind of request. ``ask(client, number)`` returns the answer as text."""

    name: str
    stages: tuple[str, ...]
    ask: Callable[[openai.OpenAI, int], str]
    retried: bool = True
    """Whether the graph, or the OpenAI client, may ask all of it again: neither does for a stream that has begun."""
    tokens: int = 0
    """That a chat is asked for; 0 for what is no chat."""


def messages(number: int) -> list[dict[str, object]]:
    url = data_url(picture(number, (64, 64)))
    parts = [{"type": "text", "text": f"Describe the picture. ({number})"}]
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, *parts]}]


def prompt(number: int) -> str:
    scenes = world.scenes(random.Random(number), held_out=False, pairs=0)
    return next(scenes).caption


def chat(client: openai.OpenAI, number: int, tokens: int = TOKENS) -> str:
    return str(_chat(client, number, tokens).choices[0].message.content)


def _chat(client: openai.OpenAI, number: int, tokens: int, **more: Any) -> Any:
    return client.chat.completions.create(**chat_fields(number, tokens), **more)


def chat_fields(number: int, tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny-llava",
        "messages": messages(number),
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }


def streamed_chat(client: openai.OpenAI, number: int, tokens: int = TOKENS) -> str:
    """The text of a stream. Raises SilentEnd, CutOff or ErrorEvent of one that had begun.

    Until it begins the client asks again as often as it may. Its lines are read here: the client takes a stream
    without ``[DONE]`` for a whole one.
    """
    text, ended = "", False
    streamed = client.chat.completions.with_streaming_response
    with streamed.create(**chat_fields(number, tokens), stream=True) as reply:
        try:
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ErrorEvent(str(event["error"].get("message")))
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        except (httpx2.TransportError, ValueError) as error:  # ValueError: half an event
            raise CutOff from error
    if not ended:
        raise SilentEnd
    return text


def image(client: openai.OpenAI, number: int, steps: int = STEPS) -> str:
    reply = client.images.generate(prompt=prompt(number), extra_body={"seed": number, "num_inference_steps": steps})
    assert reply.data is not None
    return str(reply.data[0].b64_json)


def validation(client: openai.OpenAI, number: int, steps: int = STEPS) -> str:
    body = {"prompt": prompt(number), "seed": number, "num_inference_steps": steps}
    one = client.post("/validations", body=body, cast_to=dict[str, object])["data"][0]  # type: ignore[index]
    return json.dumps([one["b64_json"], one["caption"], round(one["similarity"], 4)])


def embedding(client: openai.OpenAI, number: int) -> str:
    """Rounded: a text's vector may differ in its last bits with what else is in the batch."""
    vector = client.embeddings.create(model="tiny-t5", input=prompt(number), encoding_format="float").data[0].embedding
    return json.dumps([round(value, 3) + 0.0 for value in vector])


def kinds(tokens: int, steps: int) -> tuple[Kind, ...]:
    """All kinds, with answers of so many tokens and pictures of so many steps."""
    return (
        Kind("chat", CHAT, partial(chat, tokens=tokens), tokens=tokens),
        Kind("streamed chat", CHAT, partial(streamed_chat, tokens=tokens), retried=False, tokens=tokens),
        Kind("image", ("Frontend", "ImageWorker", "EmbedWorker"), partial(image, steps=steps)),
        Kind("validation", STAGES, partial(validation, steps=steps)),
        Kind("embedding", ("Frontend", "EmbedWorker"), embedding),
    )


KINDS = kinds(TOKENS, STEPS)


def client_of(graph: Graph, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=retries, timeout=PATIENCE)


def answered(graph: Graph) -> bool:
    """One try of a chat, without patience."""
    with suppress(openai.OpenAIError), client_of(graph, retries=0).with_options(timeout=2) as client:
        return bool(chat(client, 0, 4))
    return False


def in_peace(graph: Graph, of: Sequence[Kind] = KINDS) -> Answers:
    """The right answer to each of `QUESTIONS` questions of every kind.

    Those about which the model is undecided are passed over: what else is in a batch, or a prompt that holds the
    beginning of its answer, may rightly turn such a token into the other.
    """
    with client_of(graph, retries=0) as client:
        tokens = max(kind.tokens for kind in of)
        return told_apart(client, (number for number in range(CANDIDATES) if decided(client, number, tokens)), of)


def told_apart(client: openai.OpenAI, numbers: Iterable[int], of: Sequence[Kind]) -> Answers:
    """The answers to the first `QUESTIONS` of these, each unlike the others of its kind: of two that are alike, either
    would pass for the other, and nobody could tell a picture that was swapped.

    A model may say the same of two pictures, and two numbers may have one prompt: the second one is passed over. Fails
    where anything else is alike, or too few are left.
    """
    answers: Answers = {}
    passed: list[str] = []
    for number in numbers:
        kept = numbers_of(answers)
        if len(kept) == QUESTIONS:
            break
        if prompt(number) in map(prompt, kept):
            passed.append(f"{number} has the prompt of another")
            continue
        new = {(kind.name, number): kind.ask(client, number) for kind in of}
        twins = [
            (kind, f"{kind.name} {other} and {number} have the same answer, {new[kind.name, number][:80]!r}")
            for kind in of
            for other in kept
            if alike(answers[kind.name, other], new[kind.name, number])
        ]
        made = [said for kind, said in twins if not kind.tokens]
        assert not made, "; ".join(made)
        passed += [said for _, said in twins]
        answers |= {} if twins else new
    found = len(numbers_of(answers))
    assert found == QUESTIONS, f"{found} of {QUESTIONS} questions: the model is undecided in most, or {passed}"
    return answers


def decided(client: openai.OpenAI, number: int, tokens: int) -> bool:
    """Whether no token of this chat's answer lies so near the next that rounding could put it in its place."""
    return _margin(_chat(client, number, tokens, logprobs=True, top_logprobs=2)) >= NEAR_TIE


def _margin(reply: Any) -> float:
    """How far the second most likely token lay behind the first, where that was least."""
    tops = [sorted(one.logprob for one in token.top_logprobs) for token in reply.choices[0].logprobs.content]
    return min(top[-1] - top[-2] for top in tops)


def rounded_caption(client: openai.OpenAI, got: str, expected: str) -> bool:
    """Whether two validations differ in the caption alone, and in one of which the model is undecided: the pixels of a
    picture may rightly differ by a level with what else was made."""
    (made, caption, _), (wanted, right, _) = json.loads(got), json.loads(expected)
    if caption == right or not _same(made, wanted):
        return False
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{made}"}}]
    content = [*parts, {"type": "text", "text": ValidationConfig.question}]
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    fields |= {"max_tokens": ValidationConfig.max_tokens, "logprobs": True, "top_logprobs": 2}
    return _margin(client.chat.completions.create(model="tiny-llava", **fields)) < NEAR_TIE


def numbers_of(answers: Answers) -> list[int]:
    """Of the questions whose answers are known."""
    return sorted({number for _, number in answers})


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


def held_at_the_end(graph: Graph, seconds: float = 60.0) -> str:
    """What is not given back so long after the last request. Empty where nothing is."""
    end = time.monotonic() + seconds
    while True:
        try:
            at_rest(graph, max(0.0, end - time.monotonic()))
            return ""
        except AssertionError as error:
            return str(error)
        except (OSError, psutil.Error) as error:  # a worker that tells nobody what it holds, or has just ended
            if time.monotonic() > end:
                return str(error) or type(error).__name__
        time.sleep(0.5)


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
    by_kind: Counter[str] = field(default_factory=Counter)
    """Who asked for what, and what came of it."""
    faults: list[Fault] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    """Answers that were not the expected ones, with these."""
    again: Counter[str] = field(default_factory=Counter)
    """Why a patient client asked again for a stream that had begun. What came of it in the end is an outcome."""
    unexplained: list[str] = field(default_factory=list)
    """Streams that broke off though nothing had been done to what alone can end one: `ENDS_A_STREAM`."""
    began: float = field(default_factory=time.monotonic)

    def note(self, who: str, kind: Kind, outcome: str, began: float) -> None:
        now = time.monotonic()
        with self.lock:
            self.outcomes[who, outcome] += 1
            self.by_kind[f"{who} {kind.name}: {outcome}"] += 1
            if outcome != "right":
                last = next((f", {now - one.at:.1f} s after {one.what} {one.stage}" for one in self.faults[::-1]), "")
                self.said.append(f"{who} {kind.name}: {outcome}; at {now - self.began:.1f} s{last}")
                return
            for fault in self.faults:
                if fault.recovered is None and began >= fault.at and fault.stage in (*kind.stages, NATS):
                    fault.recovered = now

    def struck(self, stages: Collection[str], began: float) -> bool:
        """Whether something was done to one of these that a stream can have met which ``began`` then. Who was killed
        before could not hold it; who stands still is ended later, and NATS comes back later."""
        with self.lock:
            return any(
                fault.stage in stages
                and fault.at > (began if fault.what == "kill" and fault.stage != NATS else began - STANDS_STILL)
                for fault in self.faults
            )


STANDS_STILL = 15.0
"""Seconds within which a worker that stands still is ended, with what goes through it."""
ENDS_A_STREAM = ("Frontend", "Processor", NATS)
"""What a stream cannot go on without, once it has begun. From any other worker that is lost it goes on elsewhere."""


ERROR_EVENT = "failed (error event"
CUT_OFF = "failed (cut off with its frontend"
BROKEN_OFF = (ERROR_EVENT, CUT_OFF)
"""How the outcome begins of a stream that broke off and told its client so."""


def outcome_of(kind: Kind, client: openai.OpenAI, number: int, expected: str, seen: Seen) -> str:
    """Asks once, and says what came of it: ``right``, ``wrong``, ``silent end`` or ``failed (…)``."""
    began = time.monotonic()
    try:
        answer = kind.ask(client, number)
        if alike(answer, expected):
            return "right"
        with suppress(openai.OpenAIError):
            if kind.name == "validation" and rounded_caption(client, answer, expected):
                return "right"
    except Exception as error:  # whatever a client may see: a thread that ended of it would ask nothing any more
        return failure(error, seen, began)
    with seen.lock:
        seen.wrong.append({"kind": kind.name, "number": number, "got": answer, "expected": expected})
    return "wrong"


def failure(error: Exception, seen: Seen, began: float) -> str:
    """The outcome of a request that ``began`` then and raised this."""
    if isinstance(error, CutOff) and seen.struck(["Frontend"], began):  # nobody is left to end its streams
        return f"{CUT_OFF})"
    if isinstance(error, SilentEnd | CutOff):
        return "silent end"
    if isinstance(error, ErrorEvent):
        if not seen.struck(ENDS_A_STREAM, began):
            with seen.lock:
                seen.unexplained.append(f"{error}; at {time.monotonic() - seen.began:.1f} s")
        return f"{ERROR_EVENT}: {error})"[:160]
    return f"failed ({getattr(error, 'status_code', None) or type(error).__name__}: {error})"[:160]


class Load(threading.Thread):
    """One client that asks until it is told to stop. After each answer it rests ``idle`` times as long as that took.

    A patient one is the OpenAI client with its retries. Those end where a stream begins: of one that then breaks off,
    by an error event or with its frontend, its user asks again, as often as the client would.
    """

    def __init__(
        self,
        graph: Graph,
        expected: Answers,
        seen: Seen,
        patient: bool,
        seed: str,
        of: Sequence[Kind] = KINDS,
        idle: float = 0.0,
    ):
        super().__init__(name=seed)
        self.stop = threading.Event()
        self._who = "patient" if patient else "impatient"
        self._retries = RETRIES if patient else 0
        self._kinds = of
        self._numbers = numbers_of(expected)
        self._client = client_of(graph, self._retries)
        self._expected = expected
        self._seen = seen
        self._chance = random.Random(seed)
        self._idle = idle

    def run(self) -> None:
        while not self.stop.is_set():
            kind, number = self._chance.choice(self._kinds), self._chance.choice(self._numbers)
            outcome, began = self.asked(kind, number)
            self._seen.note(self._who, kind, outcome, began)
            self.stop.wait(REST if outcome != "right" else self._idle * (time.monotonic() - began))

    def asked(self, kind: Kind, number: int) -> tuple[str, float]:
        """What came of it in the end, and when that was asked for."""
        left = self._retries
        while True:
            began = time.monotonic()
            outcome = outcome_of(kind, self._client, number, self._expected[kind.name, number], self._seen)
            if not left or not outcome.startswith(BROKEN_OFF):
                return outcome, began
            left -= 1
            with self._seen.lock:
                self._seen.again[f"{kind.name}: {outcome}"] += 1


class Fresh(threading.Thread):
    """One client that asks every question twice, and none that was asked before: no cache spares its first answer, and
    the second must be the same. It never asks for what has failed. Rests as `Load` does."""

    def __init__(self, graph: Graph, seen: Seen, seed: int, of: Sequence[Kind] = KINDS, idle: float = 0.0):
        super().__init__(name="fresh")
        self.stop = threading.Event()
        self._client = client_of(graph, retries=0)
        self._seen = seen
        self._kinds = of
        self._chance = random.Random(f"{seed} fresh")
        self._numbers = itertools.count(1_000_000)
        self._idle = idle

    def run(self) -> None:
        while not self.stop.is_set():
            kind, began = self._chance.choice(self._kinds), time.monotonic()
            outcome = self.asked(kind, next(self._numbers))
            self._seen.note("fresh", kind, outcome, began)
            self.stop.wait(REST if outcome != "right" else self._idle * (time.monotonic() - began))

    def asked(self, kind: Kind, number: int) -> str:
        """What came of both."""
        began = time.monotonic()
        try:
            first = kind.ask(self._client, number)
        except Exception as error:  # a thread that ended of it would ask nothing any more
            return failure(error, self._seen, began)
        outcome = outcome_of(kind, self._client, number, first, self._seen)
        with suppress(Exception):  # nobody says that it may differ, so it stays wrong, and the thread goes on
            patient = self._client.with_options(max_retries=RETRIES)
            if outcome == "wrong" and kind.tokens and not decided(patient, number, kind.tokens):
                return "right"  # rounding may decide where the model has not
        return outcome


def worker_names(graph: Graph) -> dict[int, str]:
    """Names by pid."""
    return {pid: f"{stage}-{index}" for stage in STAGES for index, pid in graph.workers(stage).items()}


def name_of(process: psutil.Process, workers: dict[int, str], graph: Graph) -> str:
    """The stage of a worker; of a process below one, the stage and what the process is called."""
    if process.pid in workers:
        return workers[process.pid]
    if process.pid == graph.process.pid:
        return "supervisor"
    parent = process.parent()
    above = name_of(parent, workers, graph) if parent and graph.process.pid != parent.pid else ""
    return f"{above} {process.name()}".strip()
