# SPDX-License-Identifier: Apache-2.0
"""The object store of a running graph fails: its disk is full, or what is sent to S3 is torn on the way.

A job whose picture cannot be kept waits, who asks for an address is refused, and nobody sees a part of a picture. A
store that is away: `test_jobs.py`; each write of a store by itself, half done: `tests/test_store.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_epd.store import Store, StoreConfig
from tests.acceptance.test_jobs import ended, patient
from tests.hardening.edge import Reply, refused_as_unavailable, send
from tests.pixels import pixels, same_picture
from tests.s3_server import CREDENTIALS, REGION, S3Server, s3_server
from tests.serving import Graph, eventually, serve, untrained
from tests.small_disk import enlarge, small_disk
from tests.test_image_worker import CONFIG
from tests.test_store import sweep_later
from tests.torn import torn_before

GRAPH = "tests.toys.picturing:Frontend"
RETRY = "--ImageWorker.jobs.retry-seconds=1"
DISK, ROOM = "256k", "16m"
JOBS, EACH = 16, 3
"""More pictures than `DISK` takes: with its record each needs two pages of four kilobytes at least."""
STEPS = 2
IN_VAIN = 4
"""Tries of jobs that are waited for while the store can take none of them."""
HALF = 2000
"""Bytes of a connection that arrive: all of a question, and of a picture the first part."""
BROKEN_REPLY = 100
"""Bytes of a connection's replies: a part of the first one's head."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    untrained("pixart")
    path = tmp_path_factory.mktemp("stores") / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def stores(**keys: str) -> list[str]:
    """The same for both services that have one."""
    return [
        f"--{service}.store.{key.replace('_', '-')}={value}"
        for service in ("Frontend", "ImageWorker")
        for key, value in keys.items()
    ]


def body(number: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"picture {number}", "seed": 10 * number, "num_inference_steps": STEPS, **fields}


def accepted(graph: Graph) -> list[str]:
    replies = [patient(graph, "POST", "/v1/images/jobs", json=body(number, n=EACH)) for number in range(JOBS)]
    assert {reply.status_code for reply in replies} == {202}
    return [str(reply.json()["id"]) for reply in replies]


def states(graph: Graph, ids: list[str]) -> Counter[str]:
    """How many jobs are how far."""
    return Counter(httpx.get(f"{graph.url}/v1/images/jobs/{id}", timeout=60).json()["status"] for id in ids)


def with_address(graph: Graph, number: int) -> Reply:
    """The reply to who wants a picture kept, and does not wait for a job."""
    return send(graph, "POST", "/v1/images/generations", body(JOBS + number, response_format="url"))


def finished(graph: Graph, ids: list[str]) -> list[list[dict[str, Any]]]:
    """Each job's pictures. Fails unless all are there, and no wait for the store counted as an attempt."""
    found = [ended(graph, id) for id in ids]
    assert Counter((one["status"], one["attempts"], len(one.get("data", []))) for one in found) == {
        ("completed", 1, EACH): JOBS
    }, found
    return [one["data"] for one in found]


def right(graph: Graph, number: int, file: bytes) -> bool:
    """Whether this is the first picture of a job."""
    made = patient(graph, "POST", "/v1/images/generations", json=body(number)).json()["data"][0]["b64_json"]
    return same_picture(pixels(file), pixels(made))


def test_a_full_disk_holds_jobs_up_and_shows_no_picture_in_part(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs come until it is full, and are done once there is room. What found room meanwhile stands."""
    with small_disk(tmp_path / "disk", DISK) as disk:
        store = disk / "store"
        with serve(GRAPH, config, *stores(url=str(store)), RETRY) as graph:
            ids = accepted(graph)
            kept, refusal = until_full(graph)
            refused_as_unavailable(refusal)
            failures = full(graph)
            eventually(lambda: full(graph) >= failures + IN_VAIN, "jobs are tried in vain", 120)
            assert states(graph, ids).keys() <= {"queued", "in_progress", "completed"}
            assert states(graph, ids)["completed"] < JOBS
            early = all_whole(graph)
            assert early.keys() >= kept
            enlarge(disk, ROOM)
            made = finished(graph, ids)
            names = sorted(kept | {one["id"] for pictures in made for one in pictures})
            late = all_whole(graph)
            assert sorted(late) == names
            assert {id: late[id] for id in early} == early, "what was there was not made again"
            assert all(right(graph, number, late[made[number][0]["id"]]) for number in range(0, JOBS, 5))
        assert sorted(path.stem for path in (store / "about" / "everyone").glob("*.json")) == names
        # What was written before its record found no room belongs to nobody, and goes in time.
        asyncio.run(sweep_later(Store(StoreConfig(url=str(store))), monkeypatch))
        files = (store / "data" / "everyone").iterdir()
        assert sorted(path.name.partition(".")[0] for path in files) == names, "each is stored once"


def until_full(graph: Graph) -> tuple[set[str], Reply]:
    """What was kept for those who wanted an address, until one of them was refused, and that refusal."""
    kept: set[str] = set()
    while (reply := with_address(graph, len(kept))).status == 200:
        kept.add(json.loads(reply.body)["data"][0]["id"])
        assert len(kept) < JOBS * EACH, "the disk is larger than it should be"
    return kept, reply


def full(graph: Graph) -> int:
    """How often the image workers have found no room."""
    return sum("the object store is full" in line for line in list(graph.lines))


def all_whole(graph: Graph) -> dict[str, bytes]:
    """Every picture that clients can see, by id: whole, or `pixels` fails."""
    listed = json.loads(send(graph, "GET", "/v1/images?limit=100", headers=()).body)["data"]
    files = {one["id"]: send(graph, "GET", f"/v1/images/{one['id']}", headers=()).body for one in listed}
    assert {id: len(file) for id, file in files.items()} == {one["id"]: one["bytes"] for one in listed}
    assert all(pixels(file).size for file in files.values())
    return files


def test_uploads_to_s3_that_are_torn_hold_jobs_up_and_leave_nothing_to_see(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of each picture arrives, then all of one whose sender never learns it: neither is there. Once the way is
    whole every job is done."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server, torn_before(server) as torn:
        url, endpoint = f"s3://{server.bucket}/made", f"http://127.0.0.1:{torn.port}"
        more = stores(url=url, endpoint=endpoint, allow_http="true", region=REGION, timeout="2")
        torn.sent = HALF  # from the first connection on: those that are open go on as they began
        with serve(GRAPH, config, *more, RETRY) as graph:
            ids = accepted(graph)
            eventually(lambda: torn.cuts >= IN_VAIN * JOBS, "uploads are torn", 120)
            refused_as_unavailable(with_address(graph, 0))
            nothing_to_see(graph, server, ids)
            torn.sent, torn.received, there = None, BROKEN_REPLY, keys(server, "data")
            eventually(lambda: asked_in_vain(graph, server) != there, "bytes arrive whose sender never learns it", 120)
            nothing_to_see(graph, server, ids)
            torn.received = None
            pictures = finished(graph, ids)
            assert_stored(graph, pictures)
        names = sorted(one["id"] for some in pictures for one in some)
        assert [key.rpartition("/")[2].removesuffix(".json") for key in keys(server, "about")] == names
        straight = StoreConfig(url=url, endpoint=server.endpoint, allow_http=True, region=REGION)
        asyncio.run(sweep_later(Store(straight), monkeypatch))  # of what nobody was told that it had arrived
        assert [key.rpartition("/")[2].partition(".")[0] for key in keys(server, "data")] == names


def nothing_to_see(graph: Graph, server: S3Server, ids: list[str]) -> None:
    assert states(graph, ids).keys() <= {"queued", "in_progress"}
    assert keys(server, "about") == []


def asked_in_vain(graph: Graph, server: S3Server) -> list[str]:
    """Asks for a picture's address, and is refused. Returns what bytes are there, for nobody."""
    refused_as_unavailable(with_address(graph, 1))
    return keys(server, "data")


def assert_stored(graph: Graph, pictures: list[list[dict[str, Any]]]) -> None:
    """Each is whole at its address, and what its prompt and seed give."""
    files = {one["id"]: httpx.get(one["url"], timeout=60).content for some in pictures for one in some}
    assert all(pixels(file).size for file in files.values())
    assert {id: len(file) for id, file in files.items()} == {
        one["id"]: one["bytes"] for some in pictures for one in some
    }
    assert all(right(graph, number, files[pictures[number][0]["id"]]) for number in range(0, JOBS, 5))


def keys(server: S3Server, part: str) -> list[str]:
    """Of all objects of a part of the store, sorted, by a look that does not go through it."""
    found = server.client().list_objects_v2(Bucket=server.bucket, Prefix=f"made/{part}/")
    return [str(one["Key"]) for one in found.get("Contents", [])]
