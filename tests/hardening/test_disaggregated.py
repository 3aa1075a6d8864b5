# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md that reach the chat and completions of the disaggregated graph: no image models, and a processor
of its own. The cases are those of content validation; of those whose refusal takes long, a sample. Which addresses it
may dial as it ships is in `tests/acceptance/test_shipped_addresses.py`: here it may fetch from this machine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hardening.edge import CHAT, TEXT, Door, Entry, Peaks, answered_or_refused, chat_with, refused
from tests.hardening.files import BOMBS, BROKEN, FOREIGN, ODD, Make
from tests.hardening.test_fields import INSIDE, NUMBERS, SCHEMA_SECONDS, SCHEMAS, id_of, name_of, with_schema
from tests.hardening.test_pictures import BOMB_BYTES, reply_to
from tests.hardening.test_requests import JSONS, MODELS
from tests.hardening.test_urls import FIELDS, URLS

pytestmark = pytest.mark.usefixtures("open_unharmed")

EVERY_FOURTH = 4
OPEN_HERE = {"port 22", "port 4222", "port 8080", "soft hyphen"}
"""Addresses that `media.allow-private`, which this graph has, leaves to the resolver."""
HERE = [name for name in URLS if name not in OPEN_HERE]
SAMPLE = [name for name, schema in SCHEMAS.items() if schema is not None][::EVERY_FOURTH]


@pytest.mark.usefixtures("open_neighbour")
class TestText:
    @pytest.mark.parametrize("entry", TEXT, ids=name_of)
    @pytest.mark.parametrize("raw", JSONS.values(), ids=JSONS)
    def test_what_is_no_json_of_ours_is_refused(self, open_door: Door, entry: Entry, raw: bytes) -> None:
        refused(open_door.post(entry, raw), 400, "invalid_json")

    @pytest.mark.parametrize("entry", TEXT, ids=name_of)
    @pytest.mark.parametrize("field", INSIDE)
    def test_a_public_body_may_not_set_a_field_of_the_inside(self, open_door: Door, entry: Entry, field: str) -> None:
        value = INSIDE[field]
        if isinstance(value, dict) and "remote_port" in value:
            value = value | {"remote_port": open_door.canary.port}
        refused(open_door.post(entry, entry.with_(**{field: value})), 400, "unsupported_parameter", field)

    @pytest.mark.parametrize(("entry", "field", "value"), [one for one in NUMBERS if one[0] in TEXT], ids=id_of)
    def test_what_is_out_of_bounds_is_refused(self, open_door: Door, entry: Entry, field: str, value: Any) -> None:
        refused(open_door.post(entry, entry.with_(**{field: value})), 400)

    @pytest.mark.parametrize("entry", TEXT, ids=name_of)
    @pytest.mark.parametrize("name", MODELS.values(), ids=MODELS)
    def test_a_model_that_is_not_served_is_404(self, open_door: Door, entry: Entry, name: str) -> None:
        refused(open_door.post(entry, entry.with_(model=name)), 404, "model_not_found", "model")

    @pytest.mark.parametrize("name", SAMPLE)
    @pytest.mark.parametrize("way", ["response_format", "tools"])
    def test_a_schema_that_would_explode_is_refused(self, open_door: Door, name: str, way: str) -> None:
        reply = open_door.post(CHAT, with_schema(way, SCHEMAS[name]))
        refused(reply, 400)
        assert reply.seconds < SCHEMA_SECONDS

    @pytest.mark.parametrize("name", HERE)
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    def test_what_is_no_allowed_address_is_refused(self, open_door: Door, name: str, stream: bool) -> None:
        url = URLS[name].replace("{port}", str(open_door.canary.port))
        refused(open_door.post(CHAT, {**chat_with(url), "stream": stream}), 400, "url_not_allowed")

    @pytest.mark.parametrize("entry", TEXT, ids=name_of)
    @pytest.mark.parametrize("field", FIELDS)
    def test_no_other_field_takes_an_address(self, open_door: Door, entry: Entry, field: str) -> None:
        url = f"http://127.0.0.1:{open_door.canary.port}/x.png"
        refused(open_door.post(entry, entry.with_(**{field: url})), 400, "unsupported_parameter", field)


@pytest.mark.usefixtures("open_neighbour")
class TestPictures:
    """In the body. How quickly they are refused is content validation's to show."""

    @pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
    def test_too_many_pixels_are_refused_from_the_header(self, open_door: Door, make: Make) -> None:
        file, peaks = make(), Peaks(open_door)
        refused(reply_to(open_door, file), 400, "image_too_large")
        assert max(peaks.grown().values()) < BOMB_BYTES

    @pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
    def test_what_cannot_be_decoded_is_refused(self, open_door: Door, make: Make) -> None:
        file, peaks = make(), Peaks(open_door)
        refused(reply_to(open_door, file), (400, 415))
        assert max(peaks.grown().values()) < BOMB_BYTES

    @pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
    def test_another_format_is_refused_whatever_it_is_called(self, open_door: Door, make: Make) -> None:
        refused(reply_to(open_door, make()), 415, "unsupported_media_type")

    @pytest.mark.parametrize("make", ODD.values(), ids=ODD)
    def test_an_odd_picture_is_answered_or_refused(self, open_door: Door, make: Make) -> None:
        answered_or_refused(reply_to(open_door, make()))
