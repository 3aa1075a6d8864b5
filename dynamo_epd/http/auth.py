# SPDX-License-Identifier: Apache-2.0
"""Who asks: API keys by their hashes, the tenants they name, and addresses of pictures that need no key.

A key is 256 random bits. SHA-256 is enough to keep it: slow hashes protect what people can think up, and nobody tries
2^256 keys; each request would pay for one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml

from dynamo_epd.errors import EpdError, Gone, NotFound, Unauthorized
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.nats_server import state_dir

log = logging.getLogger(__name__)

OPEN = frozenset({"/live", "/health"})
"""For those who look after the process; they say nothing of a tenant."""
PAGE = "/ui"
"""A browser asks for the key by itself there (HTTP Basic, the key as the password)."""
MOST_KEYS = 1024
MOST_BYTES = 1024 * 1024
"""Of a keys file."""
SIGNING_BYTES = 32
MOST_QUERY = 1024
"""Bytes of a query in which a signature is looked for."""

_TENANT = re.compile(r"[A-Za-z0-9_-]{1,128}")
_HASH = re.compile(r"[0-9a-f]{64}")
_PICTURE = re.compile(r"/v1/images/[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_SIGNED = re.compile(r"[A-Za-z0-9_-]{43}")
_EXPIRES = re.compile(r"\d{1,12}")


@dataclass(frozen=True)
class AuthConfig:
    """Who may ask (key ``auth``)."""

    keys_file: Path
    """YAML or JSON: a list of ``{name, hash}``. A name is a tenant; one with two keys is one tenant."""
    signing_key_file: Path | None = None
    """32 bytes or more, for frontends on several hosts. Default: drawn once, beside this user's other state."""


@dataclass(frozen=True)
class _Key:
    tenant: str
    digest: bytes


def new_key(tenant: str) -> tuple[str, str]:
    """A fresh key, which is kept nowhere, and its line for the keys file. Raises ConfigError for a bad name."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(f"{tenant!r}: a name is up to 128 letters, digits, '_' and '-'")
    key = f"dyn-{secrets.token_urlsafe(32)}"
    return key, f"- {{name: {tenant}, hash: {hashlib.sha256(key.encode()).hexdigest()}}}"


class Keys:
    """The keys of a file. It is looked at with every request: a key that is taken out is refused from then on.

    Constructing raises ConfigError for a file that cannot be used. One that becomes so later changes nothing: the keys
    before it stay good, and the log says why. One that could not be read is tried again with the next request.
    """

    def __init__(self, path: Path):
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._told: tuple[int, ...] | None = None
        self._keys: tuple[_Key, ...] = ()
        self._tenants: tuple[str, ...] = ()
        mark = _mark(path)
        self._use(_read(path))
        self._seen = mark

    def tenant_of(self, key: str) -> str | None:
        """Whose key it is. Every entry is compared, each in constant time."""
        self._look()
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for one in self._keys:
            if hmac.compare_digest(one.digest, digest):
                found = one.tenant
        return found

    @property
    def tenants(self) -> tuple[str, ...]:
        self._look()
        return self._tenants

    def _use(self, keys: tuple[_Key, ...]) -> None:
        self._keys = keys
        self._tenants = tuple(dict.fromkeys(one.tenant for one in keys))

    def _look(self) -> None:
        mark = _mark(self._path)
        if mark == self._seen:
            return
        try:
            self._use(_read(self._path))
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError):  # else it may be whole: we had no descriptor left, perhaps
                self._seen = mark
            if mark != self._told:
                log.error("the keys stay as they were: %s", error)
            self._told = mark
        else:
            self._seen, self._told = mark, None
            log.warning("%s: %d keys of %d tenants now", self._path, len(self._keys), len(self._tenants))


def _mark(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)


def _read(path: Path) -> tuple[_Key, ...]:
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{path}: more than {MOST_BYTES} bytes")
    try:
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path}: neither YAML nor JSON") from None  # its text would quote the file
    if not isinstance(found, list) or len(found) > MOST_KEYS:
        raise ConfigError(f"{path}: must be a list of up to {MOST_KEYS} entries with name and hash")
    return tuple(_key(path, index, one) for index, one in enumerate(found, 1))


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a file")
    if status.st_mode & 0o022:
        raise ConfigError(f"{path}: others may write it, and so give themselves a key (chmod go-w)")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path}: belongs to another user, who may write it")


def _key(path: Path, index: int, entry: Any) -> _Key:
    if not isinstance(entry, dict) or entry.keys() != {"name", "hash"}:
        raise ConfigError(f"{path}: entry {index} must have name and hash, and nothing else")
    name, digest = entry["name"], entry["hash"]
    if not isinstance(name, str) or not _TENANT.fullmatch(name):
        raise ConfigError(f"{path}: the name of entry {index} must be letters, digits, '_' and '-'")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise ConfigError(f"{path}: the hash of entry {index} must be SHA-256, 64 hex digits; `dynamo key` makes one")
    return _Key(name, bytes.fromhex(digest))


class Signer:
    """Signs addresses of pictures for some time: HMAC-SHA256 over tenant, path and end."""

    def __init__(self, key: bytes):
        self._key = key

    def query(self, tenant: str, path: str, expires: int) -> str:
        """What makes ``path`` an address that needs no key before ``expires`` (Unix seconds)."""
        return f"expires={expires}&signature={self._signature(tenant, path, str(expires))}"

    def tenant_of(self, tenants: Iterable[str], path: str, query: Mapping[str, list[str]]) -> str:
        """Whose picture it is: the address does not say, so every tenant is tried.

        Raises NotFound for what was not signed, the same as for a picture that is not there; Gone when it is too late.
        """
        (expires,), (signature,) = query.get("expires", [""])[:1], query.get("signature", [""])[:1]
        found = None
        if _EXPIRES.fullmatch(expires) and _SIGNED.fullmatch(signature):
            for tenant in tenants:
                if hmac.compare_digest(self._signature(tenant, path, expires), signature):
                    found = tenant
        if found is None:
            raise NotFound("there is no such picture, or none any more")
        if time.time() >= int(expires):
            raise Gone("this address has expired: ask for a new one")
        return found

    def _signature(self, tenant: str, path: str, expires: str) -> str:
        digest = hmac.digest(self._key, f"{tenant}\n{path}\n{expires}".encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def signing_key(path: Path | None) -> bytes:
    """The key in ``path``, or the one that this user's frontends share, drawn by the first of them.

    Raises ConfigError for a file that others may read or that is too short.
    """
    own = path or state_dir() / "signing.key"
    if path is None and not own.exists():
        draft = own.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SIGNING_BYTES))
        try:
            with suppress(FileExistsError):  # another worker's was first
                os.link(draft, own)
        finally:
            draft.unlink()
    try:
        with own.open("rb") as file:
            status = os.fstat(file.fileno())
            key = file.read(4096)
    except OSError as error:
        raise ConfigError(f"{own}: {error.strerror}") from error
    _check_owner(own, status)
    if status.st_mode & 0o004 or (path is None and status.st_mode & 0o044):
        raise ConfigError(f"{own}: others may read it, and sign with it (chmod go-r)")
    if len(key) < SIGNING_BYTES:
        raise ConfigError(f"{own}: a signing key has {SIGNING_BYTES} bytes at least")
    return key


class Callers:
    """Decides on the head of a request alone whose it is."""

    def __init__(self, keys: Keys | None, signer: Signer | None):
        self._keys = keys
        self._signer = signer

    def tenant_of(self, method: str, path: str, query: bytes, authorization: str | None) -> tuple[str, bool]:
        """The tenant, and whether the request counts against its limits. Without keys everyone is one tenant.

        Raises Unauthorized without a good key; what `Signer.tenant_of` raises.
        """
        if path in OPEN:
            return "", False
        on_page = path == PAGE or path.startswith(f"{PAGE}/")
        if self._keys is None:
            return "", not on_page
        refusal: EpdError | None = None
        fields = parse_qs(query[:MOST_QUERY].decode("latin-1")) if _PICTURE.fullmatch(path) else {}
        if self._signer is not None and method in ("GET", "HEAD") and "signature" in fields:
            try:
                return self._signer.tenant_of(self._keys.tenants, path, fields), False
            except NotFound as error:
                refusal = error
        # Only on the page: what a browser adds by itself must not make requests of other sites good.
        key = key_of(authorization) if on_page or _is_bearer(authorization) else None
        tenant = self._keys.tenant_of(key) if key else None
        if tenant is None:
            if refusal is not None and not key:
                raise refusal
            stranger = Unauthorized(
                "that is no API key of this server" if key else "an API key is needed: send it as a Bearer token"
            )
            stranger.challenge = 'Basic realm="dynamo", charset="UTF-8"' if on_page else "Bearer"
            raise stranger
        return tenant, not on_page


def _is_bearer(authorization: str | None) -> bool:
    return (authorization or "").strip().partition(" ")[0].lower() == "bearer"


def key_of(authorization: str | None) -> str | None:
    """The key in an ``Authorization`` header of either kind: the token, or the password beside any name."""
    scheme, _, value = (authorization or "").strip().partition(" ")
    if _is_bearer(authorization):
        return value.strip() or None
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2] or None
    except ValueError:  # of base64, or of its bytes; what is not ASCII raises nothing more exact
        return None
