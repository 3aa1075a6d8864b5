# SPDX-License-Identifier: Apache-2.0
"""Where results are kept, and how long: the ``store`` key of a configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dynamo_epd.sdk.nats_server import state_dir

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/|$))*")
LONGEST_URL_SECONDS = 7 * 86400.0
"""S3 signs for a week at most."""


@dataclass(frozen=True)
class StoreConfig:
    """Where pictures are kept. Credentials are no part of it: S3's come from the environment (``AWS_ACCESS_KEY_ID``
    and its like).
    """

    url: str = ""
    """A path, ``file:///path`` or ``s3://bucket/prefix``. Empty: a directory beside this user's other state."""
    endpoint: str | None = None
    """Of an S3-compatible server, where it is not Amazon's."""
    public_endpoint: str | None = None
    """The same server as clients reach it: presigned addresses are signed for this one."""
    region: str = "us-east-1"
    """Of the bucket."""
    allow_http: bool = False
    """Whether ``endpoint`` may be without TLS."""
    ttl: float = 86400.0
    """Seconds that a result is kept."""
    sweep_seconds: float = 300.0
    """Between two sweeps of one process."""
    leftover_seconds: float = 3600.0
    """What a writer that died has left is swept after this long: four times ``timeout`` at least. The same for all
    services of one store."""
    url_seconds: float = 3600.0
    """How long a presigned or signed address is good for; never longer than its object."""
    max_bytes: int = 64 * 1024 * 1024
    """Bytes of one object."""
    timeout: float = 15.0
    """Seconds for one operation, its retries included. The same for all services of one store."""

    def __post_init__(self) -> None:
        for name in ("ttl", "sweep_seconds", "leftover_seconds", "url_seconds", "max_bytes", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"store.{name.replace('_', '-')} must be above 0")
        if self.url_seconds > LONGEST_URL_SECONDS:
            raise ValueError(f"store.url-seconds can be {LONGEST_URL_SECONDS:.0f} at most")
        if self.leftover_seconds < 4 * self.timeout:
            raise ValueError("store.leftover-seconds must be four times store.timeout at least, or live writers suffer")
        scheme = self.url.partition("://")[0] if "://" in self.url else ""
        if scheme not in ("", "file", "s3"):
            raise ValueError("store.url must be a directory, file:///directory or s3://bucket/prefix")
        if scheme == "s3" and not (_BUCKET.fullmatch(self.bucket or "") and _PREFIX.fullmatch(self.prefix)):
            raise ValueError("store.url must be s3://bucket/prefix, of letters, digits, '.', '_' and '-'")
        if scheme == "file" and not urlsplit(self.url).path.startswith("/"):
            raise ValueError("store.url must be file:///directory")
        for name in ("endpoint", "public_endpoint"):
            self._check_endpoint(f"store.{name.replace('_', '-')}", getattr(self, name))
        if self.endpoint is not None and self.endpoint.startswith("http://") and not self.allow_http:
            raise ValueError("store.endpoint is without TLS: use https, or set store.allow-http")

    def _check_endpoint(self, name: str, value: str | None) -> None:
        if value is None:
            return
        if self.bucket is None:
            raise ValueError(f"{name} needs a store.url of s3://")
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{name} must be http://host:port or https://host")
        if parts.username or parts.password:
            raise ValueError(f"{name} must hold no credentials: they come from the environment")

    @property
    def bucket(self) -> str | None:
        """None for a directory."""
        return urlsplit(self.url).netloc if self.url.startswith("s3://") else None

    @property
    def prefix(self) -> str:
        """Within the bucket."""
        return urlsplit(self.url).path.strip("/")

    @property
    def directory(self) -> Path:
        """Where there is no bucket."""
        if not self.url:
            return state_dir() / "store"
        if self.url.startswith("file://"):
            return Path(unquote(urlsplit(self.url).path))
        return Path(self.url).expanduser().absolute()
