# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64

import pytest

from dynamo_epd.errors import MediaError, PayloadTooLarge
from dynamo_epd.images.data_url import parse_data_url

DATA = bytes(range(256)) + b"\xfb\xff"
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/png;name=a.png;charset=utf-8;base64,{TEXT}",
        f"data:text/html;base64,{TEXT}",
        f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
    ],
)
def test_the_bytes_come_out(url: str) -> None:
    assert parse_data_url(url, 1000) == DATA


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        f"data:image/png;base64;{TEXT}",
        "data:" + "x" * 5000 + f";base64,{TEXT}",
        "data:image/png;base64,",
        "data:image/png,",
        "data:",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,AAAA====",
        "data:image/png;base64,AA\nAA",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AA%00AA",
        "data:image/png;base64,\u0410\u0410\u0410\u0410",
        "data:image/png;base64,!!!!",
        "data:image/png,\u0410",
        "https://a.example/",
    ],
)
def test_a_malformed_one_is_a_media_error(url: str) -> None:
    with pytest.raises(MediaError) as caught:
        parse_data_url(url, 1000)
    assert caught.value.status == 400 and len(caught.value.message) < 100


@pytest.mark.parametrize("size", [1, 2, 3, 300, 301, 302])
def test_the_bound_counts_decoded_bytes(size: int) -> None:
    url = "data:;base64," + base64.b64encode(bytes(size)).decode()
    assert parse_data_url(url, size) == bytes(size)
    if size > 1:
        with pytest.raises(PayloadTooLarge) as caught:
            parse_data_url(url, size - 1)
        assert caught.value.status == 413


def test_too_much_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(PayloadTooLarge):
        parse_data_url("data:;base64," + "!" * 2000, 1000)
    with pytest.raises(PayloadTooLarge):
        parse_data_url("data:," + "%41" * 1_000_000, 10_000_000)
    with pytest.raises(PayloadTooLarge):
        parse_data_url("data:," + "a" * 1001, 1000)


def test_a_photograph_of_12_megabytes() -> None:
    photograph = DATA * 50_000
    assert parse_data_url("data:image/jpeg;base64," + base64.b64encode(photograph).decode(), 1 << 25) == photograph
