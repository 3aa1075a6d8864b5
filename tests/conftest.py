# SPDX-License-Identifier: Apache-2.0
"""What many tests share: engines, which take most of a minute to start, and smaller things."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_epd import failures
from tests.collector import Collector
from tests.exporters import Exporters
from tests.fake_clock import FakeClock
from tests.reference import Reference, plain_engine
from tests.serving import Graph, serve, untrained

TINY_DISAGG = "configs/tiny-disagg.yaml"


def pytest_sessionstart() -> None:
    """Ended by a time limit, pytest ends its graphs too, which are in process groups of their own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    """The plain engine on the random LLaVA's pixels. It gets ready while a graph starts."""
    with plain_engine(untrained("llava")) as engine:
        yield engine


@pytest.fixture(scope="session")
def disagg(reference: Reference) -> Iterator[Graph]:
    """The disaggregated graph on the random LLaVA. Pictures may come from test servers on this machine."""
    private = "--Common.media.allow-private=true"
    with serve("graphs.disagg:Frontend", TINY_DISAGG, private, model=untrained("llava")) as graph:
        yield graph


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles in this process, although a stage that was tried in it has switched that off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """By which it is judged whether a computation hangs."""
    clock = FakeClock()
    monkeypatch.setattr(failures, "monotonic", clock)
    return clock


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the traces of `seeing` go."""
    with Collector() as one:
        yield one


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where the spans of this very process go, each as soon as it ends."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from dynamo_epd import tracing

    with Collector() as own:
        provider = TracerProvider(resource=Resource.create({"service.name": "here"}))
        exporter = OTLPSpanExporter(f"{own.environment['OTEL_EXPORTER_OTLP_ENDPOINT']}/v1/traces")
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(tracing, "ON", True)
        monkeypatch.setattr(tracing, "start", lambda: provider.get_tracer("test"))
        yield own
        provider.shutdown()


@pytest.fixture(scope="session")
def seeing(collector: Collector) -> Iterator[Graph]:
    """What `make serve` starts, content validation on the trained models, with traces."""
    with serve("graphs.cova:Frontend", "configs/tiny-cova.yaml", **collector.environment) as graph:
        yield graph


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of the one graph that the tests of a module look at."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def exporters() -> Iterator[Exporters]:
    with Exporters() as found:
        yield found
