# SPDX-License-Identifier: Apache-2.0
"""HARDENING rows 1-4 against real servers: what is dialled, what is read, when it stops."""

from __future__ import annotations

import asyncio
import datetime
import gc
import gzip
import ipaddress
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dynamo_epd.errors import EpdError, MediaError, MediaTimeout, MediaTooLarge, PayloadTooLarge, UrlNotAllowed
from dynamo_epd.images.config import MediaConfig
from dynamo_epd.images.fetch import LOOKUPS_PER_DOMAIN, MAX_REDIRECTS, Fetcher, domain_of

OPEN = MediaConfig(allow_http=True, allow_private=True, max_bytes=100_000)
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request with what ``answer`` writes, and keeps every request that it saw."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.connections = 0
        self.requests: list[bytes] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request)
            await self.answer(request, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client hung up, as many of these tests want it to
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    answer: Answer, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.handle, host, 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


def reply(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None) -> Answer:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return answer


def raw(data: bytes) -> Answer:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def to(location: str, status: str = "302 Found") -> Answer:
    return reply(b"", status, f"Location: {location}")


async def dripping(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def dripping_headers(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-A: b\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


async def forever_continue(request: bytes, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


async def endless(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        await writer.drain()


async def endless_headers(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-A: " + b"b" * 4000 + b"\r\n")
        await writer.drain()


async def silent(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def failing(url: str, media: MediaConfig, **options: object) -> EpdError:
    async with Fetcher(media, **options) as fetcher:  # type: ignore[arg-type]
        with pytest.raises(EpdError) as caught:
            await fetcher.fetch(url)
    for secret in ("127.0.0.1", "localhost", "http://", "https://", "secret"):
        assert secret not in caught.value.message
    return caught.value


def test_a_picture_arrives() -> None:
    async def run() -> None:
        async with serving(reply(b"picture")) as server, Fetcher(OPEN) as fetcher:
            assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/A/b.png?Q=1#x") == b"picture"
            request = server.requests[0].lower()
            assert server.requests[0].startswith(b"GET /A/b.png?Q=1 HTTP/1.1\r\n")
            assert f"host: 127.0.0.1:{server.port}\r\n".encode() in request
            assert b"accept-encoding: identity\r\n" in request
            assert b"cookie" not in request and b"authorization" not in request and b"referer" not in request

    asyncio.run(run())


def test_many_at_once_each_get_their_own() -> None:
    async def echo(request: bytes, writer: asyncio.StreamWriter) -> None:
        path = request.split()[1]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))

    async def run() -> None:
        async with serving(echo) as server, Fetcher(OPEN, max_concurrent=16) as fetcher:
            urls = [f"http://localhost:{server.port}/{i}" for i in range(200)]
            assert await asyncio.gather(*map(fetcher.fetch, urls)) == [f"/{i}".encode() for i in range(200)]

    asyncio.run(run())


def test_chunked_and_unbounded_bodies_arrive() -> None:
    async def run() -> None:
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        for data in (chunked, b"HTTP/1.0 200 OK\r\n\r\nabcde"):
            async with serving(raw(data)) as server, Fetcher(OPEN) as fetcher:
                assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/") == b"abcde"

    asyncio.run(run())


def test_the_bound_itself_is_allowed() -> None:
    async def run() -> None:
        async with serving(reply(bytes(OPEN.max_bytes))) as server, Fetcher(OPEN) as fetcher:
            assert len(await fetcher.fetch(f"http://127.0.0.1:{server.port}/")) == OPEN.max_bytes

    asyncio.run(run())


# --- what is dialled


def test_nothing_inside_is_dialled() -> None:
    async def run() -> None:
        async with serving(reply(b"secret")) as canary:
            for host in (
                "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "[::1]",
                "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "\uff11\uff12\uff17.0.0.1", "a.localhost",
            ):  # fmt: skip
                for media in (MediaConfig(allow_http=True), MediaConfig(allow_http=True, allowed_hosts=("*.example",))):
                    error = await failing(f"http://{host}:{canary.port}/", media)
                    assert isinstance(error, UrlNotAllowed)
            assert canary.connections == 0

    asyncio.run(run())


def test_a_public_name_with_a_private_address_is_not_dialled() -> None:
    async def run() -> None:
        async with serving(reply(b"secret")) as canary:
            media = MediaConfig(allow_http=True, allowed_hosts=("images.example",))
            for addresses in (["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]):

                async def poisoned(host: str, port: int, found: list[str] = addresses) -> list[str]:
                    return found

                error = await failing(f"http://images.example:{canary.port}/", media, resolve=poisoned)
                assert isinstance(error, UrlNotAllowed)
            assert canary.connections == 0

    asyncio.run(run())


class RebindingResolverDouble:
    """A name server that answers with a public address to whoever checks and with a private one ever after."""

    def __init__(self, first: str, then: str):
        self.answers = [first]
        self.then = then
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return [self.answers.pop() if self.answers else self.then]


def test_the_address_that_was_checked_is_the_one_dialled() -> None:
    async def run() -> None:
        # 127.0.0.1 passes here; a second look would find 127.0.0.2, where nothing listens.
        async with serving(reply(b"picture")) as server:
            rebinding = RebindingResolverDouble("127.0.0.1", "127.0.0.2")
            async with Fetcher(OPEN, resolve=rebinding) as fetcher:
                assert await fetcher.fetch(f"http://images.example:{server.port}/") == b"picture"
            assert rebinding.asked == 1
            assert f"host: images.example:{server.port}\r\n".encode() in server.requests[0].lower()

    asyncio.run(run())


def test_a_name_that_turns_private_between_two_hops_is_refused() -> None:
    async def run() -> None:
        async with serving(reply(b"secret")) as canary, serving(to("/again")) as server:
            media = replace(OPEN, max_bytes=1000)
            rebinding = RebindingResolverDouble("127.0.0.1", "169.254.169.254")
            error = await failing(f"http://images.example:{server.port}/", media, resolve=rebinding)
            assert isinstance(error, UrlNotAllowed)
            assert rebinding.asked == 2 and server.connections == 1 and canary.connections == 0

    asyncio.run(run())


def test_the_next_address_is_tried_when_one_is_dead() -> None:
    async def run() -> None:
        async def two(host: str, port: int) -> list[str]:
            return ["127.0.0.9", "127.0.0.1"]

        async with serving(reply(b"picture")) as server, Fetcher(OPEN, resolve=two) as fetcher:
            assert await fetcher.fetch(f"http://images.example:{server.port}/") == b"picture"

    asyncio.run(run())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving(reply(b"picture")) as server, serving(reply(b"proxied")) as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy", "HTTPS_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            async with Fetcher(OPEN) as fetcher:
                assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/") == b"picture"
            assert proxy.connections == 0

    asyncio.run(run())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/a", "", "data"])
def test_another_scheme_is_refused(url: str) -> None:
    assert isinstance(asyncio.run(failing(url, OPEN)), UrlNotAllowed)


# --- redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed(status: str) -> None:
    async def run() -> None:
        async with serving(reply(b"picture")) as last:
            async with (
                serving(to(f"http://localhost:{last.port}/p%20q?r=1", status)) as first,
                Fetcher(OPEN) as fetcher,
            ):
                assert await fetcher.fetch(f"http://127.0.0.1:{first.port}/") == b"picture"
            assert last.requests[0].startswith(b"GET /p%20q?r=1 ")

    asyncio.run(run())


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://metadata.google.internal/",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://0.0.0.0/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "data:image/png;base64,AAAA",
        "http://user:secret@127.0.0.1/",
        "//[fe80::1]/",
        "http://[::1",
    ],
)
def test_a_redirect_to_a_forbidden_place_is_refused(location: str) -> None:
    async def run() -> None:
        async with serving(to(location)) as server:
            assert isinstance(await failing(f"http://127.0.0.1:{server.port}/", OPEN), UrlNotAllowed)
            assert server.connections == 1

    asyncio.run(run())


def test_a_redirect_out_of_the_allowed_hosts_is_refused() -> None:
    async def run() -> None:
        async with serving(reply(b"secret")) as canary:
            async with serving(to(f"http://127.0.0.1:{canary.port}/")) as server:
                media = replace(OPEN, allowed_hosts=("localhost",))
                assert isinstance(await failing(f"http://localhost:{server.port}/", media), UrlNotAllowed)
            assert server.connections == 1 and canary.connections == 0

    asyncio.run(run())


def test_a_redirect_loop_ends() -> None:
    async def run() -> None:
        async with serving(to("/again")) as server:
            assert isinstance(await failing(f"http://127.0.0.1:{server.port}/", OPEN), UrlNotAllowed)
            assert server.connections == MAX_REDIRECTS + 1

    asyncio.run(run())


# --- what is read

READ: dict[str, tuple[Answer, type[EpdError]]] = {
    "endless body": (endless, MediaTooLarge),
    "one byte over": (raw(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(OPEN.max_bytes + 1)), MediaTooLarge),
    "length over the bound, nothing sent": (reply(length=OPEN.max_bytes + 1), MediaTooLarge),
    "length of 10^18": (reply(length=10**18), MediaTooLarge),
    "length of 10^30": (reply(length=10**30), MediaError),
    "length above what comes": (reply(b"abc", length=50), MediaTimeout),
    "two lengths": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 3\r\n\r\nabc"), MediaError),
    "negative length": (reply(b"abc", length=-3), MediaError),
    "bad chunk": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc"), MediaTimeout),
    "chunks that stop": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"), MediaTimeout),
    "gzip bomb": (reply(gzip.compress(bytes(10**7)), "200 OK", "Content-Encoding: gzip"), MediaTooLarge),
    "deflate": (reply(b"x", "200 OK", "Content-Encoding: deflate, br"), MediaTooLarge),
    "not HTTP": (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), MediaError),
    "closed at once": (raw(b""), MediaError),
    "endless headers": (endless_headers, MediaError),
    "404": (reply(b"picture", "404 Not Found"), MediaError),
    "500": (reply(b"picture", "500 No"), MediaError),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), MediaError),
    "206": (reply(b"pict", "206 Partial Content"), MediaError),
    "304": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), MediaError),
    "redirect to nowhere": (reply(b"", "302 Found"), MediaError),
    "upgrade": (raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), MediaError),
}


@pytest.mark.parametrize(("answer", "kind"), READ.values(), ids=READ)
def test_a_server_that_misbehaves_is_a_media_error(answer: Answer, kind: type[EpdError]) -> None:
    async def run() -> None:
        async with serving(answer) as server:
            error = await failing(f"http://127.0.0.1:{server.port}/", OPEN)
            assert type(error) is kind and error.status == 400

    asyncio.run(run())


def test_what_follows_the_declared_length_is_not_read() -> None:
    async def run() -> None:
        async with serving(reply(b"picture and more", length=7)) as server, Fetcher(OPEN) as fetcher:
            assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/") == b"picture"

    asyncio.run(run())


SLOW = {"body": dripping, "headers": dripping_headers, "hints": forever_continue, "silent": silent}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_a_slow_server_runs_out_of_time(answer: Answer) -> None:
    async def run() -> None:
        async with serving(answer) as server:
            error = await failing(f"http://127.0.0.1:{server.port}/", replace(OPEN, timeout=0.4))
            assert type(error) is MediaTimeout and error.code == "media_timeout"

    asyncio.run(run())


def test_time_covers_redirects_together() -> None:
    async def slow_redirect(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await to("/again")(request, writer)

    async def run() -> None:
        async with serving(slow_redirect) as server:
            assert type(await failing(f"http://127.0.0.1:{server.port}/", replace(OPEN, timeout=0.5))) is MediaTimeout
            assert server.connections == 2

    asyncio.run(run())


def test_a_slow_name_server_runs_out_of_time() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    error = asyncio.run(failing("https://images.example/", replace(OPEN, timeout=0.2), resolve=never))
    assert type(error) is MediaTimeout


class SilentNameServerDouble:
    """Stands where the system's resolver is. ``evil.example``'s names take until they are let go; others are here."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.held = self.most_held = 0

    def __call__(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host.endswith(".evil.example"):
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            self.let_go.wait(60)
            self.held -= 1
            raise OSError("no such host")
        return [(0, 0, 0, "", ("127.0.0.1", port))]


def test_a_silent_name_server_keeps_no_neighbour_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    names = SilentNameServerDouble()
    monkeypatch.setattr(socket, "getaddrinfo", names)

    async def run() -> None:
        async with serving(reply(b"picture")) as server, Fetcher(replace(OPEN, timeout=3)) as fetcher:

            async def good() -> bytes:
                return await fetcher.fetch(f"http://good.example:{server.port}/")

            evil = [asyncio.create_task(fetcher.fetch(f"http://a{n}.evil.example/")) for n in range(100)]
            try:
                while names.held < LOOKUPS_PER_DOMAIN:
                    await asyncio.sleep(0.01)
                assert await good() == b"picture"
                refused = await asyncio.gather(*evil, return_exceptions=True)
                assert {type(error) for error in refused} == {MediaTimeout}
                assert names.held == LOOKUPS_PER_DOMAIN, "their threads are still out"
                assert await good() == b"picture"
                again = asyncio.create_task(fetcher.fetch("http://b.evil.example/"))
                await asyncio.sleep(0.1)
            finally:
                names.let_go.set()
            with pytest.raises(MediaError, match="no address"):  # it had its turn when one came back
                await again
            assert names.most_held == LOOKUPS_PER_DOMAIN
            del evil, refused, again  # tracebacks hold on to all that is in them
            async with asyncio.timeout(20):
                while fetcher._lookups:  # nothing is kept of a domain whose lookups are over
                    gc.collect()
                    await asyncio.sleep(0.01)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("a.b.evil.example", "evil.example"),
        ("evil.example", "evil.example"),
        ("a.shop.co.uk", "shop.co.uk"),
        ("a.co.com", "co.com"),
        ("a.b.com.de", "b.com.de"),
        ("co.uk", "co.uk"),
        ("localhost", "localhost"),
    ],
)
def test_names_of_one_owner_are_one_domain(host: str, domain: str) -> None:
    assert domain_of(host) == domain


def test_slow_fetches_do_not_spend_the_time_of_those_behind_them() -> None:
    async def run() -> None:
        media = replace(OPEN, timeout=0.5)
        async with (
            serving(dripping) as slow,
            serving(reply(b"picture")) as server,
            Fetcher(media, max_concurrent=1) as fetcher,
        ):
            first = asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{slow.port}/"))
            await asyncio.sleep(0.1)
            assert await fetcher.fetch(f"http://127.0.0.1:{server.port}/") == b"picture"
            with pytest.raises(MediaTimeout):
                await first

    asyncio.run(run())


def test_a_cancelled_fetch_hangs_up() -> None:
    async def run() -> None:
        gone = asyncio.Event()

        async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
            try:
                await dripping(request, writer)
            finally:
                gone.set()

        async with serving(answer) as server, Fetcher(OPEN) as fetcher:
            task = asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{server.port}/"))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(gone.wait(), 5)

    asyncio.run(run())


def test_an_unknown_name_and_a_shut_port_are_media_errors() -> None:
    async def nobody(host: str, port: int) -> list[str]:
        raise OSError("no such host secret.example")

    async def run() -> None:
        assert type(await failing("https://secret.example/", OPEN, resolve=nobody)) is MediaError
        async with serving(reply()) as server:
            port = server.port
        assert type(await failing(f"http://127.0.0.1:{port}/", OPEN)) is MediaError

    asyncio.run(run())


def test_data_urls_need_no_server() -> None:
    async def run() -> None:
        async with Fetcher(replace(MediaConfig(), max_bytes=3)) as fetcher:
            assert await fetcher.fetch("data:image/png;base64,QUJD") == b"ABC"
            with pytest.raises(PayloadTooLarge):
                await fetcher.fetch("data:image/png;base64,QUJDRA==")

    asyncio.run(run())


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key): self-signed for images.example and 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images.example")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("images.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server_tls(authority: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority)
    return context


async def at_home(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def test_https_asks_for_the_name_and_verifies_it(authority: tuple[Path, Path], server_tls: ssl.SSLContext) -> None:
    asked: list[str | None] = []
    server_tls.sni_callback = lambda sock, name, context: asked.append(name)
    media = replace(OPEN, ca_file=str(authority[0]))

    async def run() -> None:
        async with serving(reply(b"picture"), tls=server_tls) as server:
            async with Fetcher(media, resolve=at_home) as fetcher:
                assert await fetcher.fetch(f"https://images.example:{server.port}/") == b"picture"
                assert await fetcher.fetch(f"https://127.0.0.1:{server.port}/") == b"picture"
            assert asked == ["images.example", None]
            assert f"host: images.example:{server.port}\r\n".encode() in server.requests[0].lower()
            # Another name on the same certificate, and no authority: nothing is asked of the server.
            assert type(await failing(f"https://other.example:{server.port}/", media, resolve=at_home)) is MediaError
            url = f"https://images.example:{server.port}/"
            assert type(await failing(url, OPEN, resolve=at_home)) is MediaError
            assert len(server.requests) == 2

    asyncio.run(run())


def test_https_to_http_is_refused(authority: tuple[Path, Path], server_tls: ssl.SSLContext) -> None:
    media = replace(OPEN, ca_file=str(authority[0]))

    async def run() -> None:
        async with serving(reply(b"secret")) as canary:
            async with serving(to(f"http://127.0.0.1:{canary.port}/"), tls=server_tls) as server:
                assert isinstance(await failing(f"https://127.0.0.1:{server.port}/", media), UrlNotAllowed)
            assert server.connections == 1 and canary.connections == 0

    asyncio.run(run())


def test_http_to_https_is_followed(authority: tuple[Path, Path], server_tls: ssl.SSLContext) -> None:
    media = replace(OPEN, ca_file=str(authority[0]))

    async def run() -> None:
        async with (
            serving(reply(b"picture"), tls=server_tls) as last,
            serving(to(f"https://127.0.0.1:{last.port}/")) as first,
            Fetcher(media) as fetcher,
        ):
            assert await fetcher.fetch(f"http://127.0.0.1:{first.port}/") == b"picture"

    asyncio.run(run())


def test_http_is_refused_unless_configured() -> None:
    async def run() -> None:
        async with serving(reply(b"picture")) as server:
            url = f"http://127.0.0.1:{server.port}/"
            assert isinstance(await failing(url, replace(OPEN, allow_http=False)), UrlNotAllowed)
            assert server.connections == 0

    asyncio.run(run())
