# SPDX-License-Identifier: Apache-2.0
"""When each stage of a request began and ended, as the stages tell an OpenTelemetry collector."""

from __future__ import annotations

import asyncio
import http.server
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KEPT = 50_000
"""The newest spans."""
ARRIVE_SECONDS = 20.0


@dataclass(frozen=True)
class Span:
    """Seconds since the epoch: the clock of one machine."""

    trace: str
    name: str
    began: float
    ended: float
    service: str = ""
    """Whose it is."""


class Receiver:
    """A collector of traces on this machine, within ``with``: OTLP over HTTP, as OpenTelemetry's exporters speak it."""

    def __init__(self, take: Callable[[ExportTraceServiceRequest], None]):
        """``take`` is called with all that comes, from threads of the server."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

                body = self.rfile.read(int(self.headers["content-length"]))
                take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, Any]:
        """Makes a graph send its spans here."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "300",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Traces(Receiver):
    """``with Traces() as traces``: a graph with `environment` records the requests whose headers are `new_trace`'s."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=KEPT)
        super().__init__(lambda request: self._spans.extend(_spans_of(request)))

    @property
    def environment(self) -> dict[str, Any]:
        """Only what a client's ``traceparent`` asks for is recorded."""
        return super().environment | {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}

    async def trace(self, id: str, counts: Mapping[str, int]) -> list[Span]:
        """The spans of one trace, once there are so many of each name. Raises TimeoutError if there never are."""
        end = time.monotonic() + ARRIVE_SECONDS
        while True:
            spans = [span for span in list(self._spans) if span.trace == id]
            missing = Counter(counts) - Counter(span.name for span in spans)
            if not missing:
                return spans
            if time.monotonic() > end:
                raise TimeoutError(f"spans that have not arrived: {dict(missing)}")
            await asyncio.sleep(0.2)


def new_trace() -> tuple[str, dict[str, str]]:
    """An id, and the header by which a request becomes part of that trace (W3C Trace Context, sampled)."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}


def overlap(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds during which some span of each ran."""
    edges = sorted({edge for span in (*one, *other) for edge in (span.began, span.ended)})
    return sum(
        end - begin
        for begin, end in pairwise(edges)
        if all(any(span.began <= begin and end <= span.ended for span in spans) for spans in (one, other))
    )


def _spans_of(request: ExportTraceServiceRequest) -> list[Span]:
    found = []
    for of_resource in request.resource_spans:
        about = {one.key: one.value.string_value for one in of_resource.resource.attributes}
        found += [
            Span(
                span.trace_id.hex(),
                span.name,
                span.start_time_unix_nano / 1e9,
                span.end_time_unix_nano / 1e9,
                about.get("service.name", ""),
            )
            for scope in of_resource.scope_spans
            for span in scope.spans
        ]
    return found
