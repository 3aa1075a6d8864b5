# SPDX-License-Identifier: Apache-2.0
"""A collector of traces on this machine that knows who sent a span, below which one, and whether it failed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks.traces import KEPT, Receiver


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
    began: int
    ended: int
    """Unix nanoseconds."""


class Collector(Receiver):
    """``with Collector() as collector``: `environment` makes a graph send its spans here."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=KEPT)
        super().__init__(lambda request: self._spans.extend(spans_of(request)))

    def trace(self, id: str) -> list[Span]:
        """What came of one trace so far."""
        return [span for span in self.spans if span.trace == id]

    @property
    def spans(self) -> list[Span]:
        """All that came so far, of whatever trace."""
        return list(self._spans)


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
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                    )
                )
    return found


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: plain(one.value) for one in attributes}


def plain(value: Any) -> Any:
    """Of a list a list."""
    found = getattr(value, value.WhichOneof("value") or "string_value")
    return [plain(one) for one in found.values] if value.HasField("array_value") else found
