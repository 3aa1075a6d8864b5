# SPDX-License-Identifier: Apache-2.0
"""The object store on a directory and on a real S3 server: the same promises on both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from dynamo_epd.errors import EpdError, Gone, InternalError, InvalidRequest, NotFound, PayloadTooLarge, StageUnavailable
from dynamo_epd.store import Store, StoreConfig, Stored, new_id
from tests.s3_server import CREDENTIALS, S3Server, s3_server
from tests.small_disk import enlarge, small_disk
from tests.torn import Torn
from tests.toys.running import ROOT

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
ABOUT = {"prompt": "a large red star", "seed": 7, "model": "tiny-image", "width": 64, "height": 64}

WRITER = """
import asyncio, json, os, sys
from dynamo_epd.store import Store, StoreConfig

config, tenant, ids, mark = json.loads(sys.argv[1])

async def main():
    stored = [0]
    def count(): stored[0] += 1
    store = Store(StoreConfig(**config), on_stored=count)
    await store.recent("", 1)
    print("ready", flush=True)
    sys.stdin.readline()
    keys = {}
    for id in ids:
        keys[id] = (await store.put(tenant, id, (mark * 20000).encode(), "image/png", {"by": mark})).key
    print(json.dumps([stored[0], keys]), flush=True)

asyncio.run(main())
"""
"""Puts each id once, when told to, and says how many it was first with and what each put returned."""


class Held:
    """Where a test keeps its objects, and a look at it that does not go through the store."""

    def __init__(self, config: StoreConfig, server: S3Server | None):
        self.config = config
        self._server = server

    @property
    def is_s3(self) -> bool:
        return self._server is not None

    def objects(self) -> list[str]:
        """Every object of the store that is no lock, sorted."""
        if self._server is None:
            root = self.config.directory
            found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
        else:
            prefix = self.config.prefix + "/"
            pages = (
                self._server.client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self._server.bucket, Prefix=prefix)
            )
            found = [one["Key"].removeprefix(prefix) for page in pages for one in page.get("Contents", [])]
        return sorted(found)

    def write(self, key: str, data: bytes) -> None:
        if self._server is None:
            path = self.config.directory / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        else:
            self._server.client().put_object(Bucket=self._server.bucket, Key=f"{self.config.prefix}/{key}", Body=data)

    def remove(self, key: str) -> None:
        if self._server is None:
            (self.config.directory / key).unlink()
        else:
            self._server.client().delete_object(Bucket=self._server.bucket, Key=f"{self.config.prefix}/{key}")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["directory", "s3"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Held:
    if request.param == "directory":
        return Held(StoreConfig(url=str(tmp_path / "store")), None)
    server = request.getfixturevalue("server")
    return Held(in_bucket(server, f"{new_id()}/pictures"), server)


def in_bucket(server: S3Server, prefix: str, **other: Any) -> StoreConfig:
    return StoreConfig(url=f"s3://{server.bucket}/{prefix}", endpoint=server.endpoint, allow_http=True, **other)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await test()

    asyncio.run(bounded())


async def refusal(what: Awaitable[Any]) -> EpdError:
    try:
        result = await what
    except EpdError as error:
        return error
    raise AssertionError(f"it was not refused: {result!r}")


def test_a_stored_object_comes_back_whole_and_in_parts(held: Held) -> None:
    async def test() -> None:
        counted: list[int] = []
        store = Store(held.config, on_stored=lambda: counted.append(1))
        id = new_id()
        before = time.time()
        stored = await store.put("ann", id, PNG, "image/png", ABOUT)
        assert (stored.id, stored.media_type, stored.size, stored.about) == (id, "image/png", len(PNG), ABOUT)
        assert before <= stored.created <= time.time()
        assert stored.expires == pytest.approx(stored.created + held.config.ttl)
        other = Store(held.config)
        assert await other.head("ann", id) == stored
        assert await other.get("ann", id) == PNG
        assert await other.get("ann", id, 100, 200) == PNG[100:200]
        assert await other.get("ann", id, len(PNG) - 5) == PNG[-5:]
        assert await other.get("ann", id, 10, 10**9) == PNG[10:]
        assert await other.get("ann", id, len(PNG)) == b""
        assert await other.get("ann", id, 9, 9) == b""
        assert [piece async for piece in other.pieces("ann", stored, 1, 2)] == [PNG[1:2]]
        assert counted == [1]

    run(test)


def test_an_empty_object_is_one(held: Held) -> None:
    async def test() -> None:
        store = Store(held.config)
        stored = await store.put("", "img-none", b"", "image/png", {})
        assert stored.size == 0 and await store.get("", "img-none") == b""

    run(test)


def test_a_second_put_changes_nothing(held: Held) -> None:
    async def test() -> None:
        counted: list[int] = []
        store = Store(held.config, on_stored=lambda: counted.append(1))
        id = new_id()
        first = await store.put("ann", id, PNG, "image/png", ABOUT)
        again = await Store(held.config).put("ann", id, b"something else", "image/webp", {"seed": 8}, ttl=5)
        assert again == first == await store.head("ann", id)
        assert await store.get("ann", id) == PNG
        await store.annotate("ann", id, {"caption": "a star"})
        assert (await store.put("ann", id, PNG, "image/png", ABOUT)).about == ABOUT | {"caption": "a star"}
        assert counted == [1]
        assert len(held.objects()) == 2, "one record and the first one's bytes"

    run(test)


def test_processes_that_put_the_same_ids_store_each_once(held: Held) -> None:
    ids = [f"img-{index}" for index in range(25)]
    writers = [start_writer(held.config, "ann", ids, mark) for mark in "abcd"]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    results = [told.communicate("go\n", timeout=240)[0] for told in go(writers)]
    counts, returned = zip(*map(json.loads, results), strict=True)
    assert sum(counts) == len(ids)
    assert all(one == returned[0] for one in returned), "everybody was told of the same object"
    assert len(held.objects()) == 2 * len(ids), "the others' bytes are gone"

    async def test() -> None:
        store = Store(held.config)
        for id in ids:
            stored = await store.head("ann", id)
            assert await store.get("ann", id) == stored.about["by"].encode() * 20000

    run(test)


def start_writer(config: StoreConfig, tenant: str, ids: list[str], mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, json.dumps([asdict(config), tenant, ids, mark])],
        cwd=ROOT,
        env=os.environ | CREDENTIALS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(writers: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """All are told before the first is waited for."""
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return writers


class LaterClockDouble:
    """Stands for the clock of a sweep two hours later: nobody has to wait until a dead writer is known for dead."""

    @staticmethod
    def time() -> float:
        return time.time() + 7200


async def sweep_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patched:
        for module in ("store", "backend"):  # of files that were being written the backend itself says how old they are
            patched.setattr(f"dynamo_epd.store.{module}.time", LaterClockDouble)
        return await store.sweep()


KILLED = """
import asyncio, json, os, signal, sys
from dynamo_epd.store import Store, StoreConfig

config, tenant, id = json.loads(sys.argv[1])

async def main():
    store = Store(StoreConfig(**config))
    create = store._backend.create
    async def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    store._backend.create = die
    await store.put(tenant, id, b"x" * 5000, "image/png", {})

asyncio.run(main())
"""
"""A writer that is killed when its bytes are there and its record is not."""


@pytest.mark.parametrize("put_again", [False, True])
def test_a_writer_killed_half_way_leaves_nothing_to_see_and_its_bytes_are_swept(
    held: Held, monkeypatch: pytest.MonkeyPatch, put_again: bool
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps([asdict(held.config), "ann", "img-half"])],
        cwd=ROOT,
        env=os.environ | CREDENTIALS,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL
    (left,) = held.objects()
    assert left.startswith("data/")

    async def test() -> None:
        expired: list[int] = []
        store = Store(held.config, on_expired=lambda: expired.append(1))
        assert isinstance(await refusal(store.head("ann", "img-half")), NotFound)
        assert isinstance(await refusal(store.get("ann", "img-half")), NotFound)
        assert await store.recent("ann", 10) == []
        assert await store.sweep() == 0
        assert held.objects() == [left], "it may be a live writer's"
        if put_again:
            stored = await store.put("ann", "img-half", PNG, "image/png", {})
        assert await sweep_later(store, monkeypatch) == 0
        assert expired == []
        if put_again:
            assert len(held.objects()) == 2 and left not in held.objects()
            assert await store.head("ann", "img-half") == stored
            assert await store.get("ann", "img-half") == PNG
        else:
            assert held.objects() == []

    run(test)


def test_a_sweep_of_a_dead_writers_bytes_leaves_a_live_ones_alone(tmp_path: Path) -> None:
    config = StoreConfig(url=str(tmp_path))
    arguments = [sys.executable, "-c", KILLED, json.dumps([asdict(config), "ann", "img-half"])]
    for _ in range(2):
        assert subprocess.run(arguments, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    old, young = (tmp_path / "data" / "tenant-ann").iterdir()
    os.utime(old, (time.time() - 2 * config.leftover_seconds,) * 2)

    async def test() -> None:
        assert await Store(config).sweep() == 0
        assert young.exists() and not old.exists()

    run(test)


def test_what_a_writer_was_writing_to_disk_is_swept(tmp_path: Path) -> None:
    config = StoreConfig(url=str(tmp_path))

    async def test() -> None:
        store = Store(config)
        await store.put("ann", "img-1", PNG, "image/png", {})
        new = tmp_path / "data" / "tenant-ann" / "img-2.99999999999.0123456789abcdef#1"
        old = new.with_name("img-3.99999999999.0123456789abcdef#1")
        for path in (new, old):
            path.write_bytes(b"half of i")
        os.utime(old, (time.time() - 2 * config.leftover_seconds,) * 2)
        assert [stored.id for stored in await store.recent("ann", 9)] == ["img-1"]
        assert await store.sweep() == 0
        assert new.exists() and not old.exists()
        assert await store.get("ann", "img-1") == PNG

    run(test)


def test_what_has_expired_is_not_found_and_is_swept_once(held: Held) -> None:
    async def test() -> None:
        expired: list[int] = []
        store = Store(held.config, on_expired=lambda: expired.append(1))
        other = Store(held.config, on_expired=lambda: expired.append(1))
        kept = await store.put("ann", new_id(), PNG, "image/png", {})
        short = [await store.put(tenant, new_id(), PNG, "image/png", {}, ttl=0.5) for tenant in ("", "ann", "bob") * 8]
        await asyncio.sleep(max(0, short[-1].expires - time.time()))
        assert isinstance(await refusal(store.head("ann", short[1].id)), NotFound)
        assert isinstance(await refusal(store.get("ann", short[1].id)), NotFound)
        assert isinstance(await refusal(store.annotate("ann", short[1].id, {"late": 1})), NotFound)
        assert isinstance(await refusal(store.delete("ann", short[1].id)), NotFound)
        assert await store.recent("ann", 10) == [kept]
        assert store.address(short[1], "ann") is None
        swept = 0
        end = time.monotonic() + 60
        while swept < len(short):
            assert time.monotonic() < end, held.objects()
            swept += sum(await asyncio.gather(store.sweep(), other.sweep()))
        assert swept == len(expired) == len(short)
        assert await store.sweep() == 0
        left = [key for key in held.objects() if kept.id not in key]
        assert len(left) == len(short) and all(key.startswith("gone/") for key in left)
        assert await store.get("ann", kept.id) == PNG

    run(test)


def test_what_has_expired_is_gone_for_its_tenant_and_not_for_ever(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        store = Store(held.config)
        for id in ("img-1", "img-2", "img-3"):
            await store.put("ann", id, PNG, "image/png", {}, ttl=0.2)
        deleted = await store.put("ann", "img-4", PNG, "image/png", {}, ttl=60)
        await store.delete("ann", deleted.id)
        await asyncio.sleep(0.3)
        for swept in (False, True):
            if swept:
                assert await sweep_later(store, monkeypatch) == 3
                assert len(held.objects()) == 3
            for ask in (store.head, store.get, store.delete):
                assert isinstance(await refusal(ask("ann", "img-1")), Gone)
                for tenant, id in (("bob", "img-1"), ("", "img-1"), ("ann", "img-0"), ("ann", "img-4")):
                    assert type(await refusal(ask(tenant, id))) is NotFound
        again = await store.put("ann", "img-1", b"anew", "image/png", {})
        assert await store.head("ann", "img-1") == again
        monkeypatch.setattr("dynamo_epd.store.store.MAX_GONE", 2)
        assert await store.sweep() == 0
        gone = [key for key in held.objects() if key.startswith("gone/")]
        assert len(gone) == 2
        monkeypatch.setattr("dynamo_epd.store.store.GONE_SECONDS", 7000.0)
        assert await sweep_later(store, monkeypatch) == 0
        assert len(held.objects()) == 2, "one record and its bytes"
        assert type(await refusal(store.head("ann", "img-2"))) is NotFound

    run(test)


def test_an_object_is_read_piece_by_piece(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_epd.store.store.PIECE", 1000)

    async def test() -> None:
        store = Store(held.config)
        stored = await store.put("", "img-1", PNG, "image/png", {})

        async def pieces(start: int = 0, end: int | None = None) -> list[bytes]:
            return [piece async for piece in store.pieces("", stored, start, end)]

        whole = await pieces()
        assert b"".join(whole) == PNG
        assert {len(piece) for piece in whole[:-1]} == {1000}
        assert b"".join(await pieces(10, 5000)) == PNG[10:5000]
        (key,) = (key for key in held.objects() if key.startswith("data/"))
        held.write(key, b"?" + PNG[1:])
        passed = []

        async def pass_on() -> None:
            async for piece in store.pieces("", stored):
                passed.append(piece)

        with pytest.raises(InternalError):
            await pass_on()
        assert sum(map(len, passed)) == len(PNG) - len(whole[-1]), "all but the last"

    run(test)


FILLING = """
import asyncio, json, resource, sys
from dynamo_epd.errors import EpdError
from dynamo_epd.store import Store, StoreConfig

config, limit = json.loads(sys.argv[1])

async def main():
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    store = Store(StoreConfig(**config))
    await store.put("ann", "img-small", b"s" * 1000, "image/png", {})
    try:
        await store.put("ann", "img-large", b"x" * 2_000_000, "image/png", {})
    except EpdError as error:
        print(json.dumps([type(error).__name__, error.message, error.retry_after]))

asyncio.run(main())
"""
"""Puts a small object, and a large one that does not fit, and says what was said of it."""


@pytest.mark.parametrize("how", ["a full disk", "a limit of file sizes"])
def test_what_no_room_is_left_for_is_not_there_and_can_be_stored_later(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = how == "a full disk"
    with small_disk(tmp_path, "1m") if disk else contextlib.nullcontext():
        config = StoreConfig(url=str(tmp_path / "store"))
        held = Held(config, None)
        arguments = [sys.executable, "-c", FILLING, json.dumps([asdict(config), 0 if disk else 100_000])]
        filled = subprocess.run(arguments, cwd=ROOT, timeout=120, capture_output=True, text=True)
        assert json.loads(filled.stdout) == ["StageUnavailable", "the object store is full", 5.0]

        async def test() -> None:
            store = Store(config)
            assert [stored.id for stored in await store.recent("ann", 9)] == ["img-small"]
            assert await store.get("ann", "img-small") == b"s" * 1000
            assert type(await refusal(store.head("ann", "img-large"))) is NotFound
            assert await sweep_later(store, monkeypatch) == 0
            assert len(held.objects()) == 2, "half a file is swept"

        async def later() -> None:
            store = Store(config)
            await store.put("ann", "img-large", b"x" * 2_000_000, "image/png", {})
            assert await store.get("ann", "img-large") == b"x" * 2_000_000

        run(test)
        if disk:
            enlarge(tmp_path, "8m")
        run(later)


def test_a_full_disk_is_swept(tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m"):

        async def test() -> None:
            store = Store(StoreConfig(url=str(tmp_path / "store")))
            await store.put("ann", "img-1", bytes(300_000), "image/png", {}, ttl=0.1)
            with pytest.raises(OSError, match="No space"):
                (tmp_path / "other").write_bytes(bytes(2_000_000))
            end = time.monotonic() + 60
            while not await store.sweep():
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
            assert isinstance(await refusal(store.head("ann", "img-1")), Gone)
            await store.put("ann", "img-2", bytes(200_000), "image/png", {})

        run(test)


def test_annotations_of_many_are_all_kept(held: Held) -> None:
    async def test() -> None:
        stores = [Store(held.config) for _ in range(3)]
        first = await stores[0].put("ann", "img-1", PNG, "image/png", ABOUT)
        await asyncio.gather(
            *(stores[index % 3].annotate("ann", "img-1", {f"note{index}": index}) for index in range(12))
        )
        after = await stores[0].annotate("ann", "img-1", {"seed": 8})
        assert after.about == ABOUT | {f"note{index}": index for index in range(12)} | {"seed": 8}
        assert after == await stores[1].head("ann", "img-1")
        assert (after.etag, after.created, after.expires) == (first.etag, first.created, first.expires)
        assert await stores[2].get("ann", "img-1") == PNG
        assert isinstance(await refusal(stores[0].annotate("ann", "img-2", {})), NotFound)
        assert isinstance(await refusal(stores[0].annotate("bob", "img-1", {})), NotFound)

    run(test)


def test_one_of_those_who_delete_has_deleted(held: Held) -> None:
    async def test() -> None:
        store, other = Store(held.config), Store(held.config)
        await store.put("ann", "img-1", PNG, "image/png", {})
        answers = await asyncio.gather(
            *(one.delete("ann", "img-1") for one in (store, other) * 3),
            *(one.annotate("ann", "img-1", {"late": True}) for one in (store, other)),
            return_exceptions=True,
        )
        assert answers[:6].count(None) == 1, answers
        assert all(answer is None or isinstance(answer, NotFound | Stored) for answer in answers), answers
        assert isinstance(await refusal(store.head("ann", "img-1")), NotFound)
        assert isinstance(await refusal(store.delete("ann", "img-1")), NotFound)
        assert held.objects() == []
        again = await store.put("ann", "img-1", b"anew", "image/png", {})
        assert again.size == 4 and await other.get("ann", "img-1") == b"anew"

    run(test)


def test_recent_gives_the_newest_first_and_only_ones_own(held: Held) -> None:
    async def test() -> None:
        store = Store(held.config)
        ids = [new_id() for _ in range(30)]
        assert sorted(ids, reverse=True) == ids, "the newest sorts first"
        for id in ids[::2] + ids[1::2]:
            await store.put("ann", id, b"1", "image/png", {"id": id})
        await store.put("bob", new_id(), b"2", "image/png", {})
        await store.put("", new_id(), b"3", "image/png", {})
        for id in ids[-3:]:
            await store.delete("ann", id)
        left = ids[-4::-1]
        assert [stored.id for stored in await store.recent("ann", 10)] == left[:10]
        assert [stored.id for stored in await store.recent("ann", 10**6)] == left
        assert [stored.about["id"] for stored in await store.recent("ann", 3)] == left[:3]
        assert await store.recent("ann", 0) == []
        assert await store.recent("nobody", 5) == []
        assert [stored.size for stored in await store.recent("", 5)] == [1]

    run(test)


def test_tenants_do_not_see_each_others(held: Held) -> None:
    async def test() -> None:
        store = Store(held.config)
        for tenant in ("", "ann", "everyone", "tenant-ann"):
            await store.put(tenant, "img-1", tenant.encode() or b"-", "image/png", {})
        for tenant in ("", "ann", "everyone", "tenant-ann"):
            assert await store.get(tenant, "img-1") == (tenant.encode() or b"-")
        await store.put("ann", "img-2", PNG, "image/png", {})
        for ask in (store.head, store.get, store.delete):
            assert isinstance(await refusal(ask("bob", "img-2")), NotFound)

    run(test)


OUTSIDE = [
    "..",
    "../img-1",
    "a/../../b",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "",
    ".",
    "-x",
    "a.json",
    "x" * 129,
    "a\0",
    "é",
    "a\n",
]


@pytest.mark.parametrize("id", OUTSIDE)
def test_no_id_leads_outside(held: Held, id: str) -> None:
    async def test() -> None:
        store = Store(held.config)
        assert isinstance(await refusal(store.put("ann", id, PNG, "image/png", {})), InvalidRequest)
        for ask in (store.head, store.get, store.delete):
            assert isinstance(await refusal(ask("ann", id)), NotFound)
        assert isinstance(await refusal(store.annotate("ann", id, {})), NotFound)
        assert held.objects() == []

    run(test)


@pytest.mark.parametrize("tenant", ["..", "a/b", "../ann", "a.b", "x" * 129, "ann\n"])
def test_no_tenant_leads_outside(tmp_path: Path, tenant: str) -> None:
    async def test() -> None:
        store = Store(StoreConfig(url=str(tmp_path / "store")))
        with pytest.raises(ValueError, match="tenant"):
            await store.put(tenant, "img-1", PNG, "image/png", {})
        with pytest.raises(ValueError, match="tenant"):
            await store.recent(tenant, 1)

    run(test)


def test_what_is_too_large_is_refused(held: Held) -> None:
    async def test() -> None:
        store = Store(replace(held.config, max_bytes=1000))
        assert isinstance(await refusal(store.put("", "img-1", bytes(1001), "image/png", {})), PayloadTooLarge)
        assert isinstance(
            await refusal(store.put("", "img-1", b"", "image/png", {"prompt": "x" * 600_000})), PayloadTooLarge
        )
        await store.put("", "img-1", bytes(1000), "image/png", {"prompt": "\N{SNOWMAN}" * 64_000})
        assert isinstance(await refusal(store.annotate("", "img-1", {"more": "x" * 600_000})), PayloadTooLarge)
        assert isinstance(await refusal(store.put("", "img-2", b"", "text/html; x=y", {})), InvalidRequest)
        assert (await store.head("", "img-1")).about == {"prompt": "\N{SNOWMAN}" * 64_000}

    run(test)


def test_damaged_bytes_are_never_served(held: Held) -> None:
    async def test() -> None:
        store = Store(held.config)
        stored = await store.put("", "img-1", PNG, "image/png", {})
        (key,) = (key for key in held.objects() if key.startswith("data/"))
        for damaged in (PNG[:-1] + b"!", PNG[:100], PNG + b"more"):
            held.write(key, damaged)
            if damaged[: len(PNG)] == PNG:
                assert await store.get("", "img-1") == PNG, "what follows them is not read"
            else:
                error = await refusal(store.get("", "img-1"))
                assert isinstance(error, InternalError) and "img" not in error.message
        held.write(key, PNG[:100])
        assert isinstance(await refusal(store.get("", "img-1", 50, 200)), InternalError)
        assert isinstance(await refusal(store.get("", "img-1", 150, 200)), EpdError)
        held.remove(key)
        assert isinstance(await refusal(anext(store.pieces("", stored))), NotFound)

    run(test)


def test_a_damaged_record_is_an_error_and_spoils_no_list(held: Held) -> None:
    async def test() -> None:
        store = Store(held.config)
        good = await store.put("", "img-1", PNG, "image/png", {})
        await store.put("", "img-2", PNG, "image/png", {}, ttl=0.5)
        (key,) = (key for key in held.objects() if key.endswith("img-2.json"))
        held.write(key, b'{"id": "img-2", "size')
        assert isinstance(await refusal(store.head("", "img-2")), InternalError)
        assert await store.recent("", 9) == [good]
        end = time.monotonic() + 60
        while any("img-2" in key for key in held.objects()):
            assert time.monotonic() < end, held.objects()
            assert await store.sweep() == 0
        assert await store.recent("", 9) == [good]

    run(test)


def test_bytes_that_are_lost_can_be_stored_again(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        store = Store(held.config)
        await store.put("", "img-1", PNG, "image/png", {})
        kept = await store.put("", "img-2", PNG, "image/png", {})
        (key,) = (key for key in held.objects() if key.startswith("data/everyone/img-1"))
        held.remove(key)
        assert await sweep_later(store, monkeypatch) == 0
        assert [stored.id for stored in await store.recent("", 9)] == ["img-2"]
        await store.put("", "img-1", PNG, "image/png", {})
        assert await store.get("", "img-1") == PNG
        assert await store.head("", "img-2") == kept

    run(test)


def test_a_delete_that_was_killed_half_way_is_finished(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        store = Store(held.config)
        await store.put("", "img-1", PNG, "image/png", {})
        (key,) = (key for key in held.objects() if key.startswith("about/"))
        held.write(key, b"null")
        assert isinstance(await refusal(store.head("", "img-1")), NotFound)
        assert await store.recent("", 9) == []
        assert await store.sweep() == 0
        assert len(held.objects()) == 2, "whoever deletes it may be alive"
        assert await sweep_later(store, monkeypatch) == 0
        assert held.objects() == []
        assert await store.put("", "img-1", PNG, "image/png", {})

    run(test)


def test_what_is_not_the_stores_is_left_alone(held: Held) -> None:
    foreign = ["about/everyone/readme.txt", "data/everyone/notes.txt", "data/tenant-/x.png", "other/file.json"]

    async def test() -> None:
        store = Store(held.config)
        for key in foreign:
            held.write(key, b"mine")
        assert await store.recent("", 9) == []
        assert await store.sweep() == 0
        assert held.objects() == sorted(foreign)

    run(test)


def test_a_directory_has_no_addresses(tmp_path: Path) -> None:
    async def test() -> None:
        store = Store(StoreConfig(url=f"file://{tmp_path}/with%20space"))
        stored = await store.put("", "img-1", PNG, "image/png", {})
        assert store.address(stored, "") is None
        assert (tmp_path / "with space" / "about").is_dir()

    run(test)


def test_the_default_directory_lies_with_the_users_other_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    async def test() -> None:
        await Store(StoreConfig()).put("", "img-1", PNG, "image/png", {})
        assert (tmp_path / "dynamo" / "store" / "about" / "everyone" / "img-1.json").is_file()
        assert (tmp_path / "dynamo" / "store").stat().st_mode & 0o077 == 0

    run(test)


def test_a_directory_that_cannot_be_made_is_said_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")

    async def test() -> None:
        store = Store(StoreConfig(url=str(tmp_path / "file" / "store")))
        error = await refusal(store.put("", "img-1", PNG, "image/png", {}))
        assert isinstance(error, StageUnavailable) and error.retry_after and str(tmp_path) not in error.message

    run(test)


def test_a_presigned_address_downloads_until_it_ends(server: S3Server) -> None:
    async def test() -> None:
        store = Store(in_bucket(server, new_id(), url_seconds=600))
        stored = await store.put("ann", new_id(), PNG, "image/webp", {})
        address = store.address(stored, "ann")
        assert address is not None
        reply = await download(address)
        assert reply.status_code == 200 and reply.content == PNG
        assert reply.headers["content-type"] == "image/webp"
        assert f'filename="{stored.id}.webp"' in reply.headers["content-disposition"]
        assert signed_seconds(address) == 600
        short = await store.put("ann", new_id(), PNG, "image/png", {}, ttl=60)
        ends = store.address(short, "ann")
        assert ends is not None and 50 <= signed_seconds(ends) <= 60, "never longer than the object"

    run(test)


async def download(address: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(address)


def signed_seconds(address: str) -> int:
    return int(parse_qs(urlsplit(address).query)["X-Amz-Expires"][0])


def test_addresses_are_signed_for_the_public_endpoint(server: S3Server) -> None:
    async def test() -> None:
        public = server.endpoint.replace("127.0.0.1", "localhost")
        plain = in_bucket(server, new_id())
        store = Store(replace(plain, public_endpoint=public))
        stored = await store.put("", new_id(), PNG, "image/png", {})
        address = store.address(stored, "")
        assert address is not None
        assert urlsplit(address).netloc == f"localhost:{server.port}"
        assert (await download(address)).content == PNG
        private = Store(plain).address(stored, "")
        assert private is not None and urlsplit(private).netloc == f"127.0.0.1:{server.port}"
        far = Store(replace(plain, public_endpoint="https://pictures.example.org")).address(stored, "")
        assert far is not None and far.startswith("https://pictures.example.org/")
        # The host is part of what is signed: with another one the signature is another, whenever it was made.
        assert parse_qs(urlsplit(far).query)["X-Amz-SignedHeaders"] == ["host"]

    run(test)


def test_the_environment_does_not_overrule_the_configured_endpoint(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    async def test() -> None:
        store = Store(in_bucket(server, new_id()))
        await store.put("", "img-1", PNG, "image/png", {})
        assert await store.get("", "img-1") == PNG

    run(test)


def test_a_bucket_that_is_not_there_is_said(server: S3Server) -> None:
    async def test() -> None:
        store = Store(replace(in_bucket(server, ""), url="s3://nobodys-bucket/x"))
        for ask in (
            store.put("", "img-1", PNG, "image/png", {}),
            store.head("", "img-1"),
            store.recent("", 3),
            store.sweep(),
        ):
            error = await refusal(ask)
            assert isinstance(error, StageUnavailable)
            assert error.message == "the object store's bucket does not exist"

    run(test)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_server_that_is_down_is_an_error_within_the_bound_and_then_it_works_again(how: str) -> None:
    with s3_server() as server:
        config = in_bucket(server, "x", timeout=5.0)

        async def test() -> None:
            store = Store(config)
            await store.put("", "img-1", PNG, "image/png", {})
            if how == "stopped":
                server.pause()
            else:
                server.kill()
            stored = Stored("img-1", "image/png", 1, "", 0, 1, {}, "img-1.1.0123456789abcdef")
            async with asyncio.timeout(4 * config.timeout):
                errors = await asyncio.gather(
                    refusal(store.put("", "img-2", PNG, "image/png", {})),
                    refusal(store.head("", "img-1")),
                    refusal(anext(store.pieces("", stored))),
                    refusal(store.annotate("", "img-1", {})),
                    refusal(store.delete("", "img-1")),
                    refusal(store.recent("", 5)),
                    refusal(store.sweep()),
                )
            for error in errors:
                assert isinstance(error, StageUnavailable) and error.retry_after
                assert error.message == "the object store cannot be reached"
            if how == "stopped":
                server.resume()
            else:
                server.start()
                assert isinstance(await refusal(store.head("", "img-1")), NotFound)
            # What was asked in vain may have been heard: to ask again is right, whatever has become of it.
            again = await store.put("", "img-2", PNG, "image/png", {"tried": "again"})
            assert await store.get("", "img-2") == PNG
            assert again == await store.head("", "img-2")

        run(test)


def test_a_put_that_waits_for_the_server_ends_when_it_is_back() -> None:
    with s3_server() as server:

        async def test() -> None:
            store = Store(in_bucket(server, "x", timeout=30.0))
            await store.recent("", 1)
            server.pause()
            waiting = asyncio.create_task(store.put("", "img-1", PNG, "image/png", {}))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            server.resume()
            stored = await waiting
            assert stored == await store.head("", "img-1")

        run(test)


@pytest.mark.parametrize("at", [100, 900, 2000, 60_000])
def test_an_upload_that_is_torn_leaves_nothing_to_see(server: S3Server, at: int) -> None:
    """``at``: bytes of each connection that arrive: a part of the headers, and more and more of the body."""
    data = PNG * 10

    async def test() -> None:
        async with Torn(server) as torn:
            whole = in_bucket(server, new_id(), timeout=5.0)
            store, straight = Store(replace(whole, endpoint=f"http://127.0.0.1:{torn.port}")), Store(whole)
            torn.sent = at
            error = await refusal(store.put("ann", "img-1", data, "image/png", {}))
            assert isinstance(error, StageUnavailable)
            assert error.message == "the object store cannot be reached"
            assert torn.cuts >= 1
            assert await straight.recent("ann", 9) == []
            assert type(await refusal(straight.head("ann", "img-1"))) is NotFound
            torn.sent = None
            stored = await store.put("ann", "img-1", data, "image/png", {})
            assert await straight.head("ann", "img-1") == stored
            assert await straight.get("ann", "img-1") == data

    run(test)


def test_a_record_whose_upload_is_torn_is_none(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes arrive, and half the record does."""

    async def test() -> None:
        async with Torn(server) as torn:
            whole = in_bucket(server, new_id(), timeout=5.0)
            store, straight = Store(replace(whole, endpoint=f"http://127.0.0.1:{torn.port}")), Store(whole)
            monkeypatch.setattr(store._backend, "write", straight._backend.write)
            torn.sent = 5_000
            error = await refusal(store.put("ann", "img-1", PNG, "image/png", {"prompt": "x" * 20_000}))
            assert isinstance(error, StageUnavailable)
            assert torn.cuts >= 1
            assert type(await refusal(straight.head("ann", "img-1"))) is NotFound
            torn.sent = None
            await store.put("ann", "img-1", PNG, "image/png", ABOUT)
            assert (await straight.head("ann", "img-1")).about == ABOUT
            assert await straight.get("ann", "img-1") == PNG

    run(test)


def test_a_download_that_is_torn_is_gone_on_with_or_an_error(server: S3Server) -> None:
    async def test() -> None:
        async with Torn(server) as torn:
            whole = in_bucket(server, new_id(), timeout=5.0)
            store, straight = Store(replace(whole, endpoint=f"http://127.0.0.1:{torn.port}")), Store(whole)
            stored = await straight.put("ann", "img-1", PNG, "image/png", {})
            torn.received = len(PNG) // 2  # obstore asks for the rest
            assert await anext(store.pieces("ann", stored)) == PNG
            assert torn.cuts >= 1
            torn.received = 100  # a part of the headers
            assert isinstance(await refusal(anext(store.pieces("ann", stored))), StageUnavailable)
            torn.received = None
            assert await store.get("ann", "img-1") == PNG

    run(test)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "gs://bucket"}, "store.url"),
        ({"url": "s3://"}, "store.url"),
        ({"url": "s3://Bucket/x"}, "store.url"),
        ({"url": "s3://bucket/../x"}, "store.url"),
        ({"url": "file://relative/x", "ttl": 0}, "store.ttl"),
        ({"url": "s3://bucket", "endpoint": "http://127.0.0.1:1"}, "store.allow-http"),
        ({"url": "s3://bucket", "endpoint": "127.0.0.1:1"}, "store.endpoint"),
        ({"url": "s3://bucket", "endpoint": "https://me:secret@host"}, "credentials"),
        ({"url": "s3://bucket", "public_endpoint": "ftp://host"}, "store.public-endpoint"),
        ({"endpoint": "https://host"}, "s3://"),
        ({"url_seconds": 700_000.0}, "store.url-seconds"),
        ({"timeout": 0}, "store.timeout"),
        ({"timeout": 1000.0}, "store.leftover-seconds"),
        ({"ttl": float("nan")}, "store.ttl"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        StoreConfig(**values)
    assert "secret" not in str(refused.value)


def test_importing_and_constructing_load_no_obstore() -> None:
    program = "import sys; from dynamo_epd.store import *; Store(StoreConfig()); assert 'obstore' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_many_puts_gets_and_sweeps_at_once_lose_nothing(held: Held) -> None:
    async def test() -> None:
        stores = [Store(held.config) for _ in range(3)]
        ids = [new_id() for _ in range(40)]

        async def one(index: int) -> None:
            store = stores[index % 3]
            data = f"{index}".encode() * 1000
            await store.put("ann", ids[index], data, "image/png", {"index": index}, ttl=0.2 if index % 4 == 0 else None)
            if index % 4:
                assert await store.get("ann", ids[index]) == data
                await store.annotate("ann", ids[index], {"seen": True})

        async def sweep() -> None:
            for _ in range(5):
                await stores[0].sweep()
                await stores[1].recent("ann", 50)

        await asyncio.gather(sweep(), sweep(), *map(one, range(len(ids))))
        left = {stored.id: stored for stored in await stores[2].recent("ann", 100)}
        for index, id in enumerate(ids):
            if index % 4:
                assert left[id].about == {"index": index, "seen": True}

    run(test)
