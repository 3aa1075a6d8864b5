# SPDX-License-Identifier: Apache-2.0
"""Decode workers killed -9 in the middle of greedy streams: each goes on with the same tokens, or says that it ends.

One stream runs at a time, so the decode worker that is at work is the one that serves it. What it should say was had in
peace before: its tokens, and their log probabilities, for random weights emit bytes that look alike. Where the other
decode worker is asked for the rest, or an error event came, the kill has met the stream; where the answer was already
out, it has not, and does not count.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import TINY_DISAGG
from tests.hardening.report import Report
from tests.questions import NEAR_TIE, Said, chat, data_url, difference, picture, user
from tests.serving import Graph, Metrics, at_rest, eventually, serve, untrained

KILLS = int(os.environ.get("KILLS", "50"))
SEED = 7
WORKERS = 2
MAX_TOKENS = 160
LATEST = 100
"""Tokens that a client has at the last kill. Decode is ahead of it, and with more would often have ended."""
PENALTY = {"frequency_penalty": 0.5}
"""It counts what was said: such an answer cannot go on with its beginning in the prompt."""
SILENCE = 60.0
"""Seconds without a word that count as an end."""
BACK_SECONDS = 300.0
DONE = "[DONE]"


@pytest.fixture(scope="module")
def two() -> Iterator[Graph]:
    workers = f"--DecodeWorker.ServiceArgs.workers={WORKERS}"
    with serve("graphs.disagg:Frontend", TINY_DISAGG, workers, model=untrained("llava")) as graph:
        yield graph


@dataclass(frozen=True)
class Stream:
    """What came of one stream."""

    said: Said
    end: str
    """``[DONE]``, what its error event said, or nothing: a silent end."""


def read(graph: Graph, body: dict[str, Any], heard: Callable[[int], None] = lambda count: None) -> Stream:
    """One stream. ``heard`` is told at each event how many tokens there are."""
    tokens: list[dict[str, Any]] = []
    text, finish, usage, end = "", "", {"prompt_tokens": 0}, ""
    with (
        suppress(httpx.TransportError),
        httpx.stream("POST", f"{graph.url}/v1/chat/completions", json=body, timeout=SILENCE) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        for line in filter(None, reply.iter_lines()):
            assert not end, f"{line!r} after the end: {end}"
            data = line.removeprefix("data: ")
            event = {} if data == DONE else json.loads(data)
            if data == DONE:
                end = DONE
            elif "error" in event:
                end = event["error"]["message"]
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
                tokens += (choice.get("logprobs") or {}).get("content") or []
                finish = choice.get("finish_reason") or finish
            heard(len(tokens))
    choice = {"message": {"content": text}, "logprobs": {"content": tokens}, "finish_reason": finish}
    return Stream(Said.of({"choices": [choice], "usage": usage}), end)


def in_peace(graph: Graph, seeds: Iterator[int], **fields: Any) -> tuple[dict[str, Any], Said]:
    """The next question about a picture, and its answer.

    One whose engine was undecided at some token is passed over: prefilled again it may rightly say the other.
    """
    for _ in range(50):
        body = chat(
            user("Tell all of it.", data_url(picture(next(seeds)))),
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True},
            **fields,
        )
        answer = read(graph, body)
        assert answer.end == DONE
        assert len(answer.said.tokens) == MAX_TOKENS
        if min(token.margin for token in answer.said.tokens) >= NEAR_TIE:
            return body, answer.said
    raise AssertionError("the engine is undecided in every answer")


@dataclass(frozen=True)
class Killed:
    """One stream and the worker that was killed under it."""

    stream: Stream
    victim: int
    pid: int
    met: bool
    """Whether the worker was still at it."""
    gap: float
    """Seconds of the longest silence after the kill."""


def kill_under(graph: Graph, body: dict[str, Any], after: int) -> Killed:
    """Kills the worker at work when ``after`` tokens have come."""
    pids = graph.workers("DecodeWorker")
    scrapes = {
        index: f"http://127.0.0.1:{psutil.Process(pid).environ()['DYN_SYSTEM_PORT']}/metrics"
        for index, pid in pids.items()
    }

    def asked(index: int) -> float:
        return Metrics.scrape(scrapes[index]).total("dynamo_component_requests_total", 'dynamo_endpoint="generate"')

    def at_work() -> list[int]:
        """Also once it is done with it: then the kill comes too late."""
        return [
            index
            for index, url in scrapes.items()
            if Metrics.scrape(url).total("epd_stage_queue_depth") or asked(index) > before[index]
        ]

    before = {index: asked(index) for index in pids}
    events: list[float] = []
    victims: list[int] = []

    def heard(count: int) -> None:
        if victims:
            events.append(time.monotonic())
        elif count >= after:
            (victim,) = looking.result()
            os.kill(pids[victim], signal.SIGKILL)
            victims.append(victim)
            events.append(time.monotonic())

    with ThreadPoolExecutor(1) as pool:
        # Looked for from now on: a stream is short, and its worker is at work before the first token is here.
        looking = pool.submit(eventually, at_work, "a decode worker is at work", 60, pause=0.005)
        got = read(graph, body, heard)
    assert victims, f"{len(got.said.tokens)} tokens, then {got.end!r}\n{graph.text[-3000:]}"
    (victim,) = victims
    (other,) = set(pids) - {victim}
    met = got.end != DONE or asked(other) > before[other]
    gap = max((later - sooner for sooner, later in pairwise(events)), default=0.0)
    return Killed(got, victim, pids[victim], met, gap)


def judged(expected: Said, got: Stream) -> str:
    """``went on``, ``error event``, or what is wrong."""
    if not got.end:
        return f"silent end after {len(got.said.tokens)} tokens"
    if got.end == DONE:
        wrong = difference(expected, got.said)
        return f"wrong: {wrong}" if wrong else "went on"
    begun = replace(got.said, tokens=expected.tokens[: len(got.said.tokens)], text=expected.text[: len(got.said.text)])
    wrong = difference(begun, got.said)
    return f"wrong before its error event: {wrong}" if wrong else "error event"


def wait_until_back(graph: Graph, killed: Killed, times_before: int) -> None:
    name = f"DecodeWorker-{killed.victim}"
    eventually(lambda: graph.workers("DecodeWorker").get(killed.victim) not in (None, killed.pid), name, 60)
    eventually(lambda: graph.text.count(f"{name} is back") > times_before, f"{name} is back", BACK_SECONDS, pause=0.5)
    eventually(lambda: _decoding(graph) == WORKERS, f"{name} is found", 60)


def _decoding(graph: Graph) -> int:
    return int(httpx.get(f"{graph.url}/health", timeout=30).json()["stages"].get("DecodeWorker", 0))


def test_streams_outlive_their_decode_workers(two: Graph) -> None:
    with Report("midstream", kills=KILLS, seed=SEED) as report:
        kill_all(two, report)
        at_rest(two, 15)


def kill_all(two: Graph, report: Report) -> None:
    chance = random.Random(SEED)
    seeds = iter(range(900_000, 1_000_000))
    outcomes: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    gaps: list[float] = []
    late = 0
    while (met := sum(outcomes.values())) < KILLS:
        assert late <= KILLS, f"{late} of {late + met} kills came too late"
        kind = "cannot go on" if met % 10 == 2 else "can go on"
        body, expected = in_peace(two, seeds, **(PENALTY if kind == "cannot go on" else {}))
        at_rest(two, 15)
        after = chance.randint(1, LATEST)
        backs = [two.text.count(f"DecodeWorker-{index} is back") for index in range(WORKERS)]
        killed = kill_under(two, body, after)
        outcome = judged(expected, killed.stream)
        if outcome not in ("went on", "error event"):
            faults.append(f"killed after {after} tokens: {outcome}")
        if killed.met:
            outcomes[kind, outcome.partition(":")[0]] += 1
            if killed.stream.end == DONE:
                gaps.append(killed.gap)
        else:
            late += 1
        shown = "" if killed.stream.end == DONE else f" ({killed.stream.end})"
        met_it = f"{met + killed.met} of {KILLS}" if killed.met else "too late"
        report.say(f"{met_it}: {kind}, killed after {after} tokens: {outcome}{shown}")
        wait_until_back(two, killed, backs[killed.victim])
    report.note(outcomes={", ".join(one): count for one, count in outcomes.items()}, too_late=late, gaps=gaps)
    if gaps:
        report.say(f"silence after the kill: median {statistics.median(gaps):.2f} s, longest {max(gaps):.2f} s")
    report.goal("every stream went on with the same tokens, or said that it ends", not faults, faults or dict(outcomes))
    # Another decode worker stood by each time: whoever could go on had nothing to say.
    ended, wrongly = outcomes["can go on", "error event"], outcomes["cannot go on", "went on"]
    report.goal("every stream that can go on went on", not ended, ended or None)
    report.goal("every one that cannot said so", not wrongly, wrongly or None)
    assert not report.missed, report.missed
