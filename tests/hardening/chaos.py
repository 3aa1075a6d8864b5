# SPDX-License-Identifier: Apache-2.0
"""Keeps load on a graph of two workers per stage, kills and stops them by a seed, and checks every answer.

    make chaos MINUTES=30 SEED=7

Each question's answer is first had in peace; greedy tokens and seeded pictures must be the same afterwards, whatever is
killed meanwhile. Patient clients are OpenAI's with their two retries, the others never ask twice. Prints what each kind
of client saw, how long a stage took from a fault to its next success, and what is still held at the end. Exit status
0 when no answer was wrong, no patient request failed, at least 99 % of the others came, no stream ended in silence and
nothing is held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import openai

from models import world
from tests.questions import data_url, picture
from tests.serving import Graph, at_rest, serve

CHAT = ("Frontend", "Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker")
STAGES = (*CHAT, "ImageWorker", "EmbedWorker")
NATS = "nats"
WORKERS = 2
QUESTIONS = 6
STOPPED_SECONDS = 5.0
PATIENCE = 120.0
"""Seconds that one request may take before it counts as failed."""
RAW_GOAL = 0.99


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

    def __init__(self, graph: Graph, expected: dict[tuple[str, int], str], seen: Seen, patient: bool, seed: str):
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
                outcome = "right" if answer == self._expected[kind.name, number] else "wrong"
            except SilentEnd:
                outcome = "silent end"
            except (openai.OpenAIError, httpx.HTTPError) as error:
                outcome = f"failed ({getattr(error, 'status_code', None) or type(error).__name__}: {error})"[:160]
            self._seen.note(self._who, kind, outcome, began)


def client_of(graph: Graph, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=retries, timeout=PATIENCE)


def whole(graph: Graph) -> set[str]:
    """The stages of which every worker is there."""
    with suppress(httpx.HTTPError, ValueError):
        found = httpx.get(f"{graph.url}/health", timeout=10).json()["stages"]
        stages = {stage for stage in STAGES if found.get(stage) == WORKERS}
        return stages | ({"Frontend"} if len(graph.workers("Frontend")) == WORKERS else set())
    return set()


class Faults:
    """Does one thing after another by a seed, each to a stage that is whole."""

    def __init__(self, graph: Graph, seen: Seen, seed: int, nats_every: int):
        self._graph = graph
        self._seen = seen
        self._chance = random.Random(seed)
        self._count = 0
        self._nats_every = nats_every

    def one(self) -> None:
        """The next fault, as soon as a stage stands whole."""
        self._count += 1
        if self._nats_every and self._count % self._nats_every == 0:
            pid = self._graph.nats()
            if pid is not None:
                self._kill(pid, NATS, "kill")
            return
        stage = self._choose()
        workers = self._graph.workers(stage)
        index = self._chance.choice(sorted(workers))
        if self._chance.random() < 0.15:
            self._pause(workers[index], stage)
        else:
            self._kill(workers[index], stage, "kill")

    def _choose(self) -> str:
        while True:
            stages = sorted(whole(self._graph))
            if stages:
                return self._chance.choice(stages)
            time.sleep(0.5)

    def _kill(self, pid: int, stage: str, what: str) -> None:
        with self._seen.lock:
            self._seen.faults.append(Fault(what, stage, time.monotonic()))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _pause(self, pid: int, stage: str) -> None:
        with self._seen.lock:
            self._seen.faults.append(Fault("stop", stage, time.monotonic()))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            os.kill(pid, signal.SIGCONT)


def run(graph: Graph, minutes: float, seed: int, clients: int, pause: float) -> bool:
    """The whole run. Prints its report; returns whether every goal is met."""
    calm = client_of(graph, retries=0)
    expected = {(kind.name, number): kind.ask(calm, number) for kind in KINDS for number in range(QUESTIONS)}
    seen = Seen()
    load = [Load(graph, expected, seen, index % 2 == 0, f"{seed} {index}") for index in range(clients)]
    faults = Faults(graph, seen, seed, nats_every=10)
    for one in load:
        one.start()
    end = time.monotonic() + minutes * 60
    try:
        while time.monotonic() < end:
            time.sleep(pause)
            faults.one()
            with seen.lock:
                right = sum(count for (_, outcome), count in seen.outcomes.items() if outcome == "right")
                other = sum(seen.outcomes.values()) - right
                last = seen.faults[-1]
            left = max(0, end - time.monotonic()) / 60
            print(
                f"{len(seen.faults)} faults, last {last.what} {last.stage}; {right} right, {other} not; "
                f"{left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
    finally:
        for one in load:
            one.stop.set()
        for one in load:
            one.join()
    return report(graph, seen)


def report(graph: Graph, seen: Seen) -> bool:
    """Prints what was seen. Returns whether every goal is met."""
    for (who, outcome), count in sorted(seen.outcomes.items()):
        print(f"{who}: {outcome}: {count}")
    for what, stage in sorted({(fault.what, fault.stage) for fault in seen.faults}):
        those = [fault for fault in seen.faults if (fault.what, fault.stage) == (what, stage)]
        times = sorted(fault.recovered - fault.at for fault in those if fault.recovered is not None)
        shown = f"median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s" if times else "none was asked again"
        print(f"{what} {stage}: {len(those)}, next success after {shown}")
    print("\n".join(sorted(set(seen.said))))
    try:
        at_rest(graph, 60)
        held = ""
    except AssertionError as error:
        held = str(error)
    print(f"held at the end: {held or 'nothing'}")
    of = {
        who: sum(count for (one, _), count in seen.outcomes.items() if one == who) for who in ("patient", "impatient")
    }
    wrong = sum(count for (_, outcome), count in seen.outcomes.items() if outcome in ("wrong", "silent end"))
    return (
        not wrong
        and not held
        and seen.outcomes["patient", "right"] == of["patient"]
        and seen.outcomes["impatient", "right"] >= RAW_GOAL * of["impatient"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=12, help="seconds between faults")
    given = parser.parse_args()
    workers = [f"--{stage}.ServiceArgs.workers={WORKERS}" for stage in STAGES]
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", *workers) as graph:
        met = run(graph, given.minutes, given.seed, given.clients, given.pause)
    print("every goal is met" if met else "NOT every goal is met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
