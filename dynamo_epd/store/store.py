# SPDX-License-Identifier: Apache-2.0
"""The store: an object exists from the moment its record does, and its record is written last.

``data/<tenant>/<id>.<expiry>.<writer>`` holds the bytes, under a name that no other writer has, and
``about/<tenant>/<id>.json`` is the record, created once and never by two. Readers start at the record, so they never
see half an object, and bytes without a record are a dead writer's, to be swept. ``gone/<tenant>/<id>`` is empty and
says for a while that there was an object whose time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import xxhash

from dynamo_epd.errors import EpdError, Gone, InternalError, InvalidRequest, NotFound, PayloadTooLarge, StageUnavailable
from dynamo_epd.store.config import StoreConfig
from dynamo_epd.store.stored import Stored

if TYPE_CHECKING:
    from dynamo_epd.store.backend import Backend

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
Listed = dict[str, tuple[int, bool]]
"""The bytes of one id in a listing: when they expire (Unix seconds) and whether they are older than a live writer's,
by key."""

MAX_ABOUT = 512 * 1024
"""Bytes of a record: two prompts of the longest kind, and more."""
PIECE = 1024 * 1024
"""Bytes of an object that are in memory at once for one reader."""
GONE_SECONDS = 86_400.0
"""How long it is remembered that an object was there until its time was over."""
MAX_GONE = 100_000
"""Objects of which that is remembered; beyond them the oldest are forgotten sooner."""
MAX_RECENT = 1000
MAX_PASSED_OVER = 1000
"""Records that `Store.recent` reads in vain (expired, damaged) before it gives what it has."""
AT_ONCE = 16
"""Requests of one call that run side by side."""
PAUSE = 0.02
"""Seconds, about, until something that another process was changing is looked at again."""
GONE = b"null"
"""The record of an object that is being deleted: of several who want to delete it, one writes this."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_TENANT = re.compile(r"[A-Za-z0-9_-]{0,128}")
_MEDIA_TYPE = re.compile(r"[a-z]{1,32}/[a-z0-9.+-]{1,64}")
_RECORD = re.compile(r"about/(?P<tenant>[\w-]+)/(?P<id>[\w-]+)\.json", re.ASCII)
_GONE = re.compile(r"gone/[\w-]+/[\w-]+", re.ASCII)
_DATA = re.compile(r"data/(?P<tenant>[\w-]+)/(?P<key>(?P<id>[\w-]+)\.(?P<expires>\d{1,12})\.[0-9a-f]{16})", re.ASCII)


class Store:
    """One per process. Constructing asks nothing of the store; the first operation opens it.

    Every operation raises `StageUnavailable`, with ``retry_after``, within a few `StoreConfig.timeout` while the store
    cannot be reached; nothing is half done then that a second try does not mend. Tenants see nothing of each other.
    ``on_stored`` and ``on_expired`` are called once for each object that this process stored or swept.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        on_stored: Callable[[], object] | None = None,
        on_expired: Callable[[], object] | None = None,
    ):
        self.config = config
        self._on_stored = on_stored or _nothing
        self._on_expired = on_expired or _nothing
        self._opened: Backend | None = None

    @property
    def _backend(self) -> Backend:
        if self._opened is None:
            from dynamo_epd.store.backend import open_backend

            self._opened = open_backend(self.config)
        return self._opened

    async def put(
        self, tenant: str, id: str, data: bytes, media_type: str, about: dict[str, Any], *, ttl: float | None = None
    ) -> Stored:
        """Stores ``data`` for ``ttl`` seconds (the configuration's), once: a second put of the same tenant and id, at
        whatever time and from whatever process, changes nothing and returns what the first stored.

        Raises:
            PayloadTooLarge: more than `StoreConfig.max_bytes`, or ``about`` is not small.
            InvalidRequest: an id or media type that cannot be one.
        """
        folder = _folder(tenant)
        if not _ID.fullmatch(id):
            raise InvalidRequest("an id is letters, digits, '_' and '-'", param="id")
        if not _MEDIA_TYPE.fullmatch(media_type):
            raise InvalidRequest("that is no media type", param="media_type")
        if len(data) > self.config.max_bytes:
            raise PayloadTooLarge(f"an object may have {self.config.max_bytes} bytes at most")
        now = time.time()
        expires = now + (self.config.ttl if ttl is None else ttl)
        key = f"{id}.{max(0, math.ceil(expires))}.{secrets.token_hex(8)}"
        stored = Stored(id, media_type, len(data), xxhash.xxh3_128_hexdigest(data), now, expires, about, key)
        record = _record(stored)
        async with self._bounded():
            await self._backend.write(_data(folder, key), data, media_type=media_type, file_name=stored.file_name)
            while not await self._backend.create(_about(folder, id), record):
                first = (await self._read(folder, id))[0]
                if first is None:  # it is being deleted
                    await _pause()
                elif first.key == key:  # an earlier try of this very request did it, and its reply was lost
                    break
                else:
                    with contextlib.suppress(StageUnavailable):  # the sweep will
                        await self._backend.delete(_data(folder, key))
                    return first
        self._on_stored()
        return stored

    async def head(self, tenant: str, id: str) -> Stored:
        """What is known of an object. Raises NotFound where there is none, and Gone (one of those) where there was one
        until its time was over."""
        return (await self._head(tenant, id))[0]

    async def get(self, tenant: str, id: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) at once. Raises what `head` and `pieces` raise."""
        stored = await self.head(tenant, id)
        return b"".join([piece async for piece in self.pieces(tenant, stored, start, end)])

    async def pieces(
        self, tenant: str, stored: Stored, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Bytes [start, end) of what `head` gave, at most `PIECE` at a time. An error comes before the last piece:
        whoever passes them on has not passed on what looks whole.

        Raises:
            NotFound: it was deleted since.
            InternalError: the bytes are not those that were stored (checked where all are read).
        """
        end = stored.size if end is None else min(end, stored.size)
        path = _data(_folder(tenant), stored.key)
        digest = xxhash.xxh3_128()
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            piece = await self._backend.read_range(path, first, last)
            if piece is None:
                raise _no_such_object()
            digest.update(piece)
            wrong = (start, last) == (0, stored.size) and digest.hexdigest() != stored.etag
            if wrong or len(piece) != last - first:
                log.error("the bytes of %s are damaged", stored.id)
                raise InternalError("the stored object is damaged")
            yield piece

    async def annotate(self, tenant: str, id: str, about: dict[str, Any]) -> Stored:
        """Merges into an object's ``about``, whoever else does so at the same time. Raises NotFound."""
        async with self._bounded():
            while True:
                stored, version = await self._head(tenant, id)
                merged = msgspec.structs.replace(stored, about=stored.about | about)
                if await self._backend.replace(_about(_folder(tenant), id), _record(merged), version):
                    return merged
                await _pause()

    async def delete(self, tenant: str, id: str) -> None:
        """Raises NotFound where there is none, or somebody else has just deleted it."""
        async with self._bounded():
            while True:
                stored, version = await self._head(tenant, id)
                if await self._remove(_folder(tenant), stored, version):
                    return
                await _pause()

    async def recent(self, tenant: str, limit: int) -> list[Stored]:
        """The newest objects whose ids are of `new_id`, newest first; other ids come in alphabetical order."""
        limit = min(limit, MAX_RECENT)
        found: list[Stored] = []
        read = 0
        folder = _folder(tenant)
        async for page in self._backend.pages(f"about/{folder}"):
            ids = [match["id"] for entry in page if (match := _RECORD.fullmatch(entry.key))]
            while ids:
                if len(found) >= limit or read >= limit + MAX_PASSED_OVER:
                    return found
                some, ids = ids[: limit - len(found)], ids[limit - len(found) :]
                read += len(some)
                records = await _side_by_side(lambda id: self._listed(folder, id), some)
                found += [stored for stored in records if stored is not None and not stored.expired]
        return found

    def address(self, stored: Stored, tenant: str) -> str | None:
        """Where a client can GET the object, for `StoreConfig.url_seconds` or as long as it is kept. None for a
        directory, and for an object that has expired. Nothing is asked of the store; where credentials come from a
        machine's own service instead of the environment, that one may be."""
        seconds = min(self.config.url_seconds, stored.expires - time.time())
        return self._backend.address(_data(_folder(tenant), stored.key), math.floor(seconds)) if seconds >= 1 else None

    async def sweep(self) -> int:
        """Deletes what has expired, of every tenant, and what writers that died have left. Returns how many objects
        expired by this call: where several processes sweep at once, each object counts in one of them."""
        now = time.time()
        old = now - self.config.leftover_seconds
        data: defaultdict[tuple[str, str], Listed] = defaultdict(dict)
        async for page in self._backend.pages("data"):
            for entry in page:
                if match := _DATA.fullmatch(entry.key):
                    facts = (int(match["expires"]), entry.modified < old)
                    data[match["tenant"], match["id"]][match["key"]] = facts
        # Listed second: bytes come before their record, so what lacks one here had none when it was listed either.
        records: dict[tuple[str, str], tuple[bool, bool]] = {}
        async for page in self._backend.pages("about"):
            for entry in page:
                if match := _RECORD.fullmatch(entry.key):
                    records[match["tenant"], match["id"]] = (entry.modified < old, entry.size == len(GONE))
        suspects = [
            (*name, data.get(name, {}), records.get(name, (False, False))[0])
            for name in data.keys() | records.keys()
            if _is_suspect(data.get(name, {}), records.get(name), now)
        ]
        random.shuffle(suspects)  # several sweeps at once then share the work
        expired = sum(await _side_by_side(lambda suspect: self._sweep_one(*suspect), suspects))
        await self._backend.remove_staged(self.config.leftover_seconds)
        await self._forget(now - GONE_SECONDS)
        return expired

    async def _forget(self, before: float) -> None:
        """Bounds what is remembered of objects that are gone."""
        gone = [entry async for page in self._backend.pages("gone") for entry in page if _GONE.fullmatch(entry.key)]
        gone.sort(key=lambda entry: entry.modified, reverse=True)
        old = [entry.key for index, entry in enumerate(gone) if index >= MAX_GONE or entry.modified < before]
        await _side_by_side(self._backend.delete, old)

    async def _sweep_one(self, folder: str, id: str, data: Listed, record_is_old: bool) -> bool:
        """Sweeps what a listing knew of one id. Returns whether its object expired by this."""
        path = _about(folder, id)
        try:
            stored, version = await self._read(folder, id)
        except InternalError:  # who can read it no more cannot say when it ends; the names of its bytes can
            if all(expires <= time.time() for expires, _ in data.values()):
                await self._backend.delete(path)
                await _side_by_side(self._backend.delete, [_data(folder, key) for key in data])
            return False
        expired = False
        if stored is not None and stored.expired:
            await self._backend.delete(_data(folder, stored.key))  # first: a full disk has no room for what follows
            await self._backend.create(_gone(folder, id), b"")
            expired = await self._remove(folder, stored, version)
            if expired:
                self._on_expired()
        elif stored is not None and record_is_old and stored.key not in data:
            log.error("the bytes of %s are lost", id)
            await self._remove(folder, stored, version)
        elif stored is None and version and record_is_old:  # whoever was deleting it has died
            await self._backend.delete(path)
        # Bytes that no record names: a dead writer's, or a live one's that will find out that it was not the first.
        for key, (_, is_old) in data.items():
            if is_old and (stored is None or key != stored.key):
                await self._backend.delete(_data(folder, key))
        return expired

    async def _remove(self, folder: str, stored: Stored, version: str) -> bool:
        """Deletes an object, unless its record has changed since ``version``: then False."""
        path = _about(folder, stored.id)
        if not await self._backend.replace(path, GONE, version):
            return False
        await self._backend.delete(_data(folder, stored.key))
        await self._backend.delete(path)
        return True

    async def _head(self, tenant: str, id: str) -> tuple[Stored, str]:
        folder = _folder(tenant)
        if not _ID.fullmatch(id):
            raise _no_such_object()
        stored, version = await self._read(folder, id)
        if stored is not None and not stored.expired:
            return stored, version
        if stored is not None or await self._backend.read(_gone(folder, id), 0) is not None:
            raise Gone("the picture's time is over")
        raise _no_such_object()

    async def _read(self, folder: str, id: str) -> tuple[Stored | None, str]:
        """A record and its version; no record where there is none or it is being deleted (then with a version).
        Raises InternalError for one that cannot be read."""
        found = await self._backend.read(_about(folder, id), 2 * MAX_ABOUT)
        if found is None:
            return None, ""
        try:
            return msgspec.json.decode(found[0], type=Stored | None), found[1]
        except msgspec.MsgspecError as error:
            log.error("the record of %s is damaged", id)
            raise InternalError("a stored record is damaged") from error

    async def _listed(self, folder: str, id: str) -> Stored | None:
        """For a list, which one damaged record must not spoil."""
        with contextlib.suppress(InternalError):
            return (await self._read(folder, id))[0]
        return None

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """For what takes several operations, or several tries. Less than the shortest `StoreConfig.leftover_seconds`:
        a writer's bytes are never swept before it has written its record or given up."""
        try:
            async with asyncio.timeout(3 * self.config.timeout):
                yield
        except TimeoutError as error:
            raise StageUnavailable("the object store is too slow", retry_after=self.config.timeout) from error


def _folder(tenant: str) -> str:
    """A tenant's own directory. Raises ValueError for a name that no key can have."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is letters, digits, '_' and '-'")
    return f"tenant-{tenant}" if tenant else "everyone"


def _about(folder: str, id: str) -> str:
    return f"about/{folder}/{id}.json"


def _data(folder: str, key: str) -> str:
    return f"data/{folder}/{key}"


def _gone(folder: str, id: str) -> str:
    return f"gone/{folder}/{id}"


def _record(stored: Stored) -> bytes:
    record = msgspec.json.encode(stored)
    if len(record) > MAX_ABOUT:
        raise PayloadTooLarge(f"what is said about an object may have {MAX_ABOUT} bytes at most")
    return record


def _no_such_object() -> EpdError:
    return NotFound("there is no such picture, or none any more")


def _is_suspect(data: Listed, record: tuple[bool, bool] | None, now: float) -> bool:
    """Whether the names, times and sizes of a listing are reason to read a record: whether it is older than a live
    writer's and whether it is `GONE`, or None where there is none."""
    if record is None:
        return any(is_old for _, is_old in data.values())
    is_old, is_gone = record
    if is_old and (is_gone or not data):
        return True
    return len(data) > 1 or any(expires <= now for expires, _ in data.values())


async def _side_by_side(do: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
    """The results, in order; `AT_ONCE` run at a time, and none is begun once one has failed."""
    results: list[Result] = []
    for first in range(0, len(items), AT_ONCE):
        results += await asyncio.gather(*map(do, items[first : first + AT_ONCE]))
    return results


async def _pause() -> None:
    await asyncio.sleep(PAUSE * (0.5 + random.random()))


def _nothing() -> None:
    pass
