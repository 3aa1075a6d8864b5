# SPDX-License-Identifier: Apache-2.0
"""Where a model's files are: a directory, a name on the hub, or ``s3://bucket/prefix``, which is downloaded once.

A download lands in ``$DYNAMO_WEIGHTS`` (else ``$XDG_CACHE_HOME/dynamo/weights``, else ``~/.cache/dynamo/weights``), one
directory for each version of the prefix: what the bucket lists decides the version, so files of two versions never mix.
A file has its name once it is whole; before that it grows as ``.part``, and the next start goes on where the last one
ended. Credentials and endpoint come from the usual ``AWS_*`` variables.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.notify import notify

log = logging.getLogger(__name__)

TAKEN = (".safetensors", ".json", ".txt", ".model")
"""Weights, configurations and tokenizers. Nothing that is unpickled or run."""
INDEX = "model_index.json"
CHUNK = 32 * 1024 * 1024
"""Bytes of one request: what is lost by a broken one, and held in memory by each of the threads."""
THREADS = 4
ATTEMPTS = 6
"""Of one request, 1, 2, 4, 8 and 8 s apart."""
SAID_SECONDS = 15.0
"""Between two lines of progress."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
S3_NAME = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]+)/(?P<prefix>[^?#]*[^?#/])/*")


class WeightsError(ConfigError):
    """A model that is not there, or cannot be had."""


class HubUnreachable(WeightsError):
    """A name on the hub that is not in its cache on this machine, and the hub does not answer."""


@dataclass(frozen=True)
class _File:
    path: str
    size: int
    tag: str | None


def local(model: str, wanted: Callable[[str], bool] = lambda path: True) -> str:
    """What ``from_pretrained`` takes: a path, or a hub's name as it is. Blocks while files are downloaded.

    Several processes may ask at once: one downloads, the others wait for it. If the bucket cannot be asked, what was
    downloaded before is taken, with a warning.

    Args:
        wanted: which files of an ``s3://`` prefix are needed, by their path below it.

    Raises:
        WeightsError: a name that cannot be one, a directory or prefix that is not there, a bucket that does not answer.
    """
    if model.startswith("s3://"):
        return str(_Prefix(model).directory(wanted))
    if not Path(model).exists() and HUB_NAME.fullmatch(model) is None:
        raise WeightsError(f"model {model!r}: there is no such directory, and it is no name on the hub")
    return model


def pipeline_index(model: str) -> dict[str, Any] | None:
    """The ``model_index.json`` of a diffusers pipeline; None for a model that is none.

    Raises:
        HubUnreachable, WeightsError: see there and `local`.
    """
    found = Path(local(model, lambda path: path == INDEX)) / INDEX
    if not found.parent.is_dir():
        found = _from_hub(model)
    return json.loads(found.read_text()) if found.exists() else None


def _from_hub(model: str) -> Path:
    """Where the hub's cache has the index of a pipeline, or, for what is no pipeline, would have it."""
    from huggingface_hub import errors, hf_hub_download

    if Path(model).exists():
        raise WeightsError(f"model {model!r} is a file and no directory")
    try:
        return Path(hf_hub_download(model, INDEX))
    except errors.LocalEntryNotFoundError as error:  # before the others: it is also one of them
        raise HubUnreachable(
            f"model {model!r} is no directory here, not in the hub's cache, and the hub cannot be reached"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"model {model!r} is no directory here, and the hub does not show one to us") from error
    except errors.EntryNotFoundError:
        return Path(model) / INDEX
    except (errors.HfHubHTTPError, OSError) as error:
        raise HubUnreachable(f"model {model!r}: the hub does not give it: {str(error).splitlines()[0]}") from error


class _Prefix:
    """``s3://bucket/prefix`` and its place on this machine."""

    def __init__(self, name: str):
        found = S3_NAME.fullmatch(name)
        if found is None:
            raise WeightsError(f"model {name!r} is not s3://BUCKET/PREFIX")
        self._name = name
        self._store = _store(found["bucket"], found["prefix"])
        at = "\0".join((_endpoint(os.environ) or "", found["bucket"], found["prefix"]))
        readable = re.sub(r"[^\w.-]", "-", found["prefix"].rpartition("/")[2])
        self._home = cache_directory() / f"{readable}-{hashlib.sha256(at.encode()).hexdigest()[:16]}"

    def directory(self, wanted: Callable[[str], bool]) -> Path:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            with _locked(self._home / "lock", self._name):
                files = self._listed()
                version = hashlib.sha256(json.dumps([asdict(one) for one in files]).encode()).hexdigest()[:16]
                into = self._home / version
                self._download([one for one in files if wanted(one.path) and not (into / one.path).exists()], into)
                return into
        except OSError as error:
            raise WeightsError(f"model {self._name}: {error}") from error

    def _listed(self) -> list[_File]:
        """What the prefix holds, in order; of a bucket that does not answer, what it held last."""
        last = self._home / "listing.json"
        try:
            metas = _tried(lambda: [one for batch in self._store.list() for one in batch], self._name)
        except WeightsError as error:
            if not last.exists():
                raise
            log.warning("%s; taking what was downloaded before", error)
            return [_File(**one) for one in json.loads(last.read_text())]
        files = [_File(one["path"], one["size"], one["e_tag"]) for one in metas if one["path"].endswith(TAKEN)]
        files.sort(key=lambda one: one.path)
        if not files:
            raise WeightsError(f"model {self._name}: there is nothing under this prefix that a model is made of")
        for one in files:
            if ".." in PurePosixPath(one.path).parts or one.path.startswith("/"):
                raise WeightsError(f"model {self._name}: {one.path!r} is no path below it")
        part = last.with_suffix(".part")
        part.write_text(json.dumps([asdict(one) for one in files]))
        part.replace(last)
        return files

    def _download(self, files: list[_File], into: Path) -> None:
        if not files:
            return
        into.mkdir(exist_ok=True)
        missing = sum(one.size - _size(_part(into, one)) for one in files)
        free = shutil.disk_usage(into).free
        if missing > free:
            raise WeightsError(f"model {self._name}: {missing} bytes to download, {free} are free under {into}")
        progress = _Progress(self._name, sum(one.size for one in files), missing)
        failed = threading.Event()

        def fetch(one: _File) -> None:
            try:
                self._fetch(one, into, progress, failed)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
            list(pool.map(fetch, files))
        log.info("%s: downloaded", self._name)

    def _fetch(self, one: _File, into: Path, progress: _Progress, failed: threading.Event) -> None:
        part = _part(into, one)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            while (start := file.tell()) < one.size and not failed.is_set():
                end = min(start + CHUNK, one.size)
                data = _tried(partial(self._get, one, start, end), self._name)
                if len(data) != end - start:
                    raise WeightsError(f"model {self._name}: {one.path} came short")
                file.write(data)
                file.flush()
                progress.add(len(data))
            if file.tell() != one.size:
                return
            os.fsync(file.fileno())
        part.replace(into / one.path)

    def _get(self, one: _File, start: int, end: int) -> Any:
        options: dict[str, Any] = {"range": (start, end)}
        if one.tag:  # a file that changes meanwhile is refused, not mixed
            options["if_match"] = one.tag
        return self._store.get(one.path, options=options).bytes()


class _Progress:
    """Says now and then how much is there; threads add to it."""

    def __init__(self, name: str, total: int, missing: int):
        self._name = name
        self._total = total
        self._done = total - missing
        self._lock = threading.Lock()
        self._said = time.monotonic()
        self._say()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if time.monotonic() - self._said > SAID_SECONDS:
                self._said = time.monotonic()
                self._say()

    def _say(self) -> None:
        text = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        log.info("%s: %s", self._name, text)
        notify(STATUS=f"downloading, {text}")


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where downloads are kept."""
    if environment.get("DYNAMO_WEIGHTS"):
        return Path(environment["DYNAMO_WEIGHTS"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamo" / "weights"


def _endpoint(environment: Mapping[str, str]) -> str | None:
    """The variables that obstore reads, in its order."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((environment[name] for name in names if environment.get(name)), None)


def _store(bucket: str, prefix: str) -> Any:
    from datetime import timedelta

    from obstore.store import S3Store

    plain = (_endpoint(os.environ) or "").startswith("http://")
    return S3Store(
        bucket,
        prefix=prefix,
        client_options={"allow_http": plain, "connect_timeout": "10s", "timeout": "120s"},
        # `_tried` tries again; this is for what precedes a request, as the credentials of a machine's role.
        retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=30)},
    )


def _tried(ask: Callable[[], Any], name: str) -> Any:
    """The answer of a bucket that may be away for a moment."""
    from obstore import exceptions

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except FileNotFoundError as error:
            raise WeightsError(f"model {name}: a file went away while it was downloaded; start again") from error
        except exceptions.PreconditionError as error:
            raise WeightsError(f"model {name}: a file changed while it was downloaded; start again") from error
        except exceptions.BaseError as error:
            what = str(error).splitlines()[0]
            if "<Code>NoSuchBucket<" in str(error):
                raise WeightsError(f"model {name}: there is no such bucket") from error
            known = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
            if isinstance(error, known) or attempt == ATTEMPTS - 1:
                hint = "" if os.environ.get("AWS_ACCESS_KEY_ID") else " (AWS_ACCESS_KEY_ID is not set)"
                raise WeightsError(f"model {name}: {what}{hint}") from error
            log.warning("%s: %s; trying again", name, what)
            time.sleep(min(2**attempt, 8))
    raise AssertionError


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """One at a time on this machine. The kernel lets go for a process that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another worker's download", name)
            notify(STATUS="waiting for another worker's download")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _part(into: Path, one: _File) -> Path:
    return into / f"{one.path}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
