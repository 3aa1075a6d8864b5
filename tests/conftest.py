# SPDX-License-Identifier: Apache-2.0
"""Engines that many tests share: they take most of a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reference import Reference, plain_engine
from tests.serving import Graph, serve, tiny_model


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    """The plain engine on the tiny LLaVA's pixels. It gets ready while a graph starts."""
    with plain_engine(tiny_model("llava")) as engine:
        yield engine


@pytest.fixture(scope="session")
def disagg(reference: Reference) -> Iterator[Graph]:
    """The disaggregated graph on the tiny LLaVA. Pictures may come from test servers on this machine."""
    with serve("graphs.disagg:Frontend", "configs/tiny-disagg.yaml", "--Common.media.allow-private=true") as graph:
        yield graph
