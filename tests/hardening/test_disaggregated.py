# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md that reach the chat and completions of the disaggregated graph: no image models, and a processor
of its own. The cases are those of content validation; of those whose refusal takes long, a sample."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hardening.edge import CHAT, TEXT, Door, Entry, chat_with, refused
from tests.hardening.test_fields import INSIDE, NUMBERS, SCHEMA_SECONDS, SCHEMAS, id_of, name_of, with_schema
from tests.hardening.test_requests import JSONS, MODELS
from tests.hardening.test_urls import URLS

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
