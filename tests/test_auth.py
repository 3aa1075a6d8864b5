# SPDX-License-Identifier: Apache-2.0
"""Who may ask, and for what: keys, tenants, signed addresses, rates, TLS and NATS' password, against real processes."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nats
import nats.errors
import openai
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from starlette.requests import Request

from components.frontend import FrontendConfig
from components.results import Results
from dynamo_epd.errors import Gone, NotFound, RateLimited, Unauthorized
from dynamo_epd.http.auth import MOST_KEYS, Callers, Keys, Signer, key_of, new_key, signing_key
from dynamo_epd.http.rates import MOST_TENANTS, Rates
from dynamo_epd.jobs import JobQueue, JobsConfig
from dynamo_epd.page import cards
from dynamo_epd.page.graph_api import HERE
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.nats import connect_options, split_credentials
from dynamo_epd.sdk.nats_server import nats_binary
from dynamo_epd.store import Store, StoreConfig, Stored
from tests.certificates import Certificates
from tests.serving import Graph, eventually, untrained
from tests.toys.running import ROOT, Served, clean_environment, free_port

ASKED = "tests.toys.asked:Frontend"
RELAY = "tests/toys/relay.py:Front"
STAR = "a large red star on a blue background"
HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CHROMIUM = shutil.which("chromium")
BOUND = 120.0


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


def refused(reply: httpx.Response, status: int, code: str, type: str = "invalid_request_error") -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == (type, code)
    assert len(reply.content) <= 2048


def unauthorized(reply: httpx.Response, challenge: str = "Bearer") -> None:
    refused(reply, 401, "invalid_api_key", "authentication_error")
    assert reply.headers["www-authenticate"].split()[0] == challenge


class KeysFile:
    """A keys file with the keys in clear beside it, in memory."""

    def __init__(self, directory: Path, *tenants: str):
        self.path = directory / "keys.yaml"
        self.lines: dict[str, str] = {}
        self.key: dict[str, str] = {}
        for tenant in tenants:
            self.key[tenant], self.lines[tenant] = new_key(tenant)
        self.write("\n".join(self.lines.values()) + "\n")

    def write(self, text: str) -> None:
        """As an editor does: a new file in the place of the old one."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.chmod(0o640)
        fresh.rename(self.path)


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    return KeysFile(tmp_path, "ann", "bob")


# --- the keys file


def test_a_key_is_kept_only_as_its_hash(keys: KeysFile) -> None:
    assert re.fullmatch(r"dyn-[\w-]{43}", keys.key["ann"])
    assert hashlib.sha256(keys.key["ann"].encode()).hexdigest() in keys.path.read_text()
    assert keys.key["ann"] not in keys.path.read_text()
    found = Keys(keys.path)
    assert [found.tenant_of(keys.key[name]) for name in ("ann", "bob")] == ["ann", "bob"]
    assert found.tenant_of(keys.key["ann"][:-1]) is None
    assert found.tenant_of(hashlib.sha256(keys.key["ann"].encode()).hexdigest()) is None
    assert found.tenants == ("ann", "bob")


def test_json_is_taken_and_one_tenant_may_have_two_keys(tmp_path: Path) -> None:
    old, new = "old key", "new key"
    entries = [{"name": "ann", "hash": hashlib.sha256(key.encode()).hexdigest()} for key in (old, new)]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    assert [Keys(path).tenant_of(key) for key in (old, new)] == ["ann", "ann"]


GOOD = "a" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "secret",
        "ann: secret",
        "- secret",
        "- {name: ann}",
        "- {name: ann, hash: secret}",
        "- {name: ann, hash: 12}",
        f"- {{name: ann, hash: {GOOD}, key: secret}}",
        f"- {{name: ../secret, hash: {GOOD}}}",
        f"- {{name: '', hash: {GOOD}}}",
        f"- {{name: 1, hash: {GOOD}}}",
        f"- {{name: ann, hash: {GOOD}}}\n" * (MOST_KEYS + 1),
        "# secret\n" * 200_000,
        "\x00secret",
        "[" * 5000,
    ],
)
def test_a_file_that_holds_no_keys_is_an_error_that_quotes_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Keys(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(keys: KeysFile, mode: int) -> None:
    keys.path.chmod(mode)
    with pytest.raises(ConfigError, match="others may write"):
        Keys(keys.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_file_of_another_user_is_refused(keys: KeysFile) -> None:
    os.chown(keys.path, 12345, -1)
    with pytest.raises(ConfigError, match="another user"):
        Keys(keys.path)


def test_a_changed_file_counts_from_the_next_request_on(keys: KeysFile) -> None:
    found = Keys(keys.path)
    keys.write(keys.lines["bob"])
    assert [found.tenant_of(keys.key[name]) for name in ("ann", "bob")] == [None, "bob"]
    keys.write("[]")
    assert found.tenant_of(keys.key["bob"]) is None
    assert found.tenants == ()


def test_a_broken_new_file_keeps_the_old_keys_and_says_so_once(
    keys: KeysFile, caplog: pytest.LogCaptureFixture
) -> None:
    found = Keys(keys.path)
    breaks: list[Callable[[], object]] = [
        lambda: keys.write("- {name: ann, ha"),
        lambda: keys.path.chmod(0o666),
        keys.path.unlink,
    ]
    for broken in breaks:
        caplog.clear()
        broken()
        with caplog.at_level(logging.ERROR):
            assert [found.tenant_of(keys.key[name]) for name in ("ann", "bob")] == ["ann", "bob"]
        assert len([one for one in caplog.records if "the keys stay as they were" in one.message]) == 1
    keys.write(keys.lines["ann"])
    assert found.tenant_of(keys.key["bob"]) is None


def test_a_new_file_that_could_not_be_read_is_read_with_the_next_request(
    keys: KeysFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_descriptor_is_left(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    found = Keys(keys.path)
    keys.write(keys.lines["bob"])
    with monkeypatch.context() as full, caplog.at_level(logging.ERROR):
        full.setattr(Path, "open", no_descriptor_is_left)
        assert [found.tenant_of(keys.key["ann"]) for _ in range(3)] == ["ann"] * 3
    assert [one.message for one in caplog.records] == [
        f"the keys stay as they were: {keys.path}: Too many open files",
    ]
    assert found.tenant_of(keys.key["ann"]) is None


def dynamo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo_epd.sdk.cli", *arguments],
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_shows_a_key_once_and_the_line_to_add(tmp_path: Path) -> None:
    said = [dynamo("key", "ann").stdout.splitlines() for _ in range(2)]
    shown = [[line for line in lines if not line.startswith("#")] for lines in said]
    assert shown[0] != shown[1]
    for key, line in shown:
        path = tmp_path / "keys.yaml"
        path.write_text(line)
        assert Keys(path).tenant_of(key) == "ann"
    bad = dynamo("key", "no/name")
    assert (bad.returncode, bad.stdout) == (2, "")


# --- who is asking


def test_who_asks_is_known_by_key_password_or_signature(keys: KeysFile) -> None:
    signer = Signer(b"x" * 32)
    callers = Callers(Keys(keys.path), signer)
    ann = keys.key["ann"]

    def ask(path: str, headers: dict[str, str] | None = None, method: str = "GET", query: str = "") -> Any:
        return callers.tenant_of(method, path, query.encode(), (headers or {}).get("Authorization"))

    assert ask("/v1/models", bearer(ann)) == ("ann", True)
    assert ask("/v1/models", {"Authorization": f"bearer   {ann} "}) == ("ann", True)
    assert ask("/live") == ask("/health") == ("", False)
    assert ask("/ui/theme.css", basic(ann)) == ask("/ui", bearer(ann)) == ("ann", False)
    signed = signer.query("bob", "/v1/images/img-1", int(time.time()) + 60)
    for method in ("GET", "HEAD"):
        assert ask("/v1/images/img-1", query=signed, method=method) == ("bob", False)
    assert ask("/v1/images/img-1", bearer(ann), query=signed) == ("bob", False), "an address is for anyone"
    assert ask("/v1/images/img-2", bearer(ann), query=signed) == ("ann", True)
    with pytest.raises(NotFound):
        ask("/v1/images/img-2", basic(ann), query=signed)
    with pytest.raises(Unauthorized):
        ask("/v1/images/img-2", bearer("dyn-no"), query=signed)
    for headers in (None, basic(ann), bearer("dyn-no"), bearer(""), {"Authorization": ann}, bearer(ann[:-1])):
        with pytest.raises(Unauthorized):
            ask("/v1/models", headers)
    for path in ("/uix", "/live/", "/health/x", "//health", "/HEALTH", "/metrics", "/openapi.json", "/"):
        with pytest.raises(Unauthorized):
            ask(path, basic(ann))
    for path, method in (("/v1/images/img-1", "DELETE"), ("/v1/images/jobs/img-1", "GET"), ("/v1/images", "GET")):
        with pytest.raises(Unauthorized):
            ask(path, query=signed, method=method)


def test_a_signature_is_of_one_tenant_one_picture_and_one_time() -> None:
    signer, path, tenants = Signer(b"x" * 32), "/v1/images/img-1", ("ann", "bob")
    end = int(time.time()) + 60

    def found(query: str, path: str = path, tenants: tuple[str, ...] = tenants) -> str:
        fields = dict(one.split("=", 1) for one in query.split("&"))
        return signer.tenant_of(tenants, path, {name: [value] for name, value in fields.items()})

    query = signer.query("bob", path, end)
    assert found(query) == "bob"
    with pytest.raises(Gone):
        found(signer.query("bob", path, int(time.time())))
    wrong = [
        query.replace(str(end), str(end + 1)),
        query[:-1],
        query + "A",
        query.replace("signature=", "signature=%00"),
        "expires=1&signature=",
        "signature=x",
        f"expires={10**13}&signature={query[-43:]}",
        f"expires=-1&signature={query[-43:]}",
    ]
    for one in wrong:
        with pytest.raises(NotFound) as caught:
            found(one)
        assert caught.value.status == 404
    for other in ({"path": "/v1/images/img-2"}, {"tenants": ("ann",)}):
        with pytest.raises(NotFound):
            found(query, **other)  # type: ignore[arg-type]
    with pytest.raises(NotFound):
        Signer(b"y" * 32).tenant_of(tenants, path, {"expires": [str(end)], "signature": [query[-43:]]})


def test_all_processes_draw_one_signing_key(tmp_path: Path) -> None:
    script = "from dynamo_epd.http.auth import signing_key; print(signing_key(None).hex())"
    environment = clean_environment() | {"XDG_STATE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert len(said) == 1
    (path,) = (tmp_path / "dynamo").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(said.pop())) == 32


def test_a_signing_key_that_others_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"x" * 32)
    path.chmod(0o600)
    assert signing_key(path) == b"x" * 32
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="others may read"):
        signing_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="32 bytes"):
        signing_key(path)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("Basic " + base64.b64encode(b"anyone:a:b").decode(), "a:b"),
        ("Basic " + base64.b64encode(b"nobody").decode(), None),
        ("Basic ???", None),
        ("Basic \u00e9", None),
        ("Basic " + base64.b64encode(b"\xff\xfe:x").decode(), None),
        ("Digest abc", None),
        ("Bearer", None),
        ("", None),
        (None, None),
    ],
)
def test_the_key_in_a_header(header: str | None, key: str | None) -> None:
    assert key_of(header) == key


# --- rates


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_requests_come_at_once_or_by_and_by_and_tenants_do_not_share() -> None:
    clock = Clock()
    rates = Rates(3, None, clock)

    def ask(tenant: str) -> dict[str, str]:
        told: dict[str, str] = {}
        with rates.counted(tenant, told):
            return told

    assert [ask("ann")["x-ratelimit-remaining-requests"] for _ in range(3)] == ["2", "1", "0"]
    for _ in range(5):  # a refusal costs nothing
        with pytest.raises(RateLimited) as caught:
            ask("ann")
        assert caught.value.retry_after == pytest.approx(20)
    assert ask("bob")["x-ratelimit-reset-requests"] == "20s"
    clock.now += 20
    assert ask("ann") == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    with pytest.raises(RateLimited):
        ask("ann")
    clock.now += 600
    assert ask("ann")["x-ratelimit-remaining-requests"] == "2", "what was not used is not saved up"


@pytest.mark.parametrize("per_minute", [1, 7, 13, 599, 60_000])
def test_who_waits_as_long_as_told_is_served(per_minute: int) -> None:
    clock = Clock()
    rates = Rates(per_minute, None, clock)
    refusals = 0
    for _ in range(per_minute + 100):
        while True:
            told: dict[str, str] = {}
            try:
                with rates.counted("ann", told):
                    assert int(told["x-ratelimit-remaining-requests"]) >= 0
                break
            except RateLimited as refusal:
                refusals += 1
                clock.now += refusal.retry_after or 0
    assert refusals == 100


def test_only_so_many_at_once() -> None:
    rates = Rates(None, 2)
    with rates.counted("ann", {}), rates.counted("ann", {}):
        with pytest.raises(RateLimited), rates.counted("ann", {}):
            pass
        with rates.counted("bob", {}):
            pass
    with rates.counted("ann", {}):
        pass


def test_counts_take_bounded_memory() -> None:
    clock = Clock()
    rates = Rates(10, 1, clock)
    with rates.counted("busy", {}):
        for index in range(3 * MOST_TENANTS):
            clock.now += 0.1
            with rates.counted(str(index), {}):
                pass
        assert len(rates._counts) <= MOST_TENANTS + 1
        with pytest.raises(RateLimited), rates.counted("busy", {}):
            pass


# --- a graph with keys


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, KeysFile]]:
    """The edge with two tenants, no model behind it."""
    home = tmp_path_factory.mktemp("house")
    keys = KeysFile(home, "ann", "bob", "cy")
    with Served(home / "state", ASKED, f"--Frontend.auth.keys-file={keys.path}") as served:
        yield served.wait_until_up(), keys
        assert served.stop() == 0
        assert served.leftovers() == []


@pytest.fixture
def http(house: tuple[Served, KeysFile]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{house[0].port}", timeout=BOUND) as client:
        yield client


def test_every_route_wants_a_key_but_two(house: tuple[Served, KeysFile], http: httpx.Client) -> None:
    key = bearer(house[1].key["ann"])
    routes = {
        (method.upper(), path.replace("{id}", "x").replace("{model}", "x"))
        for path, methods in http.get("/openapi.json", headers=key).json()["paths"].items()
        for method in methods
    }
    assert len(routes) >= 18
    for method, path in routes | {("GET", "/openapi.json"), ("GET", "/nothing"), ("OPTIONS", "/v1/models")}:
        reply = http.request(method, path)
        if path in ("/live", "/health"):
            assert reply.status_code == 200
        elif method == "HEAD":
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        else:
            unauthorized(reply)
    assert "epd_request_duration_seconds_bucket" in http.get("/metrics", headers=key).text


def test_a_key_is_a_tenant_all_the_way(house: tuple[Served, KeysFile], http: httpx.Client) -> None:
    for tenant, key in house[1].key.items():
        assert http.post("/v1/chat/completions", json=HI, headers=bearer(key)).json() == {"tenant": tenant}


def test_openais_client_says_who_it_is(house: tuple[Served, KeysFile], http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="dyn-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=house[1].key["bob"], max_retries=0) as client:
        assert client.models.list().data == []


def test_a_stranger_is_refused_before_his_body_comes(house: tuple[Served, KeysFile]) -> None:
    with socket.create_connection(("127.0.0.1", house[0].port), timeout=20) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n")
        said = connection.recv(65536)
    assert said.startswith(b"HTTP/1.1 401 ")


def test_a_key_that_is_taken_away_while_the_graph_runs(house: tuple[Served, KeysFile], http: httpx.Client) -> None:
    served, keys = house
    cy = bearer(keys.key["cy"])
    assert http.get("/v1/models", headers=cy).status_code == 200
    keys.write("- {name: cy, has")
    assert http.get("/v1/models", headers=cy).status_code == 200
    served.wait_for("the keys stay as they were: .*neither YAML nor JSON")
    keys.write("\n".join(line for name, line in keys.lines.items() if name != "cy"))
    unauthorized(http.get("/v1/models", headers=cy))
    assert http.get("/v1/models", headers=bearer(keys.key["ann"])).status_code == 200


def test_the_page_asks_the_browser_for_the_key(house: tuple[Served, KeysFile], http: httpx.Client) -> None:
    key = house[1].key["ann"]
    unauthorized(http.get("/ui"), "Basic")
    unauthorized(http.get("/ui/", headers=basic("dyn-wrong")), "Basic")
    unauthorized(http.post("/ui/gradio_api/queue/join", json={}), "Basic")
    eventually(lambda: http.get("/ui/", headers=basic(key)).status_code == 200, "the page", 60)
    unauthorized(http.get("/v1/models", headers=basic(key)))
    elsewhere = basic(key) | {"Sec-Fetch-Site": "cross-site"}
    assert http.post("/ui/gradio_api/queue/join", json={}, headers=elsewhere).status_code == 403
    assert http.get("/ui/", headers=elsewhere).status_code == 200, "a link from elsewhere may lead here"


def test_there_is_no_way_in_by_websocket(house: tuple[Served, KeysFile]) -> None:
    handshake = (
        "GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    for path in ("/ui/", "/v1/models"):
        with socket.create_connection(("127.0.0.1", house[0].port), timeout=20) as connection:
            connection.sendall(handshake.format(path).encode())
            said = connection.recv(65536)
        assert re.match(rb"HTTP/1.1 (401|403) ", said), said


@pytest.mark.parametrize("break_it", ["gone", "open", "empty"])
def test_a_graph_without_usable_keys_does_not_come_up(tmp_path: Path, break_it: str) -> None:
    keys = KeysFile(tmp_path, "ann")
    {"gone": keys.path.unlink, "open": lambda: keys.path.chmod(0o666), "empty": lambda: keys.write("")}[break_it]()
    with Served(tmp_path / "state", ASKED, f"--Frontend.auth.keys-file={keys.path}") as served:
        served.wait_for("<end>")
        assert served.wait() == 2
        assert "keys.yaml" in served.text
        assert "Traceback" not in served.text
        assert not any(line.startswith("http") for line in served.lines)


def test_limits_are_a_tenants_own(tmp_path: Path) -> None:
    keys = KeysFile(tmp_path, "ann", "bob")
    limits = ("requests-per-minute=6", "concurrent=2", "body-bytes=2000")
    arguments = [f"--Frontend.limits.{one}" for one in limits]
    with Served(tmp_path / "state", ASKED, f"--Frontend.auth.keys-file={keys.path}", *arguments) as served:
        served.wait_until_up()
        url = f"http://127.0.0.1:{served.port}"
        with httpx.Client(base_url=url, timeout=BOUND) as http:
            for _ in range(20):  # neither of those who look after the process, nor of strangers
                assert http.get("/health").status_code == 200
                unauthorized(http.get("/v1/models"))
            ann, bob = bearer(keys.key["ann"]), bearer(keys.key["bob"])
            long = HI | {"stream": True, "max_tokens": 600}
            with (
                http.stream("POST", "/v1/chat/completions", json=long, headers=ann) as first,
                http.stream("POST", "/v1/chat/completions", json=long, headers=ann) as second,
            ):
                pieces = [first.iter_bytes(), second.iter_bytes()]  # one that is dropped closes its connection
                assert all(next(one) for one in pieces)
                at_once = http.post("/v1/chat/completions", json=HI, headers=ann)
                refused(at_once, 429, "rate_limit_exceeded", "rate_limit_error")
                assert int(at_once.headers["retry-after"]) == 1
                assert http.post("/v1/chat/completions", json=HI, headers=bob).json() == {"tenant": "bob"}
            reply = eventually(
                lambda: (one := http.get("/v1/models", headers=ann)).status_code == 200 and one,
                "the streams that ann left to be over",
            )
            assert reply.headers["x-ratelimit-limit-requests"] == "6"
            assert int(reply.headers["x-ratelimit-remaining-requests"]) < 6
            refused(http.post("/v1/chat/completions", content=b"x" * 2001, headers=ann), 413, "payload_too_large")
            replies = [http.get("/v1/models", headers=ann) for _ in range(6)]
            over = next(one for one in replies if one.status_code != 200)
            refused(over, 429, "rate_limit_exceeded", "rate_limit_error")
            assert 1 <= int(over.headers["retry-after"]) <= 10
            assert over.headers["x-ratelimit-remaining-requests"] == "0"
            assert re.fullmatch(r"(\d+m)?[\d.]+m?s", over.headers["x-ratelimit-reset-requests"])
            assert http.get("/v1/models", headers=bob).status_code == 200
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=keys.key["ann"], max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            all(client.models.list() for _ in range(7))
        assert served.stop() == 0


def test_without_keys_everyone_is_one_tenant(tmp_path: Path) -> None:
    with Served(tmp_path, ASKED, "--Frontend.limits.requests-per-minute=2") as served:
        served.wait_until_up()
        url = f"http://127.0.0.1:{served.port}/v1/models"
        assert [httpx.get(url, headers=bearer(key)).status_code for key in ("a", "b", "c")] == [200, 200, 429]
        assert served.stop() == 0


# --- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"), "DNS:localhost")


def test_the_frontend_speaks_tls_and_nothing_else(certificates: Certificates, tmp_path: Path) -> None:
    tls = (f"--Frontend.tls.cert-file={certificates.cert}", f"--Frontend.tls.key-file={certificates.key}")
    with Served(tmp_path, ASKED, *tls) as served:
        served.wait_for(rf"^https://127.0.0.1:{served.port}$")
        url = f"https://localhost:{served.port}"
        reply = httpx.post(f"{url}/v1/chat/completions", json=HI, verify=certificates.trust)
        assert reply.json() == {"tenant": ""}
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/live")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{served.port}/live")
        old = certificates.trust
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/live", verify=old)
        assert served.stop() == 0
        assert served.leftovers() == []


def test_certificates_that_cannot_be_used_are_an_error_at_the_start(certificates: Certificates, tmp_path: Path) -> None:
    pairs = [(tmp_path / "no.pem", certificates.key), (certificates.root, certificates.key)]
    for index, (cert, key) in enumerate(pairs):
        tls = (f"--Frontend.tls.cert-file={cert}", f"--Frontend.tls.key-file={key}")
        with Served(tmp_path / str(index), ASKED, *tls) as served:
            served.wait_for("<end>")
            assert served.wait() == 2
            assert str(cert) in served.text
            assert "Traceback" not in served.text


# --- NATS


@pytest.mark.parametrize(
    ("server", "found"),
    [
        ("nats://h:4222", {"NATS_SERVER": "nats://h:4222"}),
        ("nats://ann:p%40ss@h:4222", {"NATS_AUTH_USERNAME": "ann", "NATS_AUTH_PASSWORD": "p@ss"}),
        ("ann:pass@h:4222", {"NATS_AUTH_USERNAME": "ann", "NATS_AUTH_PASSWORD": "pass"}),
        ("tls://token@[::1]:4222", {"NATS_SERVER": "tls://[::1]:4222", "NATS_AUTH_TOKEN": "token"}),
    ],
)
def test_credentials_leave_the_address(server: str, found: dict[str, str]) -> None:
    environment = {"NATS_SERVER": server}
    split_credentials(environment)
    assert environment == {"NATS_SERVER": "nats://h:4222"} | found


def test_what_a_connection_is_told_by_the_environment(certificates: Certificates, tmp_path: Path) -> None:
    assert connect_options({}) == {}
    both = {"NATS_AUTH_USERNAME": "u", "NATS_AUTH_PASSWORD": "p", "NATS_AUTH_TOKEN": "t"}
    assert connect_options(both) == {"user": "u", "password": "p"}
    assert connect_options({"NATS_AUTH_TOKEN": "t"}) == {"token": "t"}
    tls = {"NATS_SERVER": "tls://h", "NATS_TLS_CA_CERT_PATH": str(certificates.root)}
    context = connect_options(tls)["tls"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert connect_options(tls | {"NATS_TLS_INSECURE": "true"})["tls"].verify_mode == ssl.CERT_NONE
    if importlib.util.find_spec("nkeys") is None:
        for name in ("NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE"):
            with pytest.raises(ConfigError, match=f"{name}: .* nkeys"):
                connect_options({name: "x"})
    with pytest.raises(ConfigError, match=r"no\.pem"):
        connect_options(tls | {"NATS_TLS_CA_CERT_PATH": str(tmp_path / "no.pem")})


@pytest.fixture
def secured(certificates: Certificates, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that leads to a nats-server with a password and TLS."""
    port = free_port()
    config = tmp_path / "nats.conf"
    config.write_text(
        f"listen: 127.0.0.1:{port}\nauthorization {{ user: ann, password: s3cret }}\n"
        f'jetstream {{ store_dir: "{tmp_path}/js" }}\nmax_payload: 8MB\n'
        f'tls {{ cert_file: "{certificates.cert}", key_file: "{certificates.key}" }}\n'
    )
    with (tmp_path / "nats.log").open("w") as log:
        process = subprocess.Popen([nats_binary(), "-c", str(config)], stdout=log, stderr=log)
    try:
        eventually(lambda: "Server is ready" in (tmp_path / "nats.log").read_text(), "nats-server")
        yield {
            "NATS_SERVER": f"tls://ann:s3cret@localhost:{port}",
            "NATS_TLS_CA_CERT_PATH": str(certificates.root),
        }
    finally:
        process.terminate()
        process.wait(20)


def test_a_graph_over_a_nats_with_a_password_and_tls(secured: dict[str, str], tmp_path: Path) -> None:
    with Served(tmp_path / "state", ASKED, **secured) as served:
        served.wait_until_up()
        reply = httpx.post(f"http://127.0.0.1:{served.port}/v1/chat/completions", json=HI)
        assert reply.json() == {"tenant": ""}
        assert not any("s3cret" in path.read_text() for path in (tmp_path / "state").rglob("*") if path.is_file())
        assert served.stop() == 0
    shown = dynamo("serve", ASKED, "--dry-run", XDG_STATE_HOME=str(tmp_path), **secured)
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["environment"]["NATS_SERVER"].startswith("tls://localhost:")
    assert "s3cret" not in shown.stdout + shown.stderr


def test_jobs_reach_a_nats_with_a_password_and_tls(secured: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    split_credentials(secured)
    for name, value in secured.items():
        monkeypatch.setenv(name, value)

    async def main() -> None:
        queue = JobQueue("toys", JobsConfig())
        await queue.open(secured["NATS_SERVER"])
        with pytest.raises(NotFound):
            await queue.state("ann", "job-" + "0" * 32)
        await queue.close()

    asyncio.run(main())


def test_our_own_nats_lets_no_other_user_in(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        record = tmp_path / "dynamo" / "nats.json"
        (config,) = (tmp_path / "dynamo").glob("nats-*/nats.conf")
        assert [stat.S_IMODE(path.stat().st_mode) for path in (record, config)] == [0o600, 0o600]
        known = json.loads(record.read_text())
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in served.processes()]
        assert not any(known["password"] in command for command in commands), "anyone may list processes"

        async def connect(**how: str) -> None:
            connection = await nats.connect(known["url"], allow_reconnect=False, **how)
            await connection.close()

        for how in ({}, {"user": "dynamo", "password": "guess"}, {"token": "x"}):
            with pytest.raises(nats.errors.Error):
                asyncio.run(connect(**how))
        asyncio.run(connect(user="dynamo", password=known["password"]))
        assert served.call({"mode": "count"})
        assert served.stop() == 0
        assert served.leftovers() == []


# --- pictures of several tenants, behind TLS, with two frontends and the page

CONFIG = """
Frontend:
  auth: {{keys-file: {keys}}}
  tls: {{cert-file: {cert}, key-file: {key}}}
  ServiceArgs: {{workers: 2}}
EmbedWorker: {{model: models/tiny/t5, served-model-name: tiny-t5}}
ImageWorker:
  model: build/untrained/pixart
  served-model-name: tiny-image
  num-inference-steps: 2
  sizes: {{default: 64x64}}
"""


@pytest.fixture(scope="module")
def gallery(certificates: Certificates) -> Iterator[tuple[Graph, KeysFile]]:
    untrained("pixart")
    home = Path(tempfile.mkdtemp(prefix="epd"))
    keys = KeysFile(home, "ann", "bob")
    config = home / "config.yaml"
    config.write_text(CONFIG.format(keys=keys.path, cert=certificates.cert, key=certificates.key))
    try:
        with Graph(home, "tests.toys.picturing:Frontend", "-f", str(config)) as graph:
            graph.wait_for(r"^https://", 400)
            yield graph, keys
            graph.finish()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def ask(gallery: tuple[Graph, KeysFile], certificates: Certificates) -> Callable[..., httpx.Response]:
    """A request on a connection of its own, and so to now one and now the other frontend."""
    graph, keys = gallery

    def one(method: str, path: str, tenant: str | None = None, **more: Any) -> httpx.Response:
        headers = more.pop("headers", {}) | (bearer(keys.key[tenant]) if tenant else {})
        url = path if path.startswith("https") else f"https://localhost:{graph.port}{path}"
        return httpx.request(method, url, headers=headers, verify=certificates.trust, timeout=BOUND, **more)

    return one


Ask = Callable[..., httpx.Response]


def drawn(ask: Ask, tenant: str, seed: int = 1) -> dict[str, Any]:
    body = {"prompt": f"{STAR} {tenant}", "seed": seed, "response_format": "url"}
    reply = ask("POST", "/v1/images/generations", tenant, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["data"][0]
    return found


def ended(ask: Ask, tenant: str, id: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        state: dict[str, Any] = ask("GET", f"/v1/images/jobs/{id}", tenant).json()
        return state if state["status"] in ("completed", "failed") else {}

    found: dict[str, Any] = eventually(look, "the job", BOUND)
    return found


def test_a_picture_is_its_tenants_alone(ask: Ask) -> None:
    picture = f"/v1/images/{drawn(ask, 'ann')['id']}"
    absent = "/v1/images/img-" + "0" * 32
    for method in ("GET", "DELETE"):
        other, none = ask(method, picture, "bob"), ask(method, absent, "bob")
        refused(other, 404, "not_found")
        assert other.json() == none.json(), "it does not tell that there is one"
    assert ask("GET", picture, "ann").status_code == 200
    drawn(ask, "bob")
    for tenant in ("ann", "bob"):
        prompts = {one["prompt"] for one in ask("GET", "/v1/images", tenant).json()["data"]}
        assert prompts == {f"{STAR} {tenant}"}
    unauthorized(ask("GET", picture))
    assert ask("DELETE", picture, "ann").status_code == 200


def test_a_job_and_its_key_are_its_tenants_alone(ask: Ask) -> None:
    key = {"Idempotency-Key": f"key-{time.time_ns()}"}
    jobs = {
        tenant: ask("POST", "/v1/images/jobs", tenant, json={"prompt": f"{STAR} {tenant}"}, headers=key).json()["id"]
        for tenant in ("ann", "bob")
    }
    assert jobs["ann"] != jobs["bob"]
    for path in ("/v1/images/jobs", "/results"):
        other = ask("GET", f"{path}/{jobs['ann']}", "bob")
        refused(other, 404, "not_found")
        assert other.json() == ask("GET", f"{path}/job-{'0' * 32}", "bob").json()
    (made,) = ended(ask, "ann", jobs["ann"])["data"]
    assert ask("GET", made["url"]).status_code == 200
    found = ask("GET", f"/results/{jobs['ann']}", "ann").json()
    assert ask("GET", found["url"]).content == ask("GET", made["url"]).content
    refused(ask("GET", f"/v1/images/{made['id']}", "bob"), 404, "not_found")
    ended(ask, "bob", jobs["bob"])


def test_a_signed_address_needs_no_key_and_is_good_for_nothing_else(gallery: tuple[Graph, KeysFile], ask: Ask) -> None:
    graph, _ = gallery
    made = drawn(ask, "ann", 5)
    url = httpx.URL(made["url"])
    assert (url.scheme, url.port) == ("https", graph.port)
    expires = int(url.params["expires"])
    assert 3500 < expires - time.time() <= 3600
    for _ in range(6):  # either frontend signs and knows the other's
        file = ask("GET", made["url"])
        assert file.status_code == 200
    assert Image.open(io.BytesIO(file.content)).size == (64, 64)
    assert ask("HEAD", made["url"]).headers["content-length"] == str(len(file.content))
    assert ask("GET", made["url"], headers={"Range": "bytes=0-3"}).status_code == 206
    unauthorized(ask("DELETE", made["url"]))
    absent = ask("GET", f"/v1/images/img-{'0' * 32}", "ann").json()
    other = drawn(ask, "ann", 6)["id"]
    for wrong in (
        made["url"].replace(made["id"], other),
        made["url"].replace(str(expires), str(expires + 60)),
        made["url"][:-2] + "xx",
        re.sub("expires=[0-9]+&", "", made["url"]),
    ):
        reply = ask("GET", wrong)
        refused(reply, 404, "not_found")
        assert reply.json() == absent
    signer = Signer((graph.state / "dynamo" / "signing.key").read_bytes())
    path = url.path
    late = ask("GET", f"{path}?{signer.query('ann', path, int(time.time()) - 1)}")
    refused(late, 410, "expired")
    never = f"/v1/images/img-{'0' * 32}"
    gone = ask("GET", f"{never}?{signer.query('ann', never, int(time.time()) - 1)}")
    assert gone.json() == late.json(), "whether there was a picture or not"
    assert ask("DELETE", f"/v1/images/{made['id']}", "ann").status_code == 200
    refused(ask("GET", made["url"]), 404, "not_found")


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_the_page_shows_a_tenants_own_pictures(gallery: tuple[Graph, KeysFile], ask: Ask) -> None:
    graph, keys = gallery
    for tenant in ("ann", "bob"):
        drawn(ask, tenant, 7)
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            http_credentials={"username": "", "password": keys.key["bob"]}, ignore_https_errors=True
        )
        page = context.new_page()
        page.set_default_timeout(BOUND * 1000)
        page.on("response", lambda reply: asked.append(f"{reply.status} {reply.url}"))
        url = f"https://localhost:{graph.port}/ui"

        def open_it() -> bool:
            reply = page.goto(url)
            return reply is not None and reply.status == 200

        eventually(open_it, "the page", BOUND, 1)
        page.get_by_role("tab", name="Gallery").click()
        shown = page.locator("#epd-gallery li")
        expect(shown.first).to_be_visible(timeout=BOUND * 1000)
        prompts = page.locator("#epd-gallery .asked").all_inner_texts()
        assert set(prompts) == {f"{STAR} bob"}
        loaded = "image => image.complete && image.naturalWidth"
        eventually(lambda: page.locator("#epd-gallery img").first.evaluate(loaded) == 64, "the picture itself")
        browser.close()
    # The browser itself sends no key to pictures: the address is enough.
    assert any(one.startswith("200 ") and "/v1/images/" in one and "signature=" in one for one in asked)


@pytest.mark.parametrize("host", ["here:8000", "elsewhere:1"])
def test_the_page_keeps_the_signature_by_whatever_name_it_is_reached(host: str) -> None:
    own = {"id": "img-1", "url": "https://here:8000/v1/images/img-1?expires=1&signature=x"}
    assert cards.address(own, host) == "../v1/images/img-1?expires=1&amp;signature=x"
    stored = {"id": "img-1", "url": "https://store/bucket/img-1.png?X-Amz-Signature=y"}
    assert cards.address(stored, host) == "../v1/images/img-1"


def test_the_page_is_given_no_address_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    results = Results()
    results.config = FrontendConfig(store=StoreConfig("s3://pictures"))
    results.store = Store(results.config.store)
    results.signer = Signer(b"x" * 32)
    stored = Stored("img-1", "image/png", 1, "0" * 32, 0.0, time.time() + 60, key="img-1.1.0")

    def address(*headers: tuple[bytes, bytes]) -> str:
        server = {"scheme": "http", "server": ("here", 80), "path": "/", "query_string": b""}
        scope = {"type": "http", "headers": list(headers), "state": {"tenant": "ann"}} | server
        return results.address_of(Request(scope), stored)

    assert "amazonaws" in address()
    assert re.fullmatch(r"http://here/v1/images/img-1\?expires=\d+&signature=.+", address((HERE.encode(), b"1")))


# --- what is written about it


def test_the_readmes_configuration_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    config = tmp_path / "config.yaml"
    config.write_text(text)
    shown = dynamo("serve", ASKED, "-f", str(config), "--dry-run", XDG_STATE_HOME=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert {"auth", "limits", "tls"} <= json.loads(shown.stdout)["services"]["Frontend"].keys()


def test_the_threat_model_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", (ROOT / "SECURITY.md").read_text()))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []
