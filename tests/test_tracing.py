# SPDX-License-Identifier: Apache-2.0
"""One request is one trace, with a span for each stage that it crosses, as a collector gets them."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from tests.collector import Collector, Span, spans_of
from tests.questions import data_url, picture, user
from tests.serving import Graph, eventually

CLIENT_SPAN = "00f067aa0ba902b7"
STAR = "a large red star on a blue background"


def traced(
    graph: Graph, collector: Collector, path: str, body: dict[str, Any], names: set[str]
) -> tuple[httpx.Response, list[Span]]:
    """Asks as a client with a trace of its own; the reply, and the trace once it has spans of all ``names``."""
    trace = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}
    reply = httpx.post(f"{graph.url}{path}", json=body, headers=headers, timeout=120)
    spans: list[Span] = []

    def whole() -> bool:
        spans[:] = collector.trace(trace)
        return names <= {span.name for span in spans}

    eventually(whole, f"spans {names}", 60)
    return reply, spans


def without_their_caller(spans: list[Span]) -> list[str]:
    """Of a whole trace that is the root alone, whose caller is the client."""
    ids = {span.id for span in spans}
    return [span.name for span in spans if span.parent not in ids]


def named(spans: list[Span], name: str) -> Span:
    (one,) = (span for span in spans if span.name == name)
    return one


def test_a_chat_about_a_picture_is_one_trace(seeing: Graph, collector: Collector) -> None:
    messages = [user("Describe the picture.", data_url(picture(880_001)))]
    body = {"model": "tiny-llava", "messages": messages, "max_tokens": 8, "temperature": 0}
    stages = ["Processor.chat", "EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"]
    names = {"POST /v1/chat/completions", *stages, "nixl.read", "llm_request"}
    answer, spans = traced(seeing, collector, "/v1/chat/completions", body, names)
    reply = answer.json()

    entry = named(spans, "POST /v1/chat/completions")
    assert (entry.service, entry.parent) == ("Frontend", CLIENT_SPAN)
    assert entry.attributes["http.response.status_code"] == 200
    processor = named(spans, "Processor.chat")
    assert processor.parent == entry.id
    for stage in stages[1:]:
        assert named(spans, stage).parent == processor.id
        assert named(spans, stage).service == stage.partition(".")[0]
    assert {span.service for span in spans if span.name == "llm_request"} == {"PrefillWorker", "DecodeWorker"}
    assert {span.parent for span in spans if span.name == "llm_request"} == {
        named(spans, "PrefillWorker.prefill").id,
        named(spans, "DecodeWorker.generate").id,
    }
    reads = {span.service: span for span in spans if span.name == "nixl.read"}
    assert set(reads) == {"EncodeWorker", "PrefillWorker"}, "the picture's bytes, and its embedding"
    assert all(span.attributes["nixl.bytes"] > 0 for span in reads.values())
    filled, taken = (named(spans, stage).attributes for stage in ("PrefillWorker.prefill", "DecodeWorker.generate"))
    assert (taken["kv.engine"], taken["kv.blocks"]) == (filled["kv.engine"], filled["kv.blocks"]), "the KV cache, whole"
    assert filled["kv.engine"] and filled["kv.blocks"] > 0
    asked = processor.attributes
    assert (asked["gen_ai.operation.name"], asked["gen_ai.request.model"]) == ("chat", "tiny-llava")
    assert asked["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert asked["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"]
    assert not any(span.failed for span in spans)


def test_a_streamed_chat_is_one_trace_with_what_was_asked_and_used(seeing: Graph, collector: Collector) -> None:
    messages = [user("Describe the picture.", data_url(picture(880_003)))]
    body = {"model": "tiny-llava", "messages": messages, "max_tokens": 7, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stages = {"Processor.chat", "EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"}
    names = {"POST /v1/chat/completions", *stages, "nixl.read", "llm_request"}
    reply, spans = traced(seeing, collector, "/v1/chat/completions", body, names)

    *_, last, done = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    used = json.loads(last)["usage"]
    assert (reply.status_code, done) == (200, "[DONE]")
    assert without_their_caller(spans) == ["POST /v1/chat/completions"]
    processor = named(spans, "Processor.chat")
    assert processor.parent == named(spans, "POST /v1/chat/completions").id
    assert {named(spans, stage).parent for stage in stages - {"Processor.chat"}} == {processor.id}
    asked = processor.attributes
    assert (asked["gen_ai.provider.name"], asked["gen_ai.request.max_tokens"]) == ("dynamo_epd", 7)
    assert asked["gen_ai.usage.input_tokens"] == used["prompt_tokens"]
    assert asked["gen_ai.usage.output_tokens"] == used["completion_tokens"] <= 7
    assert not any(span.failed for span in spans)


def test_an_embedding_is_one_trace(seeing: Graph, collector: Collector) -> None:
    body = {"model": "tiny-t5", "input": [STAR, "a star"]}
    names = {"POST /v1/embeddings", "EmbedWorker.embed"}
    reply, spans = traced(seeing, collector, "/v1/embeddings", body, names)
    assert reply.status_code == 200
    assert without_their_caller(spans) == ["POST /v1/embeddings"]
    embedded = named(spans, "EmbedWorker.embed")
    assert (embedded.service, embedded.parent) == ("EmbedWorker", named(spans, "POST /v1/embeddings").id)
    about = embedded.attributes
    assert (about["gen_ai.operation.name"], about["gen_ai.provider.name"]) == ("embeddings", "dynamo_epd")
    assert about["gen_ai.request.model"] == reply.json()["model"] == "tiny-t5"
    assert about["gen_ai.usage.input_tokens"] == reply.json()["usage"]["prompt_tokens"] > 0
    assert "gen_ai.usage.output_tokens" not in about


def test_a_validation_is_one_trace(seeing: Graph, collector: Collector) -> None:
    language = {"EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"}
    names = {"POST /v1/validations", "Processor.validate", "ImageWorker.generate", *language}
    names |= {"EmbedWorker.embed", "nixl.read"}
    _, spans = traced(seeing, collector, "/v1/validations", {"prompt": STAR, "seed": 880_002}, names)
    assert without_their_caller(spans) == ["POST /v1/validations"]
    made = named(spans, "ImageWorker.generate").attributes
    assert (made["gen_ai.operation.name"], made["gen_ai.request.seed"]) == ("generate_content", 880_002)


def test_a_job_goes_on_in_the_trace_of_who_asked(seeing: Graph, collector: Collector) -> None:
    _, spans = traced(seeing, collector, "/v1/images/jobs", {"prompt": STAR}, {"POST /v1/images/jobs", "job"})
    job = named(spans, "job")
    assert (job.service, job.parent) == ("ImageWorker", named(spans, "POST /v1/images/jobs").id)


def test_a_refusal_is_a_span_too(seeing: Graph, collector: Collector) -> None:
    body = {"model": "tiny-llava", "messages": [user("<image>")], "max_tokens": 1}
    names = {"POST /v1/chat/completions", "Processor.chat"}
    reply, spans = traced(seeing, collector, "/v1/chat/completions", body, names)
    assert "error" in reply.json()
    assert named(spans, "Processor.chat").failed
    assert named(spans, "POST /v1/chat/completions").attributes["http.response.status_code"] == 400


class GrpcReceiver(TraceServiceServicer):
    """What `Collector` is over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        self.spans += spans_of(request)
        return ExportTraceServiceResponse()


def test_a_span_goes_over_grpc_before_its_process_ends() -> None:
    receiver, server = GrpcReceiver(), grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "no_grpc_proxy": "127.0.0.1",
    }
    trace = secrets.token_hex(16)
    script = (
        "from dynamo_epd import tracing\n"
        f"caller = {{'traceparent': '00-{trace}-{CLIENT_SPAN}-01'}}\n"
        "with tracing.span('a stage', {'b': 1}, kind='server', carrier=caller): tracing.usage(3)"
    )
    server.start()
    try:
        subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    finally:
        server.stop(None).wait()
    (span,) = receiver.spans
    assert (span.service, span.name, span.trace, span.parent) == ("dynamo", "a stage", trace, CLIENT_SPAN)
    assert span.attributes == {"b": 1, "gen_ai.usage.input_tokens": 3}
    assert not span.failed


@pytest.mark.parametrize("more", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}])
def test_where_nobody_collects_nothing_is_imported(more: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | more
    script = (
        "import sys; from dynamo_epd import tracing\n"
        "with tracing.span('a', kind='server') as span: span.describe({'b': 1}); tracing.usage(1, 2)\n"
        "assert tracing.carried() is None and 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize(
    ("variables", "protocol", "endpoint"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http/protobuf", "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/t"}, "http/protobuf", "http://c/t"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "grpc",
            "http://c:4317",
        ),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc", None),
    ],
)
def test_the_collector_is_named_as_opentelemetry_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], protocol: str, endpoint: str | None
) -> None:
    from dynamo_epd import tracing

    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (tracing.protocol(), tracing.endpoint()) == (protocol, endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ValueError, match="http/json"):
        tracing.protocol()
