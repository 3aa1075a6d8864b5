# SPDX-License-Identifier: Apache-2.0
"""Content validation with two image and two embed workers: work reaches both, one that leaves costs nothing, and a
killed one is not seen.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.pixels import pixels, same_picture
from tests.serving import Graph, eventually, resized, serve
from tests.toys.calling import Callers

STAR = "a large red star on a blue background"
BOUND = 300.0
STAGES = ("ImageWorker", "EmbedWorker")
ENDPOINTS = {"ImageWorker": "generate", "EmbedWorker": "embed"}


@pytest.fixture(scope="module")
def graph() -> Iterator[Graph]:
    workers = [f"--{stage}.ServiceArgs.workers=2" for stage in STAGES]
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", *workers) as served:
        yield served


def validate(graph: Graph, seed: int, steps: int = 20) -> httpx.Response:
    body = {"prompt": STAR, "seed": seed, "num_inference_steps": steps}
    return httpx.post(f"{graph.url}/v1/validations", json=body, timeout=BOUND)


def validate_all(graph: Graph, count: int, steps: int = 20) -> list[httpx.Response]:
    with ThreadPoolExecutor(8) as clients:
        return list(clients.map(lambda seed: validate(graph, seed, steps), range(count)))


def found(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text[:500]
    (one,) = reply.json()["data"]
    return {name: one[name] for name in ("b64_json", "caption", "similarity", "seed")}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The picture up to rounding (its steps may have been shared), and so may a text's vector be rounded otherwise."""
    assert same_picture(pixels(first["b64_json"]), pixels(second["b64_json"]))
    assert (first["caption"], first["seed"]) == (second["caption"], second["seed"])
    assert abs(first["similarity"] - second["similarity"]) < 1e-5


def live(graph: Graph, stage: str) -> int:
    with suppress(httpx.TransportError):
        return int(httpx.get(f"{graph.url}/health", timeout=30).json()["stages"][stage])
    return -1


def worked(graph: Graph, stage: str) -> list[float]:
    endpoint = f'dynamo_endpoint="{ENDPOINTS[stage]}"'
    return [graph.metrics(stage, index).total("dynamo_component_requests_total", endpoint) for index in (0, 1)]


@pytest.mark.parametrize("stage", STAGES)
def test_work_reaches_both(graph: Graph, stage: str) -> None:
    before = worked(graph, stage)
    for reply in validate_all(graph, 24):
        found(reply)
    done = [now - then for now, then in zip(worked(graph, stage), before, strict=True)]
    assert sum(done) == 24
    assert min(done) >= 4, done


class Validating(Callers):
    """Clients that ask for the same few validations over and over. ``answers``: "200", or what came instead."""

    def __init__(self, graph: Graph, seeds: int):
        super().__init__(graph, seconds=0.0)
        self.replies: list[httpx.Response] = []
        self._of = graph
        self._seeds = itertools.cycle(range(seeds))

    def _ask(self) -> str:
        try:
            reply = validate(self._of, next(self._seeds))
        except httpx.TransportError as error:
            return f"lost: {error!r}"
        self.replies.append(reply)
        return "200" if reply.status_code == 200 else f"{reply.status_code} {reply.text[:500]}"

    def wait_for_more(self, count: int) -> None:
        enough = len(self.answers) + count
        eventually(lambda: len(self.answers) >= enough, f"{count} more answers", BOUND)

    @property
    def lost(self) -> list[str]:
        return [answer for answer in self.answers if answer != "200"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_shrinks_and_grows_under_validations(graph: Graph, stage: str) -> None:
    """By `dynamo scale`, from two workers to one and back: whoever leaves finishes what it has."""
    quiet = {one["seed"]: one for one in map(found, validate_all(graph, 8))}
    before = len(graph.lines)
    with Validating(graph, seeds=8) as validating:
        validating.number(4)
        for count in (1, 2):
            validating.wait_for_more(8)
            resized(graph, stage, count)
        # it counts from zero: what it has done came since
        eventually(lambda: worked(graph, stage)[1] >= 3, "work reaches the new one", BOUND)
        validating.wait_for_more(8)
    assert validating.lost == []
    for one in map(found, validating.replies):
        assert_same(one, quiet[one["seed"]])
    said = "\n".join(graph.lines[before:])
    assert "died" not in said and "still running" not in said, said


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_worker_is_not_seen(graph: Graph, stage: str) -> None:
    """Killed while pictures are denoised: every client has the answer that it has in peace."""
    quiet = [found(reply) for reply in validate_all(graph, 16)]
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(validate, graph, seed) for seed in range(16)]
        eventually(lambda: sum(one.done() for one in asked) >= 2, "two are done", BOUND, pause=0.005)
        victim = graph.pid(stage, 1)
        os.kill(victim, signal.SIGKILL)
        for one, same in zip(asked, quiet, strict=True):
            assert_same(found(one.result()), same)
    eventually(lambda: live(graph, stage) == 2, f"{stage}-1 is back", BOUND, pause=0.5)


@pytest.mark.parametrize("stage", STAGES)
def test_with_none_left_the_stage_is_named(graph: Graph, stage: str) -> None:
    stopped = [graph.pid(stage, index) for index in (0, 1)]
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: live(graph, stage) == 0, "both are missed", 60)
    reply = validate(graph, 1)
    assert reply.status_code == 503, reply.text[:500]
    assert stage in reply.json()["error"]["message"]
    assert int(reply.headers["retry-after"]) >= 1
    eventually(lambda: live(graph, stage) == 2, f"{stage} is back", BOUND, pause=0.5)
    found(validate(graph, 1))
