# SPDX-License-Identifier: Apache-2.0
"""Files over HTTP: conditions, ranges and headers, as a function and through a real server and client."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as some

from dynamo_epd.http.files import Plan, plan
from dynamo_epd.store import Stored

ETAG = "0123456789abcdef0123456789abcdef"
CREATED = 1_790_000_000.75
FILE = bytes(range(100))


def stored(size: int = 100, created: float = CREATED, ttl: float = 10**10, media_type: str = "image/png") -> Stored:
    return Stored("img-1", media_type, size, ETAG, created, created + ttl)


def asked(size: int = 100, method: str = "GET", **headers: str) -> Plan:
    return plan(stored(size), {name.replace("_", "-"): value for name, value in headers.items()}, method)


def test_the_whole_file_with_its_headers() -> None:
    answer = asked()
    assert (answer.status, answer.start, answer.end, answer.body) == (200, 0, 100, b"")
    assert answer.headers["etag"] == f'"{ETAG}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == "100"
    assert answer.headers["content-disposition"] == 'inline; filename="img-1.png"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["last-modified"] == formatdate(int(CREATED), usegmt=True)
    assert "content-range" not in answer.headers


def test_a_cache_may_keep_it_until_it_expires_and_no_shared_one_may() -> None:
    now = time.time()
    control = plan(stored(created=now - 50, ttl=150), {}).headers["cache-control"]
    words = dict(word.strip().partition("=")[::2] for word in control.split(","))
    assert "private" in words and 90 <= int(words["max-age"]) <= 100
    assert plan(stored(created=now - 50, ttl=10), {}).headers["cache-control"] == "private, max-age=0"


@pytest.mark.parametrize(("kind", "name"), [("image/jpeg", "img-1.jpg"), ("image/webp", "img-1.webp")])
def test_the_name_has_the_formats_ending(kind: str, name: str) -> None:
    assert f'"{name}"' in plan(stored(media_type=kind), {}).headers["content-disposition"]


@pytest.mark.parametrize(
    ("value", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, 100),
        ("bytes=10-19", 10, 20),
        ("bytes=99-", 99, 100),
        ("bytes=90-1000", 90, 100),
        ("bytes=90-" + "9" * 90, 90, 100),
        ("bytes=-1", 99, 100),
        ("bytes=-100", 0, 100),
        ("bytes=-1000", 0, 100),
        ("Bytes=5-6", 5, 7),
        ("bytes= 5-6 ", 5, 7),
    ],
)
def test_a_range(value: str, start: int, end: int) -> None:
    answer = asked(range=value)
    assert (answer.status, answer.start, answer.end) == (206, start, end)
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/100"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["etag"] == f'"{ETAG}"'
    assert answer.headers["content-type"] == "image/png"


@pytest.mark.parametrize("value", ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=" + "9" * 90 + "-"])
def test_a_range_outside_the_file(value: str) -> None:
    answer = asked(range=value)
    assert (answer.status, answer.start, answer.end) == (416, 0, 0)
    assert answer.headers["content-range"] == "bytes */100"
    assert answer.headers["content-type"] == "application/json" and b'"invalid_range"' in answer.body
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "etag" not in answer.headers and "cache-control" not in answer.headers


def test_every_range_lies_outside_an_empty_file() -> None:
    for value in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        assert asked(0, range=value).status == 416
    assert asked(0).status == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=5-4",
        "bytes=1-2,4-5",
        "bytes=0-0,-1",
        "bytes=1--2",
        "bytes=+1-2",
        "bytes=1.0-2",
        "bytes=0x1-2",
        "bytes=\u0661-\u0662",
        "bytes 0-1",
        "items=0-1",
        "bytes=0-1\n",
        "bytes=" + "9" * 5000 + "-",
    ],
)
def test_what_is_not_one_range_is_ignored(value: str) -> None:
    answer = asked(range=value)
    assert (answer.status, answer.start, answer.end) == (200, 0, 100)
    assert "content-range" not in answer.headers


@given(some.text(max_size=40) | some.from_regex(r"bytes=[0-9]{0,3}-[0-9]{0,3}", fullmatch=True), some.integers(0, 200))
def test_no_range_reaches_outside_the_file(value: str, size: int) -> None:
    answer = asked(size, range=value)
    assert 0 <= answer.start <= answer.end <= size
    assert answer.status in (200, 206, 416)
    assert answer.status != 206 or answer.start < answer.end
    if answer.status != 416:
        assert answer.headers["content-length"] == str(answer.end - answer.start)


def test_a_head_has_no_range() -> None:
    answer = asked(method="HEAD", range="bytes=0-9")
    assert answer.status == 200 and answer.headers["content-length"] == "100"


@pytest.mark.parametrize(
    "tags",
    [f'"{ETAG}"', f'W/"{ETAG}"', "*", " * ", f'"a", "{ETAG}"', f'W/"a,b",W/"{ETAG}"', f'"a b" , "{ETAG}"'],
)
def test_a_client_that_has_it_gets_nothing(tags: str) -> None:
    answer = asked(if_none_match=tags, range="bytes=0-9")
    assert (answer.status, answer.start, answer.end, answer.body) == (304, 0, 0, b"")
    assert answer.headers["etag"] == f'"{ETAG}"' and "cache-control" in answer.headers
    assert "content-length" not in answer.headers and "content-type" not in answer.headers


@pytest.mark.parametrize("tags", ["", ETAG, '"other"', f'"{ETAG[:-1]}"', f'"{ETAG}x"', '"*"', f"'{ETAG}'"])
def test_a_client_that_has_another_gets_it(tags: str) -> None:
    answer = asked(if_none_match=tags, if_modified_since=formatdate(CREATED + 100, usegmt=True))
    assert answer.status == 200, "with entity tags a date does not count"


@pytest.mark.parametrize(
    ("date", "status"),
    [
        (formatdate(CREATED, usegmt=True), 304),
        (formatdate(CREATED + 3600, usegmt=True), 304),
        (formatdate(CREATED - 1, usegmt=True), 200),
        ("yesterday", 200),
        ("", 200),
        ("Mon, 99 Foo 2026 99:99:99 GMT", 200),
        ("x" * 10_000, 200),
    ],
)
def test_if_modified_since(date: str, status: int) -> None:
    assert asked(if_modified_since=date).status == status


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        (f'"{ETAG}"', 206),
        (formatdate(CREATED, usegmt=True), 206),
        (f'W/"{ETAG}"', 200),
        ('"other"', 200),
        (formatdate(CREATED + 1, usegmt=True), 200),
        (formatdate(CREATED - 1, usegmt=True), 200),
        ("", 200),
        (ETAG, 200),
    ],
)
def test_if_range(condition: str, status: int) -> None:
    answer = asked(range="bytes=10-19", if_range=condition)
    assert (answer.status, answer.end - answer.start) == (status, 10 if status == 206 else 100)


def test_if_range_turns_an_impossible_range_into_the_whole_file() -> None:
    assert asked(range="bytes=500-", if_range='"other"').status == 200
    assert asked(range="bytes=500-", if_range=f'"{ETAG}"').status == 416


def test_over_http() -> None:
    app = FastAPI()

    @app.api_route("/file", methods=["GET", "HEAD"])
    async def file(request: Request) -> Response:
        answer = plan(stored(), request.headers, request.method)
        return Response(answer.body or FILE[answer.start : answer.end], answer.status, answer.headers)

    client = TestClient(app)
    whole = client.get("/file")
    assert whole.content == FILE and whole.headers["content-type"] == "image/png"
    part = client.get("/file", headers={"Range": "bytes=-7", "If-Range": whole.headers["ETag"]})
    assert part.status_code == 206 and part.content == FILE[-7:]
    assert part.headers["content-range"] == "bytes 93-99/100"
    assert client.get("/file", headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert client.get("/file", headers={"If-Modified-Since": whole.headers["last-modified"]}).status_code == 304
    refused = client.get("/file", headers={"Range": "bytes=100-"})
    assert refused.status_code == 416 and refused.json()["error"]["code"] == "invalid_range"
    assert client.head("/file").headers["content-length"] == "100"
