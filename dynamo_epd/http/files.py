# SPDX-License-Identifier: Apache-2.0
"""A stored object as a file over HTTP: conditions and ranges (RFC 9110, 13 and 14), and the headers of the answer.

Pure functions. Whoever serves the file looks it up, asks `plan` and sends bytes [start, end), or none to a HEAD.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.errors import error_body
from dynamo_epd.store import Stored

OK = 200
PARTIAL_CONTENT = 206
NOT_MODIFIED = 304
RANGE_NOT_SATISFIABLE = 416

_RANGE = re.compile(
    r"bytes=[ \t]*(?:(?P<first>\d{1,100})-(?P<last>\d{0,100})|-(?P<suffix>\d{1,100}))[ \t]*", re.I | re.A
)
_ETAG = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
MAX_CONDITION = 8192
"""Characters of a condition that are read; a longer one holds for nothing."""


@dataclass(frozen=True)
class Plan:
    """How to answer."""

    status: int
    headers: dict[str, str]
    """Names in lower case. ``content-length`` is among them wherever a file, or its HEAD, is answered."""
    start: int = 0
    end: int = 0
    """Bytes [start, end) of the file are the body; none where the two are equal."""
    body: bytes = field(default=b"")
    """What to send instead of the file's bytes: OpenAI's error body with 416."""


def plan(stored: Stored, headers: Mapping[str, str], method: str = "GET") -> Plan:
    """The answer to a GET or HEAD for ``stored`` with request ``headers`` (any mapping that finds lower-case names).

    One range is honoured; several, and what is no range, are ignored, which RFC 9110 (14.2) allows.
    """
    validators = _validators(stored)
    if _is_known(stored, headers):
        return Plan(NOT_MODIFIED, validators)
    about = validators | {
        "accept-ranges": "bytes",
        "content-type": stored.media_type,
        "content-disposition": f'inline; filename="{stored.file_name}"',
        "x-content-type-options": "nosniff",
    }
    asked = _RANGE.fullmatch(headers.get("range", "")) if method == "GET" else None
    if asked is None or not _is_same(stored, headers.get("if-range")):
        return Plan(OK, about | {"content-length": str(stored.size)}, 0, stored.size)
    first, last, suffix = (None if text in (None, "") else int(text) for text in asked.groups())
    if first is not None and last is not None and last < first:  # no range at all
        return Plan(OK, about | {"content-length": str(stored.size)}, 0, stored.size)
    start = max(0, stored.size - suffix) if suffix is not None else first or 0
    end = stored.size if last is None else min(last + 1, stored.size)
    if start >= end:
        body = error_body(InvalidRequest("the range lies outside the file", param="range", code="invalid_range"))
        said = {
            "content-range": f"bytes */{stored.size}",
            "accept-ranges": "bytes",
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        return Plan(RANGE_NOT_SATISFIABLE, said, body=body)
    part = {"content-range": f"bytes {start}-{end - 1}/{stored.size}", "content-length": str(end - start)}
    return Plan(PARTIAL_CONTENT, about | part, start, end)


def _validators(stored: Stored) -> dict[str, str]:
    """What a cache needs. The bytes never change; a tenant's picture is no shared cache's business."""
    left = max(0, math.floor(stored.expires - time.time()))
    return {
        "etag": f'"{stored.etag}"',
        "last-modified": formatdate(math.floor(stored.created), usegmt=True),
        "cache-control": f"private, max-age={left}",
    }


def _is_known(stored: Stored, headers: Mapping[str, str]) -> bool:
    """Whether the client has this very file (13.1.2, 13.1.3). With entity tags a date is not looked at."""
    tags = headers.get("if-none-match")
    if tags is not None:
        tags = tags[:MAX_CONDITION]
        return tags.strip() == "*" or stored.etag in _ETAG.findall(tags)
    since = _seconds(headers.get("if-modified-since"))
    return since is not None and math.floor(stored.created) <= since


def _is_same(stored: Stored, condition: str | None) -> bool:
    """Whether ``If-Range`` lets a range be (13.1.5): a weak tag never does, a date has to be the very one."""
    if condition is None:
        return True
    condition = condition.strip()
    return condition == f'"{stored.etag}"' or _seconds(condition) == math.floor(stored.created)


def _seconds(date: str | None) -> float | None:
    """Unix seconds of an HTTP date; None for what is none."""
    if date is None or len(date) > 64:
        return None
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
