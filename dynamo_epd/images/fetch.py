# SPDX-License-Identifier: Apache-2.0
"""Getting the bytes of a picture that a client named.

The address check sits inside the connect: the network backend below resolves the name once, checks every address that
came back and dials one of exactly those. A name that resolves differently a moment later wins nothing, and TLS still
verifies the name. Each hop has a connection of its own, so nothing is shared between requests, and httpcore (the
transport under httpx) adds no cookies, no proxies from the environment, no redirects and no decompression of its own.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urljoin
from weakref import WeakValueDictionary

import httpcore

from dynamo_epd.errors import MediaError, MediaTimeout, MediaTooLarge, UrlNotAllowed
from dynamo_epd.images.addresses import Target, check_address, check_url
from dynamo_epd.images.config import MediaConfig
from dynamo_epd.images.data_url import parse_data_url

MAX_REDIRECTS = 3
MAX_ADDRESSES = 4
"""Addresses of one name that are tried, one after the other."""
CONNECT_TIMEOUT = 1.5
"""Seconds for one address while another is left to try."""
LOOKUPS_PER_DOMAIN = 8
"""Names of one domain that are looked up at once: its owner can let each of them take as long as the resolver waits."""
_SECOND_LEVEL = frozenset({"ac", "co", "com", "edu", "go", "gob", "gov", "gv", "mil", "ne", "net", "nom", "or", "org"})
"""Under the two letters of a country these are no domain of anyone's (``co.uk``)."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) -> addresses as text. Raises OSError."""


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that passed `check_address` after this very resolution."""

    def __init__(self, media: MediaConfig, resolve: Resolve):
        self._media = media
        self._resolve = resolve
        self._tcp = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise MediaError("the host of the image URL has no address") from error
        # All of them, before any is dialled: an honest name does not mix public and private addresses.
        addresses = [str(check_address(text, self._media)) for text in dict.fromkeys(found)][:MAX_ADDRESSES]
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            patience = None if address == addresses[-1] else CONNECT_TIMEOUT
            try:
                return await self._tcp.connect_tcp(address, port, patience, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class Fetcher:
    """Fetches pictures within the rules of ``media``; one for a process, used by many requests at once.

    ``max_concurrent`` bounds fetches in flight (and with ``media.max_bytes`` the memory they hold); those that wait
    for their turn do not spend their timeout. ``resolve`` is the system's resolver unless given.
    """

    def __init__(self, media: MediaConfig, *, max_concurrent: int = 256, resolve: Resolve | None = None):
        self.media = media
        # Its own threads: a name server that a client runs must not hold the threads that decode pictures. One for
        # every fetch, since a lookup cannot be cancelled and may outlive its fetch.
        self._threads = ThreadPoolExecutor(max_workers=max_concurrent, thread_name_prefix="resolve")
        self._lookups: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._backend = CheckedBackend(media, resolve or self._system_resolve)
        self._turn = asyncio.Semaphore(max_concurrent)
        # A given authority file replaces the public ones: an operator who names his own wants no other.
        self._ssl = (
            ssl.create_default_context(cafile=media.ca_file) if media.ca_file else httpcore.default_ssl_context()
        )

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the resolver's threads go. Fetches in flight end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind an http(s) or ``data:`` URL, at most ``media.max_bytes``.

        Raises `UrlNotAllowed`, `MediaTooLarge`, `MediaTimeout`, `MediaError`, and `PayloadTooLarge` for a data URL
        over the bound. No message names an address, a host or a path.
        """
        if _is_data(url):
            return parse_data_url(url, self.media.max_bytes)
        target = check_url(url, self.media)
        async with self._turn:
            try:
                async with asyncio.timeout(self.media.timeout):
                    return await self._follow(url, target)
            except TimeoutError as error:
                raise MediaTimeout(f"the image did not arrive within {self.media.timeout:g} s") from error
            except httpcore.TimeoutException as error:
                raise MediaTimeout("the image's server did not answer in time") from error
            except (httpcore.NetworkError, OSError) as error:
                raise MediaError("the image's server could not be reached, or broke off") from error
            except httpcore.ProtocolError as error:
                raise MediaError("the image's server did not speak proper HTTP") from error

    async def _follow(self, url: str, target: Target) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            got = await self._get(target)
            if isinstance(got, bytes):
                return got
            try:
                url = urljoin(url, got)
            except ValueError as error:
                raise UrlNotAllowed("the image URL redirects to a malformed URL") from error
            following = check_url(url, self.media)
            if target.scheme == "https" and following.scheme != "https":
                raise UrlNotAllowed("the image URL redirects from https to http")
            target = following
        raise UrlNotAllowed(f"the image URL redirects more than {MAX_REDIRECTS} times")

    async def _get(self, target: Target) -> bytes | str:
        """One hop: the body, or the Location that the server redirects to."""
        origin = httpcore.Origin(target.scheme.encode(), target.host.encode(), target.port)
        request = httpcore.Request(
            "GET",
            httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=target.path.encode()),
            headers=[
                ("Host", target.authority),
                ("Accept", "image/*"),
                ("Accept-Encoding", "identity"),
                ("User-Agent", "dynamo-epd"),
                ("Connection", "close"),
            ],
        )
        async with httpcore.AsyncHTTPConnection(origin, self._ssl, network_backend=self._backend) as connection:
            response = await connection.handle_async_request(request)
            try:
                return await self._body(response)
            finally:
                await response.aclose()

    async def _body(self, response: httpcore.Response) -> bytes | str:
        headers = {name.lower(): value for name, value in response.headers}
        if response.status in _REDIRECTS:
            location = headers.get(b"location")
            if location is None:
                raise MediaError("the image's server redirects to nowhere")
            return location.decode("utf-8", "replace")
        if response.status != 200:
            raise MediaError(f"the image's server answered {response.status}")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            # Asked not to, so nothing honest is lost; and a small body that unpacks to a huge one stays packed.
            raise MediaTooLarge("the image's server compressed its reply, whose size nobody knows then")
        bound = self.media.max_bytes
        too_large = MediaTooLarge(f"the image has more than {bound} bytes")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > bound:
            raise too_large
        body = bytearray()
        try:
            async for chunk in response.aiter_stream():
                body += chunk
                if len(body) > bound:
                    raise too_large
        except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
            raise MediaTimeout("the image did not arrive whole") from error
        return bytes(body)

    async def _system_resolve(self, host: str, port: int) -> list[str]:
        domain = domain_of(host)
        turn = self._lookups.get(domain)
        if turn is None:
            self._lookups[domain] = turn = asyncio.Semaphore(LOOKUPS_PER_DOMAIN)
        await turn.acquire()
        loop = asyncio.get_running_loop()

        def returned(_: object) -> None:
            with suppress(RuntimeError):  # after this process' loop
                loop.call_soon_threadsafe(turn.release)

        lookup = self._threads.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        lookup.add_done_callback(returned)  # and not when the fetch gives up: the thread goes on
        found = await asyncio.wrap_future(lookup)
        return [str(entry[4][0]) for entry in found]


def domain_of(host: str) -> str:
    """The part of a name that someone registered, whose name servers are one's own: by rule of thumb, not by list."""
    labels = host.split(".")
    own = 3 if len(labels[-1]) == 2 and len(labels) > 2 and labels[-2] in _SECOND_LEVEL else 2
    return ".".join(labels[-own:])


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
