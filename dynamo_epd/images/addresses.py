# SPDX-License-Identifier: Apache-2.0
"""Which addresses may be dialled for a client, and which URLs may name them.

Two gates. `check_url` reads the URL alone: scheme, characters, host, port; no resolver is asked. `check_address` judges
every address that the host resolved to, just before the connect goes to that very address (see fetch.py). A host is
allowed only in its plain spelling: numbers in decimal, hex, octal or short form, which the C library would expand to
an address, are refused, and other alphabets are folded to ASCII first.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import idna

from dynamo_epd.errors import UrlNotAllowed
from dynamo_epd.images.config import MediaConfig

MAX_URL = 8192
"""Characters of an http(s) URL."""

_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_UNWANTED = re.compile(r"[\x00-\x20\x7f\\]")

# Names of services that give credentials away; refused whatever the configuration says.
_METADATA_NAMES = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.azure.internal",
        "metadata.tencentyun.com",
        "instance-data",
        "instance-data.ec2.internal",
    }
)
# Names that only a local resolver knows (RFC 6761, 6762, 8375; Kubernetes).
_LOCAL_SUFFIXES = (".localhost", ".localdomain", ".local", ".internal", ".intranet", ".lan", ".home.arpa", ".svc")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Metadata services that live on addresses which a rule below would allow, under `allow_private` or at all.
_METADATA_ADDRESSES = _networks(
    "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::/64", "fd20:ce::/64"
)
_PRIVATE = _networks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
# IANA's special-purpose registries, written out: `is_global` differs between Python patch releases.
_SPECIAL_V4 = _networks(
    "0.0.0.0/8",
    "169.254.0.0/16",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
# Only global unicast is dialled over IPv6, which leaves out ::, mapped and compatible IPv4, NAT64 and link-local;
# within it the tunnels that carry an IPv4 address (Teredo in 2001::/23, 6to4) and documentation prefixes are out.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = _networks("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")


@dataclass(frozen=True)
class Target:
    """A URL that passed `check_url`: lower-case ASCII ``host`` (an IPv6 address without brackets), path with query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What goes into the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str, media: MediaConfig) -> Target:
    """What an http(s) URL names. Raises `UrlNotAllowed`; asks no resolver and dials nothing."""
    if not url or len(url) > MAX_URL:
        raise UrlNotAllowed(f"an image URL has between 1 and {MAX_URL} characters")
    if _UNWANTED.search(url):
        raise UrlNotAllowed("an image URL holds no white space, control characters or backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UrlNotAllowed("the image URL is malformed") from error
    schemes = "http, https or data" if media.allow_http else "https or data"
    if parts.scheme not in _PORTS or (parts.scheme == "http" and not media.allow_http):
        raise UrlNotAllowed(f"an image URL must be {schemes}")
    if "@" in parts.netloc:
        raise UrlNotAllowed("an image URL carries no user name or password")
    bracketed = "[" in parts.netloc
    if bracketed and not re.fullmatch(r"\[[^\[\]]*\](:\d*)?", parts.netloc):
        raise UrlNotAllowed("the image URL is malformed")
    host = _host(parts.hostname or "", bracketed)
    _check_name(host, media)
    port = _PORTS[parts.scheme] if port is None else port
    if port not in _PORTS.values() and not (media.allow_private or media.allowed_hosts):
        raise UrlNotAllowed("an image URL uses port 80 or 443")
    if port == 0:
        raise UrlNotAllowed("an image URL uses port 80 or 443")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._[]")
    query = "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._[]?") if parts.query else ""
    return Target(parts.scheme, host, port, path + query)


def check_address(text: str, media: MediaConfig) -> Address:
    """The address, if it may be dialled. Raises `UrlNotAllowed`, whose message does not name it."""
    refusal = UrlNotAllowed("the image URL leads to an address that is not allowed")
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise refusal from error
    if _within(address, _METADATA_ADDRESSES):
        raise refusal
    if _within(address, _PRIVATE):
        if media.allow_private:
            return address
        raise refusal
    if isinstance(address, ipaddress.IPv4Address):
        allowed = not _within(address, _SPECIAL_V4)
    else:
        allowed = address.scope_id is None and address in _GLOBAL_V6 and not _within(address, _SPECIAL_V6)
    if not allowed:
        raise refusal
    return address


def _within(address: Address, networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]) -> bool:
    return any(address in network for network in networks)


def _host(raw: str, bracketed: bool) -> str:
    """The host in its one spelling: ASCII, lower case, without the root dot."""
    malformed = UrlNotAllowed("the host of the image URL is malformed")
    if bracketed:
        try:
            address = ipaddress.IPv6Address(raw)
        except ValueError as error:
            raise malformed from error
        if address.scope_id is not None:
            raise malformed
        return str(address)
    host = raw
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True, std3_rules=True).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise malformed from error
    host = host.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise malformed
    # The rule of the WHATWG URL standard: a last label that is a number makes the host an IPv4 address. The C library
    # would read 127.1, 0177.0.0.1, 0x7f000001 or 2130706433 as one; a plain dotted quad is the only form taken here.
    if labels[-1].isdigit() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise malformed from error
    return host


def _check_name(host: str, media: MediaConfig) -> None:
    refusal = UrlNotAllowed("the host of the image URL is not allowed")
    if host in _METADATA_NAMES:
        raise refusal
    if media.allowed_hosts and not any(_matches(host, pattern) for pattern in media.allowed_hosts):
        raise refusal
    if _is_literal(host):
        check_address(host, media)
    elif not media.allow_private and ("." not in host or f".{host}".endswith(_LOCAL_SUFFIXES)):
        raise refusal


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _is_literal(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()
