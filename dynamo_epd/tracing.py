# SPDX-License-Identifier: Apache-2.0
"""Traces: one request is one trace, over HTTP, the request plane, jobs, hand-offs and the engine, each with its span.

On where OpenTelemetry's own variables name a collector: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``…_TRACES_ENDPOINT``) and
``OTEL_EXPORTER_OTLP_PROTOCOL``, ``grpc`` or ``http/protobuf``; ``OTEL_TRACES_SAMPLER`` says how many are kept. Without
a collector OpenTelemetry is not even imported. What crosses is W3C's ``traceparent``: in the head of an HTTP request,
in the metadata of a call, in the headers of a job. Names are OpenTelemetry's for generative AI where it has one.
A span that fails says by what in ``error.type`` (`error_type`); the span of an HTTP request fails with its reply, by
OpenTelemetry's conventions for HTTP servers. Who leaves fails nothing: a cancelled span has no error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from dynamo_epd.errors import EpdError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Kind = Literal["internal", "server", "consumer"]
GRPC, HTTP = "grpc", "http/protobuf"


class Span:
    """What a block is told about; this one keeps nothing."""

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes by name: strings, numbers, booleans or lists of these."""

    def rename(self, name: str) -> None:
        """A better name than the one it began with."""

    def fail(self, error: BaseException | str) -> None:
        """It has failed, although nothing is raised through its block; a text is an `error_type` already."""


_SILENT = Span()


class _Recorded(Span):
    def __init__(self, span: Any):
        self._span = span

    def describe(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def fail(self, error: BaseException | str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR)
        self.describe({"error.type": error if isinstance(error, str) else error_type(error)})


def error_type(error: BaseException) -> str:
    """OpenTelemetry's ``error.type``: the ``code`` of an `EpdError`, which clients see too (``stage_unavailable``,
    ``invalid_image``, …: docs/http.md has those that reach them), and of any other exception its class, with its
    module."""
    if isinstance(error, EpdError) and error.code is not None:
        return error.code
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def protocol() -> str:
    """Of the exporter. Raises ValueError for one that is none of OpenTelemetry's two binary ones."""
    own, general = (os.environ.get(f"OTEL_EXPORTER_OTLP_{what}PROTOCOL") for what in ("TRACES_", ""))
    named = own or general or HTTP
    if named not in (GRPC, HTTP):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL {named!r} is neither {GRPC} nor {HTTP}")
    return named


def endpoint() -> str | None:
    """Where spans go; None where nobody asked for them. Over HTTP the general address gets ``/v1/traces``."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    own, general = (os.environ.get(f"OTEL_EXPORTER_OTLP_{what}ENDPOINT") for what in ("TRACES_", ""))
    if own or not general:
        return own or None
    return general if protocol() == GRPC else f"{general.rstrip('/')}/v1/traces"


ON = endpoint() is not None


@cache
def start() -> Tracer:
    """This process' tracer. vLLM's engine uses it too, if it is started first."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from dynamo_epd.sdk.context import dynamo_context

    exporter: Any
    if protocol() == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        exporter = GrpcExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        exporter = HttpExporter()
    about = {
        "service.namespace": dynamo_context.get("namespace", "dynamo"),
        "service.name": dynamo_context.get("service_name", "dynamo"),
        "service.instance.id": str(dynamo_context.get("instance_id", os.getpid())),
    }
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.get_tracer("dynamo_epd")


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    kind: Kind = "internal",
    carrier: Mapping[str, str] | None = None,
) -> Iterator[Span]:
    """Around what is done. It belongs to the span around it, or to the one that ``carrier`` tells of. It has failed
    where an Exception goes through it.

    Must be left in the task that entered it: not around a ``yield`` that another task resumes.
    """
    if not ON:
        yield _SILENT
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    context = extract(carrier) if carrier is not None else None
    kinds = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER}
    with start().start_as_current_span(name, context=context, kind=kinds[kind]) as one:
        recorded = _Recorded(one)
        recorded.describe(attributes or {})
        try:
            yield recorded
        except Exception as error:  # OpenTelemetry sets its status, and keeps what was raised as an event
            recorded.describe({"error.type": error_type(error)})
            raise


def past(
    name: str, began: float, ended: float, attributes: Mapping[str, Any], error: BaseException | str | None = None
) -> None:
    """A span of what is over, below the current one, as another process has told of it: from ``began`` to ``ended``
    (Unix seconds). ``error``: by what it failed, as `Span.fail` takes it."""
    if ON:
        one = start().start_span(name, start_time=int(began * 1e9))
        recorded = _Recorded(one)
        recorded.describe(attributes)
        if error is not None:
            recorded.fail(error)
        one.end(int(ended * 1e9))


def current() -> Span:
    """The span of what is being done now, to be told more."""
    if not ON:
        return _SILENT
    from opentelemetry.trace import get_current_span

    return _Recorded(get_current_span())


def generation(operation: str, body: Mapping[str, Any]) -> None:
    """Tells the current span what an OpenAI body asks for. ``operation``: chat, text_completion, embeddings, …"""
    if ON:
        names = {"model": "model", "temperature": "temperature", "top_p": "top_p", "seed": "seed", "n": "choice.count"}
        asked = {f"gen_ai.request.{name}": body.get(key) for key, name in names.items()}
        tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        about = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "dynamo_epd"}
        current().describe(about | asked | {"gen_ai.request.max_tokens": tokens})


def response(model: str, id: str | None = None, finish_reasons: Sequence[str] = ()) -> None:
    """Tells the current span what a reply says of itself. ``finish_reasons``: one for each answer in it, in order."""
    about = {"model": model, "id": id, "finish_reasons": finish_reasons or None}
    current().describe({f"gen_ai.response.{name}": value for name, value in about.items()})


def usage(input_tokens: int, output_tokens: int | None = None) -> None:
    """Tells the current span how many tokens there were; what it was told before counts no more."""
    current().describe({"gen_ai.usage.input_tokens": input_tokens, "gen_ai.usage.output_tokens": output_tokens})


def carry(carrier: MutableMapping[str, str]) -> None:
    """Writes into ``carrier`` which span this is part of."""
    if ON:
        from opentelemetry.propagate import inject

        inject(carrier)


def carried() -> dict[str, str] | None:
    """`carry` into a new mapping, as engines take it; None where there is no trace."""
    if not ON:
        return None
    carrier: dict[str, str] = {}
    carry(carrier)
    return carrier
