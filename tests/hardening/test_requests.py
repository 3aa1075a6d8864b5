# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md about the request itself: its JSON, its size, its pace, its head; and about ids and models."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from dynamo_epd.job import JobState
from dynamo_epd.jobs import JobsConfig
from dynamo_epd.store import Store, StoreConfig, new_id
from tests.hardening.edge import (
    EVERY,
    GETS,
    IMAGES,
    JOBS,
    MARK,
    VALIDATIONS,
    Door,
    Entry,
    Reply,
    answered_or_refused,
    job_ended,
    refused,
    send,
    send_raw,
)
from tests.hardening.test_messages import connected
from tests.questions import picture
from tests.serving import eventually

pytestmark = pytest.mark.usefixtures("unharmed")

LIMIT = 64 * 1024 * 1024
"""`limits.body-bytes` as it ships."""


def name_of(entry: Entry) -> str:
    return entry.name


JSONS: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n",
    "half an object": b'{"model": "tiny',
    "two objects": b"{}{}",
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"7",
    "null": b"null",
    "a comment": b'{"a": 1} // x',
    "a comma at the end": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "no quotes": b"{a: 1}",
    "lists 100 000 deep": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "lists opened 100 000 times": b'{"a": ' + b"[" * 10**5,
    "objects 100 000 deep": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "brackets of both kinds": b'{"a": ' + b'[{"a":' * 10**5,
    "a million closing brackets": b'{"a": ' + b"]" * 10**6,
    "a million closing braces": b'{"a": ' + b"}" * 10**6,
    "closed before they are opened": b'{"a": 1' + b"}" * 1000 + b"{" * 1000,
    "a million empty lists": b'{"a": [' + b",".join([b"[]"] * 10**6) + b"]}",
    "duplicate keys": b'{"model": "a", "model": "b"}',
    "duplicate keys below": b'{"messages": [{"role": "user", "role": "system"}]}',
    "duplicate keys by escapes": b'{"model": "a", "m\\u006fdel": "b"}',
    "NUL in a text": b'{"model": "a\\u0000b"}',
    "NUL in a key": b'{"a\\u0000b": 1}',
    "NUL raw": b'{"model": "a\0b"}',
    "a control character": b'{"model": "a\x01b"}',
    "a lone surrogate": b'{"model": "\\ud800"}',
    "a lone low surrogate": b'{"model": "\\udc00x"}',
    "surrogates the wrong way round": b'{"model": "\\udc00\\ud800"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "bad UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\xaf"}',
    "half a character": b'{"model": "\xe2\x82"}',
    "latin-1": '{"model": "\u00e9"}'.encode("latin-1"),
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "UTF-32": '{"model": "a"}'.encode("utf-32-le"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "an unknown escape": b'{"model": "\\x41"}',
    "half an escape": b'{"model": "\\u12"}',
    "hex": b'{"n": 0x10}',
    "a plus": b'{"n": +1}',
    "a zero before": b'{"n": 01}',
    "a number of 100 000 digits": b'{"n": ' + b"9" * 10**5 + b"}",
    "an exponent": b'{"n": 1e400}',
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "MessagePack": b"\x81\xa5model\xa1a",
    "XML": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
    "a form": b"model=a&prompt=b",
    "several parts": b'--x\r\nContent-Disposition: form-data; name="a"; filename="../x"\r\n\r\n\x89PNG\r\n--x--\r\n',
    "quotation marks": b'{"a": "' + b'\\"' * 10**6 + b'"}',
}


@pytest.mark.usefixtures("neighbour")
class TestJson:
    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize("raw", JSONS.values(), ids=JSONS)
    def test_what_is_no_json_of_ours_is_refused(self, door: Door, entry: Entry, raw: bytes) -> None:
        refused(door.post(entry, raw), 400, "invalid_json")

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    def test_48_mb_of_closing_brackets_hold_nobody_up(self, door: Door, entry: Entry) -> None:
        """Two at once: a frontend whose loop stood still for 5 s would be killed, and its process another one."""
        raw = b'{"a": ' + b"]" * (48 << 20)
        with ThreadPoolExecutor(2) as pool:
            for reply in pool.map(lambda _: door.post(entry, raw), range(2)):
                refused(reply, 400, "invalid_json")

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "x"]
    )
    def test_the_declared_type_changes_nothing(self, door: Door, entry: Entry, kind: str) -> None:
        """A body is read as JSON, whatever it says it is; so no parser of forms ever runs."""
        refused(send(door.graph, "POST", entry.path, b"a=b", [("content-type", kind)]), 400, "invalid_json")

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
    def test_a_packed_body_is_not_unpacked(self, door: Door, entry: Entry, encoding: str) -> None:
        """So a small one cannot become a large one: its bytes are read as they are."""
        import gzip

        raw = gzip.compress(json.dumps(entry.body).encode())
        refused(send(door.graph, "POST", entry.path, raw, [("content-encoding", encoding)]), 400, "invalid_json")


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *lines)).encode("latin-1") + b"\r\n\r\n"


SLOW: dict[str, tuple[tuple[bytes, ...], float]] = {
    "a body that never comes": ((head("/v1/chat/completions", "Content-Length: 1000"),), 0.0),
    "a body that stops": ((head("/v1/validations", "Content-Length: 1000") + b'{"prompt"',), 0.0),
    "chunks that stop": ((head("/v1/embeddings", "Transfer-Encoding: chunked") + b'5\r\n{"inp',), 0.0),
    "a head that stops": ((b"POST /v1/images/jobs HTTP/1.1\r\nHost: x\r\n",), 0.0),
    "a request line that stops": ((b"POST /v1/chat",), 0.0),
    "nothing at all": ((b"",), 0.0),
    "a head a byte a second": (tuple(bytes([byte]) for byte in b"GET /live HTTP"), 1.0),
}


@pytest.fixture(scope="module", autouse=True)
def slow(door: Door) -> Iterator[dict[str, Future[Reply]]]:
    """Begun with the first test of this module, or each would take its whole patience alone."""
    with ThreadPoolExecutor(len(SLOW)) as pool:

        def say(pieces: tuple[bytes, ...], pause: float) -> Reply:
            return send_raw(door.graph, *pieces, pause=pause)

        yield {name: pool.submit(say, *one) for name, one in SLOW.items()}


@pytest.mark.usefixtures("neighbour")
class TestSizes:
    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize("length", [LIMIT + 1, 10**12, 10**17])
    def test_a_declared_length_over_the_limit_is_413_before_a_byte_of_it(
        self, door: Door, entry: Entry, length: int
    ) -> None:
        refused(send_raw(door.graph, head(entry.path, f"Content-Length: {length}")), 413, "payload_too_large")

    @pytest.mark.parametrize("entry", EVERY[:2], ids=name_of)
    def test_a_chunked_body_over_the_limit_is_413(self, door: Door, entry: Entry) -> None:
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        begun = head(entry.path, "Transfer-Encoding: chunked")
        refused(send_raw(door.graph, begun, *[chunk] * 66, b"0\r\n\r\n"), 413, "payload_too_large")

    @pytest.mark.parametrize("path", ["/v1/models", "/v1/images", "/live", "/nowhere", "/ui/x"])
    def test_nor_do_other_routes_take_one(self, door: Door, path: str) -> None:
        for method in ("GET", "POST"):
            refused(send_raw(door.graph, head(path, f"Content-Length: {10**12}", method=method)), 413)

    @pytest.mark.parametrize(
        "line",
        [f"Content-Length: {10**99}", "Content-Length: -1", "Content-Length: x", "Content-Length: 1, 2",
         "Content-Length: 0x10",
         "Content-Length: +5", "Transfer-Encoding: gzip, chunked, x", "Transfer-Encoding: x"],
    )  # fmt: skip
    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    def test_a_length_that_is_none_is_refused(self, door: Door, entry: Entry, line: str) -> None:
        refused(send_raw(door.graph, head(entry.path, line) + b"{}"), (400, 413))

    def test_a_length_and_chunks_together_are_refused(self, door: Door) -> None:
        """What one proxy takes for a body another takes for the next request."""
        lines = ("Content-Length: 4", "Transfer-Encoding: chunked")
        raw = head("/v1/embeddings", *lines) + b"0\r\n\r\nGET /live HTTP/1.1\r\n\r\n"
        reply = send_raw(door.graph, raw)
        refused(reply, 400)
        assert reply.headers["connection"] == "close"


HEADERS: dict[str, list[str]] = {
    "10 000 headers": [f"X-{index}: y" for index in range(10_000)],
    "101 headers": [f"X-{index}: y" for index in range(101)],
    "the same header 500 times": ["Cookie: a=b"] * 500,
    "a header of 20 KB": ["X-Big: " + "y" * 20_000],
    "a header of 1 MB": ["X-Big: " + "y" * (1 << 20)],
    "a name of 20 KB": ["X" * 20_000 + ": y"],
    "a key of 100 KB": [f"Authorization: Bearer {'x' * 100_000}"],
}

NO_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no path": b"GET\r\n\r\n",
    "HTTP 9.9": b"GET / HTTP/9.9\r\n\r\n",
    "HTTP 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "zeros": bytes(100) + b"\r\n\r\n",
    "no colon": b"GET /live HTTP/1.1\r\nX y\r\n\r\n",
    "NUL in a header": b"GET /live HTTP/1.1\r\nX: a\0b\r\n\r\n",
    "a chunk of no size": head("/v1/chat/completions", "Transfer-Encoding: chunked") + b"zz\r\n",
    "a chunk of no size behind a good one": head("/v1/embeddings", "Transfer-Encoding: chunked") + b"1\r\n{\r\nzz\r\n",
    "pickle": b"\x80\x04cos\nsystem\n\r\n\r\n",
}


@pytest.mark.usefixtures("neighbour")
class TestHeads:
    @pytest.mark.parametrize("path", [*(entry.path for entry in EVERY), "/text-to-image?text=a"])
    @pytest.mark.parametrize("lines", HEADERS.values(), ids=HEADERS)
    def test_too_much_of_a_head_is_431(self, door: Door, path: str, lines: list[str]) -> None:
        refused(send_raw(door.graph, head(path, "Content-Length: 0", *lines)), 431, "headers_too_large")

    @pytest.mark.parametrize("path", GETS)
    @pytest.mark.parametrize("lines", HEADERS.values(), ids=HEADERS)
    def test_also_of_a_get(self, door: Door, path: str, lines: list[str]) -> None:
        refused(send_raw(door.graph, head(path, *lines, method="GET")), 431, "headers_too_large")

    @pytest.mark.parametrize("raw", NO_HTTP.values(), ids=NO_HTTP)
    def test_what_is_no_http_is_refused(self, door: Door, raw: bytes) -> None:
        refused(send_raw(door.graph, raw), 400)

    @pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "DELETE", "get"])
    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    def test_another_method_is_405(self, door: Door, entry: Entry, method: str) -> None:
        refused(send_raw(door.graph, head(entry.path, "Connection: close", method=method)), (400, 404, 405))

    @pytest.mark.parametrize("value", ["../x", "a b", "\u00e9", "x" * 1000, "<script>", "a\tb"])
    def test_an_id_that_is_no_harmless_one_is_replaced(self, door: Door, value: str) -> None:
        reply = send_raw(door.graph, head("/live", f"x-request-id: {value}", "Connection: close", method="GET"))
        assert reply.status == 200 and reply.headers["x-request-id"] != value

    @pytest.mark.parametrize(
        "path", ["/" + "x" * 60_000, "/v1/images/" + "a" * 60_000, "/v1/models?x=" + "a" * 60_000, "/" + "%41" * 20_000]
    )
    def test_a_path_of_60_kb_is_refused(self, door: Door, path: str) -> None:
        reply = send_raw(door.graph, head(path, "Connection: close", method="GET"))
        if reply.status != 200:
            refused(reply, (400, 404, 414, 431))


@pytest.mark.usefixtures("neighbour")
class TestPace:
    """10 s for a head and between two pieces of a body: as they ship. The 30 s of a whole body are in `test_limits`."""

    @pytest.mark.parametrize("name", SLOW)
    def test_a_client_that_is_too_slow_is_408(self, slow: dict[str, Future[Reply]], name: str) -> None:
        refused(slow[name].result(), 408, "request_timeout")


IDS = {
    "guessed picture": f"img-{uuid.UUID(int=7).hex}",
    "guessed job": f"job-{uuid.UUID(int=7).hex}",
    "hex alone": uuid.UUID(int=7).hex,
    "capitals": f"JOB-{uuid.UUID(int=7).hex.upper()}",
    "dots": "..",
    "encoded dots": "%2e%2e",
    "dots twice encoded": "%252e%252e%252f",
    "a star": "*",
    "a dollar": "$KV",
    "a subject": "a.b.>",
    "a query of SQL": "1'%20OR%20'1'='1",
    "NUL": "%00",
    "a line break": "a%0d%0aSet-Cookie:%20x",
    "half a surrogate": "%ed%a0%80",
    "no UTF-8": "%ff",
    "a mark": MARK,
    "an asterisk of a glob": "[a-z]*",
    "long": "a" * 5000,
    "minus": "-1",
    "a name of a file": "lock",
    "another kind's id": "val-0",
}
CLIMBING = {
    "up": "../../../../etc/passwd",
    "up, encoded": "..%2f..%2fetc%2fpasswd",
    "up, half encoded": "%2e%2e/%2e%2e/about",
    "up, of Windows": "..%5c..%5cabout",
    "absolute": "/etc/passwd",
    "absolute, encoded": "%2fetc%2fpasswd",
    "below": "a/b",
    "below, encoded": "a%2fb",
}
WAYS = [
    ("GET", "/v1/images/"), ("HEAD", "/v1/images/"), ("DELETE", "/v1/images/"), ("GET", "/v1/images/jobs/"),
    ("GET", "/results/"),
]  # fmt: skip


def way_of(value: Any) -> str:
    return str(value)


@pytest.mark.usefixtures("neighbour")
class TestIds:
    @pytest.mark.parametrize(("method", "place"), WAYS, ids=way_of)
    @pytest.mark.parametrize("id", IDS.values(), ids=IDS)
    def test_what_is_not_there_is_404_and_always_the_same_one(
        self, door: Door, method: str, place: str, id: str
    ) -> None:
        reply = send(door.graph, method, place + id, headers=())
        usual = send(door.graph, method, place + IDS["guessed picture"], headers=())
        assert reply.status == usual.status == 404
        assert reply.body == usual.body
        if method != "HEAD":
            refused(reply, 404, "not_found")

    @pytest.mark.parametrize(("method", "place"), WAYS, ids=way_of)
    @pytest.mark.parametrize("id", CLIMBING.values(), ids=CLIMBING)
    def test_no_id_climbs_out(self, door: Door, method: str, place: str, id: str) -> None:
        reply = send(door.graph, method, place + id, headers=())
        assert reply.status in (404, 405)
        if method != "HEAD":
            refused(reply, (404, 405))

    @pytest.mark.parametrize("value", ["0", "-1", "101", "10" * 50, "x", "", "1.5", "1e2", "%00", MARK])
    def test_a_list_of_no_length_is_refused(self, door: Door, value: str) -> None:
        refused(send(door.graph, "GET", f"/v1/images?limit={value}", headers=()), 400, None, "limit")

    @pytest.mark.parametrize("key", ["", " ", "x" * 256, "a b", "\u00e9", "a\tb"])
    def test_an_idempotency_key_that_is_none_is_refused(self, door: Door, key: str) -> None:
        lines = (f"Idempotency-Key: {key}", "Content-Length: 2", "Connection: close")
        refused(send_raw(door.graph, head(JOBS.path, *lines) + b"{}"), 400)

    @pytest.mark.parametrize("text", ["", "?text=", "?text=%00", "?text=%20%20", "?text=" + "x" * 33_000, "?prompt=x"])
    def test_a_text_to_draw_that_is_none_is_refused(self, door: Door, text: str) -> None:
        refused(send(door.graph, "POST", f"/text-to-image{text}", headers=()), (400, 414))

    def test_a_job_that_the_model_cannot_do_is_refused_at_once(self, door: Door) -> None:
        """What only the model's tokenizer can tell."""
        refused(door.post(JOBS, JOBS.with_(prompt="star " * 6000)), 400, "text_too_long")


PICTURE_SECONDS, KEPT_SECONDS = 2.0, 60.0
"""How long pictures of this test are kept; the graph keeps its own for a day."""


@pytest.mark.usefixtures("neighbour")
class TestExpired:
    def test_a_picture_whose_time_is_over_is_410(self, door: Door) -> None:
        """Put into the graph's own store by another process, as an image worker does."""
        store = Store(StoreConfig(url=str(door.graph.state / "dynamo" / "store")))
        *ids, kept = [new_id() for _ in range(3)]

        async def put() -> None:
            for id in ids:
                await store.put("", id, picture(1), "image/png", {}, ttl=PICTURE_SECONDS)
            await store.put("", kept, picture(1), "image/png", {}, ttl=KEPT_SECONDS)

        asyncio.run(put())
        assert send(door.graph, "GET", f"/v1/images/{kept}", headers=()).status == 200
        last = f"/v1/images/{ids[-1]}"
        eventually(lambda: send(door.graph, "GET", last, headers=()).status != 200, "its time is over")
        for method in ("GET", "HEAD", "DELETE"):
            replies = [send(door.graph, method, f"/v1/images/{id}", headers=()) for id in ids]
            assert [reply.status for reply in replies] == [410, 410]
            assert len({reply.body for reply in replies}) == 1
            if method != "HEAD":
                refused(replies[0], 410, "expired")

    def test_a_job_whose_time_is_over_is_410_and_once_forgotten_the_usual_404(self, door: Door) -> None:
        """The days until then are taken off its end, and then NATS is told to forget it, as it does by itself."""
        accepted = door.post(JOBS, JOBS.body)
        assert accepted.status == 202, accepted.body
        id = json.loads(accepted.body)["id"]
        assert job_ended(door.graph, id)["status"] == "completed"

        async def changed(*, forget: bool) -> None:
            async with await connected(door.graph) as connection:
                states = await connection.jetstream().key_value(JOB_STATES)
                if forget:
                    await states.purge(id)
                    return
                entry = await states.get(id)
                state = msgspec.json.decode(entry.value, type=JobState)
                earlier = msgspec.structs.replace(state, ended=(state.ended or 0.0) - JobsConfig.keep_seconds)
                await states.update(id, msgspec.json.encode(earlier), entry.revision)

        asyncio.run(changed(forget=False))
        for place in JOB_PLACES:
            refused(send(door.graph, "GET", place + id, headers=()), 410, "expired")
        asyncio.run(changed(forget=True))
        for place in JOB_PLACES:
            gone = send(door.graph, "GET", place + id, headers=())
            refused(gone, 404, "not_found")
            assert gone.body == send(door.graph, "GET", place + IDS["guessed job"], headers=()).body


JOB_PLACES = ("/v1/images/jobs/", "/results/")
JOB_STATES = "dynamo_image_jobs"

MODELS = {
    "up": "../x",
    "up twice": "../../models/tiny/llava",
    "a path": "/etc/passwd",
    "a directory of ours": "models/tiny/llava",
    "a name on the hub": f"{MARK}/gpt2",
    "an address": f"https://127.0.0.1/{MARK}",
    "s3": f"s3://{MARK}/x",
    "unknown": MARK,
    "in capitals": "TINY-LLAVA",
    "a space": "tiny-llava ",
    "a mark of a template": "{{ 7 * 7 }}",
    "a right-to-left mark": "\u202etiny",
}


@pytest.mark.usefixtures("neighbour")
class TestModels:
    @pytest.mark.parametrize("entry", EVERY[:6], ids=name_of)
    @pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
    def test_a_model_that_is_not_served_is_404_and_nothing_is_loaded(self, door: Door, entry: Entry, name: str) -> None:
        for more in ({}, {"stream": True}) if entry in (*EVERY[:2], IMAGES, VALIDATIONS) else ({},):
            reply = door.post(entry, entry.with_(model=name, **more))
            refused(reply, 404, "model_not_found", "model")
            assert name.encode() not in reply.body

    @pytest.mark.parametrize(
        "name", ["x", "..", "%2e%2e", f"{MARK}", "tiny-llava", "%00", "a%3ab", "{{7*7}}", "x" * 5000]
    )
    def test_nor_is_one_of_a_path(self, door: Door, name: str) -> None:
        refused(send(door.graph, "POST", f"/v1/models/{name}:predict", {"instances": ["x"]}), 404, "model_not_found")

    @pytest.mark.parametrize("name", ["../x", "..%2fx", "a/b", "%2fetc%2fpasswd", ""])
    def test_nor_does_a_path_lead_elsewhere(self, door: Door, name: str) -> None:
        refused(send(door.graph, "POST", f"/v1/models/{name}:predict", {"instances": ["x"]}), 404)

    @pytest.mark.parametrize("name", ["", "x" * 100_000, 7, [], {}, True], ids=lambda name: str(name)[:8] or "empty")
    @pytest.mark.parametrize("entry", EVERY[:6], ids=name_of)
    def test_what_is_no_name_is_refused(self, door: Door, entry: Entry, name: Any) -> None:
        refused(door.post(entry, entry.with_(model=name)), 400, None, "model")

    def test_without_a_name_the_one_that_is_served_answers(self, door: Door) -> None:
        for entry in EVERY[:6]:
            answered_or_refused(door.post(entry, {key: one for key, one in entry.body.items() if key != "model"}))
