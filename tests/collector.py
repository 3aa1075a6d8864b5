# SPDX-License-Identifier: Apache-2.0
"""A collector of traces on this machine: OTLP over HTTP, as OpenTelemetry's exporters speak it."""

from __future__ import annotations

import http.server
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KEPT = 50_000
"""The newest spans."""


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace: str
    id: str
    parent: str
    """Empty for the root."""
    attributes: dict[str, Any]
    failed: bool


class Collector:
    """``with Collector() as collector``: `environment` makes a graph send its spans here."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=KEPT)
        spans = self._spans

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                spans.extend(spans_of(ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, Any]:
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "300",
        }

    def trace(self, id: str) -> list[Span]:
        """What came of one trace so far."""
        return [span for span in list(self._spans) if span.trace == id]

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def spans_of(request: ExportTraceServiceRequest) -> list[Span]:
    found = []
    for of_resource in request.resource_spans:
        resource = values(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            for span in scope.spans:
                found.append(
                    Span(
                        str(resource["service.name"]),
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        values(span.attributes),
                        span.status.code == span.status.STATUS_CODE_ERROR,
                    )
                )
    return found


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value") for one in attributes}
