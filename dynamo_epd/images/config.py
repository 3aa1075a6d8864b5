# SPDX-License-Identifier: Apache-2.0
"""What an operator may say about pictures: the ``media`` key of a configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MediaConfig:
    """The rules for pictures, by default the strict ones."""

    allow_http: bool = False
    """Whether addresses without TLS are fetched."""
    allow_private: bool = False
    """Opens loopback, private, shared (RFC 6598) and unique-local addresses, names that only a local resolver knows,
    and every port; cloud metadata services, link-local, multicast and reserved addresses stay shut."""
    allowed_hosts: tuple[str, ...] = ()
    """When not empty these are the only hosts (``name`` or ``*.suffix``), on any port; their addresses must still
    pass."""
    ca_file: str | None = None
    """Replaces the public certificate authorities."""
    max_bytes: int = 32 * 1024 * 1024
    """Bytes of one picture as it is stored, fetched or sent."""
    max_pixels: int = 50_000_000
    """Width times height of one picture."""
    max_images: int = 8
    """Pictures in one request."""
    timeout: float = 4.5
    """Seconds for one fetch: resolving, connecting, redirects and the last byte together. A refusal is then with its
    client within five."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_hosts", tuple(host.lower().rstrip(".") for host in self.allowed_hosts))
        for name in ("max_bytes", "max_pixels", "max_images", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"media.{name.replace('_', '-')} must be above 0")
