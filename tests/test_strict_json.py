# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest

from dynamo_epd.errors import InvalidJson
from dynamo_epd.http.strict_json import LARGE_BODY, MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, parse_json, parsed

REFUSED = {
    "10^5 arrays deep": b"[" * 100_000,
    "10^5 objects deep": b'{"a":' * 100_000,
    "deep and closed": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "one too deep": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "same key twice": b'{"a": 1, "a": 2}',
    "same key twice, one escaped": b'{"a": 1, "\\u0061": 2}',
    "same key twice, further in": b'{"m": [{"role": "user", "role": "system"}]}',
    "NUL, escaped": b'{"a": "x\\u0000"}',
    "NUL in a key": b'{"a\\u0000": 1}',
    "NUL, raw": b'{"a": "\x00"}',
    "NUL after the end": b'{"a": 1}\x00',
    "lone high surrogate": b'{"a": "\\ud800"}',
    "lone low surrogate": b'{"a": "\\udc00 x"}',
    "surrogates in the wrong order": b'{"a": "\\udc00\\ud800"}',
    "surrogate in a key": b'{"\\ud800": 1}',
    "surrogate as UTF-8": b'{"a": "\xed\xa0\x80"}',
    "bad UTF-8": b'{"a": "\xff"}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "-Infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "-1e999": b'{"a": -1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "empty": b"",
    "white space": b" \n",
    "array": b"[]",
    "string": b'"a"',
    "null": b"null",
    "two values": b"{}{}",
    "trailing comma": b'{"a": 1,}',
    "comment": b'{"a": 1 /* one */}',
    "single quotes": b"{'a': 1}",
    "unclosed string": b'{"a": "b',
    "string that ends in an escape": b'{"a": "b\\"',
    "raw newline in a string": b'{"a": "b\n"}',
    "too many arrays": b'{"a": [' + b"[]," * MAX_CONTAINERS + b"0]}",
    "too many numbers": b'{"a": [' + b"0," * (MAX_VALUES + 1) + b"0]}",
    "too many strings": b'{"a": [' + b'"",' * MAX_VALUES + b"0]}",
    "brackets that do not match": b'{"a": [}]',
    "more closed than opened": b"]" * 10,
    "closed before it is opened": b'{"a": 1}}{',
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_it_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidJson) as caught:
        parse_json(raw)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"
    assert len(caught.value.message) < 100


@pytest.mark.parametrize("bracket", [b"]", b"}"])
def test_closing_brackets_are_counted_before_they_are_looked_at(bracket: bytes) -> None:
    with pytest.raises(InvalidJson, match=f"more than {MAX_CONTAINERS} objects and arrays"):
        parse_json(b'{"prompt": ' + bracket * (MAX_CONTAINERS + 1))


TAKEN = {
    "brackets inside a string": json.dumps({"a": "[{" * 300_000}).encode(),
    "an escaped quotation mark": b'{"a": "x\\"[[[y", "b": "\\\\"}',
    "an escaped backslash before u0000": b'{"a": "\\\\u0000"}',
    "a surrogate pair": b'{"a": "\\ud83d\\ude00"}',
    "as deep as allowed": b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
    "other alphabets": '{"ключ": "значение \U0001f600"}'.encode(),
    "numbers": b'{"a": [1, -1, 0.5, 1e10, 1e-400, -0]}',
    "the same key in two objects": b'{"a": {"k": 1}, "b": {"k": 2}}',
}


@pytest.mark.parametrize("raw", TAKEN.values(), ids=TAKEN)
def test_it_is_taken_and_means_what_json_says(raw: bytes) -> None:
    assert parse_json(raw) == json.loads(raw)


def test_a_large_picture_inside_passes_whole() -> None:
    url = "data:image/png;base64," + "QUJD" * 4_000_000
    assert parse_json(json.dumps({"url": url}).encode())["url"] == url


def test_any_text_comes_through() -> None:
    noise = random.Random(3)
    for _ in range(300):
        text = "".join(noise.choice('\\"[]{},:u0aé\n\u2028😀') for _ in range(noise.randrange(40)))
        for ascii_only in (True, False):
            raw = json.dumps({"a": [text, {text: text}]}, ensure_ascii=ascii_only).encode()
            assert parse_json(raw) == {"a": [text, {text: text}]}


@pytest.mark.parametrize("size", [10, LARGE_BODY + 1])
def test_a_large_body_is_parsed_and_checked_beside_the_loop(size: int) -> None:
    threads = []

    def check(body: dict[str, Any]) -> int:
        threads.append(threading.current_thread())
        return len(body["text"])

    assert asyncio.run(parsed(json.dumps({"text": "x" * size}).encode(), check)) == size
    assert (threads[0] is threading.current_thread()) == (size < LARGE_BODY)


def test_the_loop_goes_on_while_a_large_body_is_refused() -> None:
    async def both() -> None:
        reading = asyncio.create_task(parsed(b'{"a": ' + b"]" * LARGE_BODY, lambda body: body))
        await asyncio.sleep(0)
        assert not reading.done()
        with pytest.raises(InvalidJson):
            await reading

    asyncio.run(both())
