# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md about what a picture's address may be, under the rules as they ship. Nothing is dialled."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hardening.edge import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    EVERY,
    HOSTS,
    IMAGES,
    JOBS,
    MARK,
    VALIDATIONS,
    Door,
    Entry,
    chat_with,
    refused,
)
from tests.questions import data_url, picture, user

pytestmark = pytest.mark.usefixtures("unharmed")

FIELDS = ("image_url", "image", "images", "url", "callback_url", "webhook")
"""That others have for an address, and no body of ours."""


@pytest.mark.usefixtures("neighbour")
class TestAddresses:
    @pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
    @pytest.mark.parametrize("form", ["http://{host}/x.png", "http://{host}:{port}/x.png", "https://{host}/x.png"])
    def test_an_address_of_the_inside_is_refused(self, door: Door, host: str, form: str) -> None:
        url = form.format(host=host, port=door.canary.port)
        refused(door.post(CHAT, chat_with(url)), 400, "url_not_allowed")

    @pytest.mark.parametrize(
        "messages",
        [
            lambda url: [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}],
            lambda url: [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": url}}]}, user("?")],
            lambda url: [user("?"), {"role": "assistant", "content": [part(url)]}, user("?")],
            lambda url: [user("?", data_url(picture(1)), url)],
            lambda url: [user("?", url, data_url(picture(1)))],
            lambda url: [user("?", data_url(picture(1))), {"role": "assistant", "content": "A star."}, user("?", url)],
        ],
        ids=["as plain text", "of the system", "of the assistant", "behind a good one", "before a good one", "later"],
    )
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_it_is_refused_wherever_a_picture_may_be(self, door: Door, messages: Any, stream: bool) -> None:
        url = f"http://127.0.0.1:{door.canary.port}/x.png"
        refused(door.post(CHAT, CHAT.with_(messages=messages(url), stream=stream)), 400, "url_not_allowed")


@pytest.mark.usefixtures("neighbour")
class TestFields:
    @pytest.mark.parametrize("entry", EVERY, ids=lambda entry: entry.name)
    @pytest.mark.parametrize("field", FIELDS)
    def test_no_other_field_takes_an_address(self, door: Door, entry: Entry, field: str) -> None:
        url = f"http://127.0.0.1:{door.canary.port}/x.png"
        refused(door.post(entry, entry.with_(**{field: url})), 400, "unsupported_parameter", field)

    @pytest.mark.parametrize(
        ("entry", "field"),
        [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input"), (IMAGES, "prompt"), (JOBS, "prompt"), (VALIDATIONS, "prompt")],
        ids=["completions", "embeddings", "images", "jobs", "validations"],
    )
    def test_an_address_in_a_text_is_text(self, door: Door, entry: Entry, field: str) -> None:
        url = f"http://127.0.0.1:{door.canary.port}/x.png"
        assert door.post(entry, entry.with_(**{field: url})).status in (200, 202)


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


URLS = {
    "file": "file:///etc/passwd",
    "file with host": "file://localhost/etc/passwd",
    "file in capitals": "FILE:///etc/passwd",
    "bare path": f"/etc/{MARK}",
    "relative path": f"../../{MARK}.png",
    "path of Windows": f"C:\\{MARK}.png",
    "share of Windows": f"\\\\127.0.0.1\\{MARK}",
    "no scheme": "//127.0.0.1:{port}/x.png",
    "empty": "http://",
    "nothing": " ",
    "ftp": "ftp://127.0.0.1:{port}/x.png",
    "gopher": "gopher://127.0.0.1:{port}/_x",
    "dict": "dict://127.0.0.1:{port}/x",
    "ldap": "ldap://127.0.0.1:{port}/x",
    "s3": f"s3://{MARK}/x.png",
    "jar": "jar:http://127.0.0.1:{port}/x!/y.png",
    "javascript": "javascript:alert(1)",
    "blob": "blob:http://127.0.0.1:{port}/x",
    "user name": f"http://{MARK}@127.0.0.1:{{port}}/x.png",
    "user name and password": f"http://a:{MARK}@example.com/x.png",
    "a name before another": "http://example.com@127.0.0.1:{port}/x.png",
    "encoded at sign": "http://example.com%40127.0.0.1:{port}/x.png",
    "CR LF in the path": "http://example.com/x\r\nHost: 127.0.0.1",
    "LF in the host": "http://exam\nple.com/x.png",
    "tab in the scheme": "ht\ttp://127.0.0.1:{port}/x.png",
    "space before": " http://127.0.0.1:{port}/x.png",
    "space in the host": "http://127.0.0.1 .example.com/x.png",
    "DEL": "http://example.com/\x7f.png",
    "backslash": "http://example.com\\@127.0.0.1:{port}/x.png",
    "backslashes for slashes": "http:\\\\127.0.0.1:{port}\\x.png",
    "port 22": "http://example.com:22/x.png",
    "port 4222": "http://example.com:4222/x.png",
    "port 8080": "https://example.com:8080/x.png",
    "port 0": "http://example.com:0/x.png",
    "port 65536": "http://example.com:65536/x.png",
    "negative port": "http://example.com:-1/x.png",
    "port in words": f"http://example.com:{MARK}/x.png",
    "port in full-width digits": "http://example.com:\uff18\uff10/x.png",
    "open bracket": "http://[::1/x.png",
    "bracket and more": "http://[::1]x/x.png",
    "IPv6 without brackets": "http://::1/x.png",
    "label too long": f"http://{'a' * 64}.com/x.png",
    "name too long": f"http://{'a.' * 130}com/x.png",
    "empty label": "http://example..com/x.png",
    "soft hyphen": "http://local\u00adhost:{port}/x.png",
    "zero-width joiner": "http://local\u200dhost:{port}/x.png",
    "too long": "https://example.com/" + "x" * 8192,
}


@pytest.mark.usefixtures("neighbour")
class TestSchemes:
    @pytest.mark.parametrize("url", URLS.values(), ids=URLS)
    def test_what_is_no_allowed_address_is_refused(self, door: Door, url: str) -> None:
        url = url.replace("{port}", str(door.canary.port))
        refused(door.post(CHAT, chat_with(url)), 400, "url_not_allowed")

    def test_the_empty_text_is_no_address(self, door: Door) -> None:
        refused(door.post(CHAT, chat_with("")), 400, "invalid_request", "messages[0].content[0].image_url.url")

    @pytest.mark.parametrize(
        "value", [None, 7, True, [], ["http://x"], {}, {"url": None}, {"url": {"url": "x"}}], ids=str
    )
    def test_what_is_no_text_is_no_address(self, door: Door, value: Any) -> None:
        content = [{"type": "image_url", "image_url": value}]
        refused(door.post(CHAT, CHAT.with_(messages=[{"role": "user", "content": content}])), 400, "invalid_request")
