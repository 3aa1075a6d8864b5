# SPDX-License-Identifier: Apache-2.0
"""Accepted image jobs are finished, once each, whatever is killed; on a directory and on a real S3 server.

A worker that is killed between a picture's bytes and its record leaves bytes that belong to nobody. No client can see
them, and a sweep removes them once no live writer can be at them (`store.leftover-seconds`, an hour): that of the end
does, on a clock that is two hours ahead. ``JOBS`` in the environment may lower their number, and with it that of kills.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_epd.store import Store, StoreConfig
from tests.hardening.report import Report
from tests.pixels import pixels, same_picture
from tests.s3_server import CREDENTIALS, REGION, S3Server, s3_server
from tests.serving import Graph, eventually, serve, untrained
from tests.test_image_worker import CONFIG
from tests.test_store import sweep_later

JOBS = int(os.environ.get("JOBS", "1000"))
NATS = "nats"
VICTIMS = ("ImageWorker-1", "Frontend-0", "EmbedWorker-0", NATS, "ImageWorker-0", "EmbedWorker-1")
KILLS = max(len(VICTIMS), JOBS // 25)
KILL_WITHIN = 4.0
"""Seconds from the beginning of a share to its kill, at most. Its jobs come over that time."""
STEPS = 16
"""Of a picture: so long that a kill meets jobs at work."""
SEED = 7
BOUND = 400.0
"""For one reply, and for one job when those before it have ended. A worker that was killed is back long before."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    untrained("pixart")
    path = tmp_path_factory.mktemp("jobs") / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def graph(config: str, tmp_path: Path) -> Iterator[Graph]:
    store = [f"--{service}.store.url={tmp_path / 'store'}" for service in ("Frontend", "ImageWorker")]
    more = ["--EmbedWorker.ServiceArgs.workers=2", "--ImageWorker.jobs.silence-seconds=3", *store]
    with serve("tests.toys.picturing:Frontend", config, *more) as served:
        yield served


def patient(graph: Graph, method: str, path: str, **arguments: Any) -> httpx.Response:
    """As a client that does not give up: it asks again while nobody answers, or 503 is the answer."""
    end = time.monotonic() + BOUND
    while True:
        try:
            reply = httpx.request(method, f"{graph.url}{path}", timeout=30, **arguments)
            if reply.status_code != 503:
                return reply
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"{method} {path} was never answered\n{graph.text[-3000:]}"
        time.sleep(0.1)


def accepted(graph: Graph, number: int) -> str:
    body = {"prompt": f"picture {number}", "seed": number, "num_inference_steps": STEPS}
    reply = patient(graph, "POST", "/v1/images/jobs", json=body, headers={"Idempotency-Key": f"job-{number}"})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def ended(graph: Graph, id: str) -> dict[str, Any]:
    end = time.monotonic() + BOUND
    while True:
        state: dict[str, Any] = patient(graph, "GET", f"/v1/images/jobs/{id}").json()
        if state.get("status") in ("completed", "failed"):
            return state
        assert time.monotonic() < end, f"{state}\n{graph.text[-3000:]}"
        time.sleep(0.1)


def kill(graph: Graph, victim: str, *, after: float) -> None:
    """-9 in ``after`` seconds, and waits until another one has taken its place and every stage is whole again."""
    service, _, index = victim.partition("-")

    def running() -> int | None:
        return graph.nats() if victim == NATS else graph.workers(service).get(int(index))

    time.sleep(after)
    pid = running()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: running() not in (None, pid), f"{victim} is started again", 120)
    eventually(lambda: whole(graph), f"{victim} is back", 300, pause=0.5)


def whole(graph: Graph) -> bool:
    with suppress(httpx.TransportError, KeyError):
        stages = httpx.get(f"{graph.url}/health", timeout=30).json()["stages"]
        return bool(stages["ImageWorker"] == stages["EmbedWorker"] == 2)
    return False


def test_jobs_outlive_whatever_is_killed(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two image workers, two embed workers, the frontend and NATS, killed -9 in turn while jobs come and run.

    Jobs come in as many shares as there are kills: a share's kill strikes while it is accepted or worked off.
    """
    with Report("jobs", jobs=JOBS, kills=KILLS, seed=SEED) as report:
        outlive(graph, tmp_path, report)
        store = tmp_path / "store"
        names = sorted(path.stem for path in (store / "about" / "everyone").glob("*.json"))
        asyncio.run(sweep_later(Store(StoreConfig(url=str(store))), monkeypatch))
        left = sorted(path.name.partition(".")[0] for path in (store / "data" / "everyone").iterdir())
        report.goal("a sweep leaves each picture's own bytes, and no others", left == names, len(left))
        assert not report.missed, report.missed


def outlive(graph: Graph, tmp_path: Path, report: Report) -> None:
    chance = random.Random(SEED)
    shares = [range(JOBS * turn // KILLS, JOBS * (turn + 1) // KILLS) for turn in range(KILLS)]
    killed: list[str] = []
    ids: list[str] = []
    with ThreadPoolExecutor(1) as killer:
        for share, victim in zip(shares, itertools.cycle(VICTIMS), strict=False):
            killing = killer.submit(kill, graph, victim, after=chance.uniform(0, KILL_WITHIN))
            for number in share:
                ids.append(accepted(graph, number))
                time.sleep(KILL_WITHIN / len(share))
            killing.result()
            killed.append(victim)
            report.say(f"{len(ids)} of {JOBS} jobs accepted; {len(killed)} of {KILLS} killed, last {victim}")
    report.goal("every job was accepted once", len(set(ids)) == len(ids) == JOBS, len(set(ids)))
    states = []
    for id in ids:
        states.append(ended(graph, id))
        if len(states) % 100 == 0:
            report.say(f"{len(states)} of {JOBS} jobs have ended")
    again = sum(state["attempts"] > 1 for state in states)
    report.note(killed=dict(Counter(killed)), begun_again=again)
    report.say(f"killed: {dict(Counter(killed))}; {again} jobs were begun more than once")
    if JOBS >= 500:
        report.goal("kills met jobs at work", again > 0, again)
    lost = [one for one in states if one["status"] != "completed"]
    report.goal("every job is completed", not lost, lost or len(states))
    names = [one["id"] for state in states for one in state.get("data", [])]
    records = list((tmp_path / "store" / "about" / "everyone").glob("*.json"))
    once = len(set(names)) == JOBS and sorted(path.stem for path in records) == sorted(names)
    report.goal("each picture is stored once, and no other", once, f"{len(records)} records of {len(names)} pictures")
    # Bytes that no record names can only be those of a worker that was killed before it wrote the record.
    files = Counter(path.name.partition(".")[0] for path in (tmp_path / "store" / "data" / "everyone").iterdir())
    over = files.total() - JOBS
    most = sum(victim.startswith("ImageWorker") for victim in killed)
    report.goal("no bytes but those of killed workers lie there too", set(files) == set(names) and over <= most, over)
    assert not report.missed, report.missed
    for number in range(0, JOBS, 10):
        stored = patient(graph, "GET", f"/v1/images/{names[number]}")
        body = {"prompt": f"picture {number}", "seed": number, "num_inference_steps": STEPS}
        direct = patient(graph, "POST", "/v1/images/generations", json=body)
        assert same_picture(pixels(stored.content), pixels(direct.json()["data"][0]["b64_json"]))
    report.goal("every tenth picture is what its prompt and seed give", True)


def test_jobs_outlive_the_graph(config: str, tmp_path: Path) -> None:
    """Ctrl-C with jobs waiting: they are finished when the graph comes back, by the same user on the same machine."""
    state, store = tmp_path / "kept", f"{tmp_path / 'store'}"
    stores = [f"--{service}.store.url={store}" for service in ("Frontend", "ImageWorker")]
    with serve("tests.toys.picturing:Frontend", config, *stores, XDG_STATE_HOME=str(state)) as graph:
        body = {"prompt": "slow", "num_inference_steps": 100, "n": 4}
        ids = [patient(graph, "POST", "/v1/images/jobs", json=body).json()["id"] for _ in range(6)]
        graph.signal(signal.SIGINT)
        assert graph.wait() == 0, graph.text
    with serve("tests.toys.picturing:Frontend", config, *stores, XDG_STATE_HOME=str(state)) as graph:
        assert [(one["status"], len(one["data"])) for one in (ended(graph, id) for id in ids)] == [("completed", 4)] * 6


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_jobs_wait_for_s3(config: str, s3: S3Server) -> None:
    """A store that is away holds jobs up and fails none; clients fetch from it by signed addresses."""
    stores = [
        f"--{service}.store.{key}"
        for service in ("Frontend", "ImageWorker")
        for key in (
            f"url=s3://{s3.bucket}/made",
            f"endpoint={s3.endpoint}",
            "allow-http=true",
            f"region={REGION}",
            "timeout=2",
        )
    ]
    more = [*stores, "--ImageWorker.jobs.retry-seconds=1"]
    with serve("tests.toys.picturing:Frontend", config, *more, model=None, **CREDENTIALS) as graph:
        first = ended(graph, accepted(graph, 0))
        url = first["data"][0]["url"]
        assert url.startswith(s3.endpoint)
        assert "X-Amz-Signature" in url
        assert httpx.get(url).headers["content-type"] == "image/png"
        s3.pause()
        ids = [accepted(graph, number) for number in range(1, 9)]
        eventually(lambda: "waits" in graph.text or _waiting(graph, ids), "a job met the store's absence", 120)
        direct = httpx.post(
            f"{graph.url}/v1/images/generations", json={"prompt": "x", "response_format": "url"}, timeout=60
        )
        assert direct.status_code == 503
        assert int(direct.headers["retry-after"]) >= 1
        s3.resume()
        states = [ended(graph, id) for id in ids]
        assert [state["status"] for state in states] == ["completed"] * 8
        assert {state["attempts"] for state in states} == {1}
        found = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix="made/about/")["Contents"]
        assert len([one for one in found if one["Key"].endswith(".json")]) == 9
        graph.finish()


def _waiting(graph: Graph, ids: list[str]) -> bool:
    """Whether one was begun, and given back."""
    path = f"{graph.url}/v1/images/jobs/"
    states = [json.loads(httpx.get(path + id, timeout=60).text) for id in ids]
    return any(state["status"] == "in_progress" for state in states)
