# SPDX-License-Identifier: Apache-2.0
"""obstore, as much of it as we use. The only file that imports it.

Keys are ``part/part/name``. Whatever goes wrong with the store becomes `StageUnavailable`, whose text holds no path and
no address; the log has the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from dynamo_epd.errors import InternalError, StageUnavailable
from dynamo_epd.store.config import StoreConfig

log = logging.getLogger(__name__)

RETRY_AFTER = 5.0
MAX_RETRIES = 2
CONNECT_SECONDS = 5.0
PAGE = 1000
"""Entries of a listing that are taken at once; S3 gives no more."""
LOCK_PAUSE = 0.005
_FULL = re.compile(r"os error (?:27|28|122)\b")
"""What the system says through obstore of a file, a disk or a quota that can take no more (EFBIG, ENOSPC, EDQUOT)."""
_STAGED = re.compile(r".*#\d+")
"""obstore writes a file under such a name first, and a listing leaves it out."""


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    key: str
    size: int
    modified: float
    """Unix seconds, by the store's clock."""


class Backend:
    """What `Store` needs of a directory or a bucket. Every operation ends within ``timeout`` seconds."""

    def __init__(self, store: Any, timeout: float):
        self._store = store
        self._timeout = timeout

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Bounds the block. Answers that are none of the store's failures pass."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (FileNotFoundError, AlreadyExistsError, PreconditionError, BaseError, OSError) as error:
            text = str(error)
            if "<Code>NoSuchBucket</Code>" in text:
                log.error("the object store's bucket does not exist")
                message = "the object store's bucket does not exist"
            elif isinstance(error, FileNotFoundError | AlreadyExistsError | PreconditionError):
                raise
            elif isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
                log.error("the object store refuses: %s", _first_line(text))
                message = "the object store refuses this service's credentials"
            elif _FULL.search(text):
                log.error("the object store is full: %s", _first_line(text))
                message = "the object store is full"
            else:
                log.warning("the object store fails: %s", _first_line(text) or type(error).__name__)
                message = "the object store cannot be reached"
            raise StageUnavailable(message, retry_after=RETRY_AFTER) from error

    async def write(self, key: str, data: bytes, *, media_type: str, file_name: str) -> None:
        """The whole object or nothing; ``key`` is nobody else's."""
        async with self._asking():
            await self._put(key, data, self._attributes(media_type, file_name), "overwrite")

    async def create(self, key: str, data: bytes) -> bool:
        """False, and nothing changed, where there is one already."""
        try:
            async with self._asking():
                await self._put(key, data, self._attributes("application/json"), "create")
        except AlreadyExistsError:
            return False
        return True

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        """False, and nothing changed, unless the object is still the ``version`` that `read` gave."""
        try:
            async with self._asking():
                await self._put(key, data, self._attributes("application/json"), {"e_tag": version})
        except (PreconditionError, FileNotFoundError):
            return False
        return True

    async def read(self, key: str, max_bytes: int) -> tuple[bytes, str] | None:
        """A small object and its version, or None."""
        try:
            async with self._asking():
                return await self._read(key, max_bytes)
        except FileNotFoundError:
            return None

    async def read_range(self, key: str, start: int, end: int) -> bytes | None:
        """Bytes [start, end), fewer where there are no more, or None."""
        try:
            async with self._asking():
                return bytes(await obstore.get_range_async(self._store, key, start=start, end=end))
        except FileNotFoundError:
            return None

    async def delete(self, key: str) -> None:
        """It is not there afterwards, whether or not it was before."""
        with contextlib.suppress(FileNotFoundError):
            async with self._asking():
                await obstore.delete_async(self._store, key)

    async def pages(self, prefix: str) -> AsyncIterator[list[Entry]]:
        """Everything below ``prefix``, by key."""
        stream = obstore.list(self._store, prefix, chunk_size=PAGE)
        while True:
            async with self._asking():
                page = await anext(stream, None)
            if page is None:
                return
            yield [Entry(one["path"], one["size"], one["last_modified"].timestamp()) for one in page]

    async def remove_staged(self, seconds: float) -> None:
        """Removes what writers that died ``seconds`` ago were writing."""

    def address(self, key: str, seconds: float) -> str | None:
        """Where a client can GET the object for ``seconds``, or None."""
        return None

    def _attributes(self, media_type: str, file_name: str | None = None) -> Any:
        """What the store itself will say in HTTP."""
        return None

    async def _put(self, key: str, data: bytes, attributes: Any, mode: Any) -> None:
        # One request: many parts are not atomic, and cannot be conditional.
        await obstore.put_async(self._store, key, data, attributes=attributes, mode=mode, use_multipart=False)

    async def _read(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        found = await obstore.get_async(self._store, key)
        if found.meta["size"] > max_bytes:
            raise InternalError("a stored record is damaged")
        return bytes(await found.bytes_async()), found.meta["e_tag"] or ""


class Directory(Backend):
    """Files on this machine. They outlive every process; nothing waits for the disk, so a power cut may lose some."""

    def __init__(self, config: StoreConfig):
        self._root = config.directory
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            store = LocalStore(self._root)
        except (BaseError, OSError, ValueError) as error:
            log.error("the object store's directory cannot be used: %s", _first_line(str(error)))
            raise StageUnavailable("the object store cannot be reached", retry_after=RETRY_AFTER) from error
        super().__init__(store, config.timeout)

    async def replace(self, key: str, data: bytes, version: str) -> bool:
        # obstore has no conditional overwrite of files.
        try:
            async with self._asking(), self._locked():
                found = await obstore.head_async(self._store, key)
                if found["e_tag"] != version:
                    return False
                await self._put(key, data, None, "overwrite")
        except FileNotFoundError:
            return False
        return True

    async def pages(self, prefix: str) -> AsyncIterator[list[Entry]]:
        entries = [entry async for page in super().pages(prefix) for entry in page]
        entries.sort(key=lambda entry: entry.key)
        for first in range(0, len(entries), PAGE):
            yield entries[first : first + PAGE]

    async def remove_staged(self, seconds: float) -> None:
        def remove() -> None:
            for path in self._root.rglob("*#*"):
                with contextlib.suppress(FileNotFoundError):
                    if _STAGED.fullmatch(path.name) and path.stat().st_mtime < time.time() - seconds:
                        path.unlink()

        async with self._asking():
            await asyncio.to_thread(remove)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """One process at a time; the lock of one that dies is free."""
        with (self._root / ".lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_PAUSE)
            yield


class Bucket(Backend):
    """S3, or a server that speaks it."""

    def __init__(self, config: StoreConfig):
        self._config = config
        try:
            super().__init__(self._open(config.endpoint), config.timeout)
            self._public = self._open(config.public_endpoint) if config.public_endpoint else self._store
        except (BaseError, ValueError) as error:
            log.error("the object store cannot be opened: %s", _first_line(str(error)))
            raise StageUnavailable("the object store cannot be reached", retry_after=RETRY_AFTER) from error

    def _open(self, endpoint: str | None) -> S3Store:
        config = self._config
        options: Any = {"region": config.region}
        if endpoint is not None:
            # The key that the environment cannot overrule.
            options["aws_endpoint_url_s3"] = endpoint.rstrip("/")
        return S3Store(
            config.bucket,
            prefix=config.prefix or None,
            config=options,
            client_options={
                "allow_http": (endpoint or "").startswith("http://"),
                "timeout": timedelta(seconds=config.timeout),
                "connect_timeout": timedelta(seconds=min(config.timeout, CONNECT_SECONDS)),
            },
            retry_config={
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=config.timeout),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
            },
        )

    def address(self, key: str, seconds: float) -> str | None:
        try:
            return obstore.sign(self._public, "GET", key, timedelta(seconds=seconds))
        except (BaseError, OSError) as error:
            log.warning("no address can be signed: %s", _first_line(str(error)))
            raise StageUnavailable("the object store's addresses cannot be signed", retry_after=RETRY_AFTER) from error

    def _attributes(self, media_type: str, file_name: str | None = None) -> Any:
        attributes = {"Content-Type": media_type, "Cache-Control": "private"}
        if file_name is not None:
            attributes["Content-Disposition"] = f'inline; filename="{file_name}"'
        return attributes


def open_backend(config: StoreConfig) -> Backend:
    """Raises StageUnavailable for a directory that cannot be made; a bucket is not asked yet."""
    return Directory(config) if config.bucket is None else Bucket(config)


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:500]
