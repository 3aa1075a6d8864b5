# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined, empty-body"
"""What decorators record, and which links they allow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

import dynamo.sdk
import dynamo_epd.sdk
from dynamo_epd.sdk import (
    AbstractService,
    abstract_endpoint,
    api,
    async_on_start,
    depends,
    dynamo_endpoint,
    endpoint,
    on_shutdown,
    service,
)
from dynamo_epd.sdk.service import info_of
from tests.toys.running import ROOT


@service(
    dynamo={"name": "Encoder", "namespace": "media", "component_type": "worker"},
    resources={"gpu": 1, "cpu": "2"},
    workers=3,
    envs=[{"name": "A", "value": "b"}],
)
class Encode:
    @endpoint(max_in_flight=7)
    async def encode(self, text: str) -> AsyncIterator[str]:
        yield text

    @endpoint(name="other")
    async def second(self, text: str) -> AsyncIterator[str]:
        yield text

    @api(name="post-me")
    async def posted(self) -> None: ...


def test_the_decorator_records_and_leaves_a_plain_class() -> None:
    info = info_of(Encode)
    assert Encode.dynamo_address() == ("media", "Encoder")
    assert (info.workers, info.resources, info.envs) == (3, {"gpu": 1, "cpu": "2"}, [{"name": "A", "value": "b"}])
    assert {name: mark.name for name, mark in info.marked("endpoint").items()} == {
        "encode": "encode",
        "second": "other",
    }
    assert info.marked("endpoint")["encode"].max_in_flight == 7
    assert info.marked("api")["posted"].name == "post-me"
    assert isinstance(Encode(), Encode)


def test_a_name_of_its_own_defaults_to_the_class_name() -> None:
    @service
    class Bare: ...

    assert Bare.dynamo_address() == ("dynamo", "Bare")


def test_hooks_are_inherited_and_may_be_bare_or_called() -> None:
    class Base:
        @async_on_start
        async def first(self) -> None: ...

        @on_shutdown
        def last(self) -> None: ...

    @service
    class Child(Base):
        @async_on_start()
        async def second(self) -> None: ...

    assert list(info_of(Child).marked("on_start")) == ["first", "second"]
    assert list(info_of(Child).marked("on_shutdown")) == ["last"]


def test_a_subclass_without_its_own_decorator_is_no_service() -> None:
    class Undecorated(Encode): ...

    with pytest.raises(TypeError, match="not a @service"):
        info_of(Undecorated)


def test_link_returns_its_argument_and_names_both_when_nothing_fits() -> None:
    @service
    class Caller:
        encode = depends(Encode)

    @service
    class Stranger: ...

    @service
    class Two:
        a = depends(Encode)
        b = depends(Encode)

    assert Caller.link(Encode) is Encode
    with pytest.raises(ValueError, match=r"Caller\.link\(Stranger\)"):
        Caller.link(Stranger)
    with pytest.raises(ValueError, match=r"Two\.link\(Encode\).*more than one"):
        Two.link(Encode)


def test_an_abstract_dependency_takes_what_brings_its_endpoints() -> None:
    class Language(AbstractService):
        @abstract_endpoint
        async def generate(self, text: str) -> AsyncIterator[str]: ...

    @service
    class Extending(Language):
        @endpoint()
        async def generate(self, text: str) -> AsyncIterator[str]:
            yield text

    @service
    class Alike:
        @dynamo_endpoint()
        async def generate(self, text: str) -> AsyncIterator[str]:
            yield text

    @service
    class Lacking:
        async def generate(self, text: str) -> AsyncIterator[str]:
            yield text

    @service
    class Caller:
        language = depends(Language)

    assert Caller.link(Extending) is Extending
    assert Caller.link(Alike) is Alike
    with pytest.raises(ValueError, match="Lacking"):
        Caller.link(Lacking)


def test_the_old_name_has_every_public_name() -> None:
    for name in dynamo_epd.sdk.__all__:
        assert getattr(dynamo.sdk, name) is getattr(dynamo_epd.sdk, name)


def test_importing_a_graph_imports_nothing_heavy() -> None:
    heavy = ("dynamo._core", "torch", "vllm", "nixl", "fastapi", "uvicorn", "circus", "diffusers", "transformers")
    code = f"import sys, dynamo.sdk, tests.toys.relay; print([name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
