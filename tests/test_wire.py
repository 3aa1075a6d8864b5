# SPDX-License-Identifier: Apache-2.0
"""Messages of every kind that a graph may use survive one crossing."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
import numpy
import pydantic
import pytest

from dynamo_epd.sdk.wire import Decoder, encode, reply_type, request_type, to_plain


class Structure(msgspec.Struct, frozen=True):
    number: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass
class Record:
    number: int
    raw: bytes = b""


class Model(pydantic.BaseModel):
    number: int
    text: str = ""


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Structure(1, ("a",)), Structure),
        (Record(2, b"\x00\xff"), Record),
        (Model(number=3, text="é"), Model),
        ({"a": [1, None, {"b": 2.5}]}, dict),
        ({"a": 1}, Any),
        ("text", str),
        ("text", Any),
        ([1, 2], list[int]),
        (None, Any),
    ],
)
def test_what_goes_in_comes_out(value: Any, kind: Any) -> None:
    assert Decoder(kind)(encode(value)) == value


@pytest.mark.parametrize("kind", [Structure, Record, Model])
def test_json_text_and_plain_values_are_taken_for_objects(kind: Any) -> None:
    expected = kind(number=4)
    assert Decoder(kind)(encode('{"number": 4}')) == expected
    assert Decoder(kind)('{"number": 4}') == expected
    assert Decoder(kind)({"number": 4}) == expected


@pytest.mark.parametrize("kind", [Structure, Record, Model, dict])
@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"\xff" * 40, encode({"number": "x", "names": 5}) + b"\x00", "no json", 7, None]
)
def test_what_does_not_fit_is_refused(kind: Any, raw: Any) -> None:
    with pytest.raises((ValueError, msgspec.DecodeError)):
        Decoder(kind)(raw)


def test_arrays_are_sent_as_lists_and_unknown_things_not_at_all() -> None:
    assert Decoder(Any)(encode({"a": numpy.arange(3)})) == {"a": [0, 1, 2]}
    assert to_plain(Model(number=1)) == {"number": 1, "text": ""}
    with pytest.raises(TypeError, match="object cannot be sent"):
        encode(object())


def test_types_are_read_from_annotations() -> None:
    class Service:
        async def structured(self, request: Structure) -> AsyncIterator[Record]: ...  # type: ignore[empty-body]
        async def old(self, request: Model) -> AsyncGenerator[str, None]: ...  # type: ignore[empty-body]
        async def bare(self, request): ...  # type: ignore[no-untyped-def]
        async def second(self, context: Any, request: Structure): ...  # type: ignore[no-untyped-def]

    assert (request_type(Service.structured), reply_type(Service.structured)) == (Structure, Record)
    assert (request_type(Service.old), reply_type(Service.old)) == (Model, str)
    assert (request_type(Service.bare), reply_type(Service.bare)) == (Any, Any)
    assert request_type(Service.second) is Structure
