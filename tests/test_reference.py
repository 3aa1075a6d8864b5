# SPDX-License-Identifier: Apache-2.0
"""The pages that users look things up in say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from dynamo_epd import errors
from dynamo_epd.errors import _tree as tree
from dynamo_epd.http import images
from dynamo_epd.http.fields import IGNORED
from tools import reference

DOCS = Path(reference.__file__).parents[1] / "docs"


def test_the_page_of_keys_is_what_the_dataclasses_say() -> None:
    assert (DOCS / "configuration.md").read_text().splitlines() == list(reference.page())


CODE = re.compile(r'\bcode(?:: str \| None)? ?= ?"([a-z_]+)"')


def test_the_page_of_errors_has_every_code_that_a_client_may_see() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", (DOCS / "http.md").read_text(), re.MULTILINE)
    told = {code: int(status) for status, codes in rows for code in re.findall(r"`([a-z_]+)`", codes)}
    inner = {one.code for one in tree(errors.Retryable).values()}
    sources = [path for folder in ("components", "dynamo_epd") for path in (DOCS.parent / folder).rglob("*.py")]
    raised = {code for path in sources for code in CODE.findall(path.read_text())}
    assert told.keys() == raised - inner
    for one in tree(errors.EpdError).values():
        if one.code not in inner:
            assert told[str(one.code)] == one.status


def test_the_page_of_fields_has_every_field_that_is_not_openais() -> None:
    fields = (DOCS / "http.md").read_text().partition("## Errors")[0]
    of_vllm = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"}
    assert {name for name in (*images._OWN, *IGNORED, *of_vllm) if f"`{name}`" not in fields} == set()
