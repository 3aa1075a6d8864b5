# SPDX-License-Identifier: Apache-2.0
"""One request is one trace, with a span for each stage that it crosses, as a collector gets them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar

import grpc
import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from msgspec.structs import replace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from starlette.testclient import TestClient

from dynamo_epd import tracing
from dynamo_epd.errors import EpdError, InvalidRequest, StageUnavailable, TransferTimeout
from dynamo_epd.http.errors import answer_errors, error_event
from dynamo_epd.http.traced import Traced
from dynamo_epd.sdk.endpoints import Mark
from dynamo_epd.sdk.handler import EndpointHandler, InFlight
from dynamo_epd.transfer import Arena
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
    names = {"POST /v1/chat/completions", *stages, "nixl.read", "nixl.read_kv", "llm_request"}
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
    pull, decode = named(spans, "nixl.read_kv"), named(spans, "DecodeWorker.generate")
    assert (pull.service, pull.parent) == ("DecodeWorker", decode.id)
    assert pull.attributes == {"kv.engine": filled["kv.engine"]}
    assert decode.began <= pull.began <= pull.ended <= decode.ended
    asked = processor.attributes
    assert (asked["gen_ai.operation.name"], asked["gen_ai.request.model"]) == ("chat", "tiny-llava")
    assert asked["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert asked["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"]
    assert asked["gen_ai.response.id"] == reply["id"]
    assert asked["gen_ai.response.model"] == reply["model"] == "tiny-llava"
    assert asked["gen_ai.response.finish_reasons"] == [reply["choices"][0]["finish_reason"]]
    assert not any(span.failed for span in spans)


def test_a_streamed_chat_is_one_trace_with_what_was_asked_and_used(seeing: Graph, collector: Collector) -> None:
    messages = [user("Describe the picture.", data_url(picture(880_003)))]
    body = {"model": "tiny-llava", "messages": messages, "max_tokens": 7, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stages = {"Processor.chat", "EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"}
    names = {"POST /v1/chat/completions", *stages, "nixl.read", "llm_request"}
    reply, spans = traced(seeing, collector, "/v1/chat/completions", body, names)

    *events, done = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    *_, ended, last = [json.loads(event) for event in events]
    used = last["usage"]
    assert (reply.status_code, done) == (200, "[DONE]")
    assert without_their_caller(spans) == ["POST /v1/chat/completions"]
    processor = named(spans, "Processor.chat")
    assert processor.parent == named(spans, "POST /v1/chat/completions").id
    assert {named(spans, stage).parent for stage in stages - {"Processor.chat"}} == {processor.id}
    asked = processor.attributes
    assert (asked["gen_ai.provider.name"], asked["gen_ai.request.max_tokens"]) == ("dynamo_epd", 7)
    assert asked["gen_ai.usage.input_tokens"] == used["prompt_tokens"]
    assert asked["gen_ai.usage.output_tokens"] == used["completion_tokens"] <= 7
    assert (asked["gen_ai.response.id"], asked["gen_ai.response.model"]) == (last["id"], last["model"])
    assert asked["gen_ai.response.finish_reasons"] == [ended["choices"][0]["finish_reason"]]
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
    assert about["gen_ai.request.model"] == "tiny-t5"
    assert about["gen_ai.response.model"] == reply.json()["model"] == "tiny-t5"
    assert about["gen_ai.usage.input_tokens"] == reply.json()["usage"]["prompt_tokens"] > 0
    assert "gen_ai.usage.output_tokens" not in about


def test_a_validation_is_one_trace(seeing: Graph, collector: Collector) -> None:
    language = {"EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"}
    names = {"POST /v1/validations", "Processor.validate", "ImageWorker.generate", *language}
    names |= {"EmbedWorker.embed", "nixl.read", "chat"}
    _, spans = traced(seeing, collector, "/v1/validations", {"prompt": STAR, "seed": 880_002}, names)
    assert without_their_caller(spans) == ["POST /v1/validations"]
    caption = named(spans, "chat")
    assert caption.parent == named(spans, "Processor.validate").id
    assert caption.attributes["gen_ai.operation.name"] == "chat"
    assert caption.attributes["gen_ai.response.finish_reasons"]
    made = named(spans, "ImageWorker.generate").attributes
    assert (made["gen_ai.operation.name"], made["gen_ai.request.seed"]) == ("generate_content", 880_002)


def test_a_refused_embedding_says_what_was_asked(seeing: Graph, collector: Collector) -> None:
    names = {"POST /v1/embeddings", "EmbedWorker.embed"}
    reply, spans = traced(seeing, collector, "/v1/embeddings", {"model": "none", "input": STAR}, names)
    assert reply.status_code == 404
    refused = named(spans, "EmbedWorker.embed")
    assert refused.failed
    assert refused.attributes["error.type"] == reply.json()["error"]["code"] == "model_not_found"
    assert refused.attributes["gen_ai.request.model"] == "none"
    assert "gen_ai.response.model" not in refused.attributes


def test_a_job_goes_on_in_the_trace_of_who_asked(seeing: Graph, collector: Collector) -> None:
    _, spans = traced(seeing, collector, "/v1/images/jobs", {"prompt": STAR}, {"POST /v1/images/jobs", "job"})
    job = named(spans, "job")
    assert (job.service, job.parent) == ("ImageWorker", named(spans, "POST /v1/images/jobs").id)


def test_a_refusal_is_a_span_too(seeing: Graph, collector: Collector) -> None:
    body = {"model": "tiny-llava", "messages": [user("<image>")], "max_tokens": 1}
    names = {"POST /v1/chat/completions", "Processor.chat"}
    reply, spans = traced(seeing, collector, "/v1/chat/completions", body, names)
    refused, entry = named(spans, "Processor.chat"), named(spans, "POST /v1/chat/completions")
    assert (refused.failed, refused.attributes["error.type"]) == (True, reply.json()["error"]["code"])
    assert entry.attributes["http.response.status_code"] == 400
    assert not entry.failed and "error.type" not in entry.attributes, "the client's failure, and not the server's"


class Odd(Exception):
    """What no code knows."""


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (StageUnavailable("nobody is left"), "stage_unavailable"),
        (InvalidRequest("too long", code="context_length_exceeded"), "context_length_exceeded"),
        (TimeoutError(), "TimeoutError"),
        (Odd(), f"{__name__}.Odd"),
    ],
)
def test_a_span_that_fails_says_by_what(here: Collector, error: Exception, name: str) -> None:
    with pytest.raises(type(error)), tracing.span("a stage"):
        raise error
    (span,) = here.spans
    assert (span.failed, span.attributes) == (True, {"error.type": name})


def test_who_leaves_fails_nothing(here: Collector) -> None:
    for leaves in (asyncio.CancelledError(), GeneratorExit()):
        with pytest.raises(type(leaves)), tracing.span("a stage"):
            raise leaves
    with tracing.span("a stage"):
        pass
    assert [(span.failed, span.attributes) for span in here.spans] == [(False, {})] * 3


class Caller:
    """Whom an endpoint answers, until it leaves."""

    metadata: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def async_killed_or_stopped(self) -> None:
        await self.left.wait()

    def is_stopped(self) -> bool:
        return self.left.is_set()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_worker_that_gives_a_caller_up_has_failed_and_one_that_is_left_has_not(here: Collector, leaves: bool) -> None:
    async def main() -> None:
        caller = Caller()

        async def endpoint() -> AsyncIterator[int]:
            yield 1
            if leaves:
                caller.left.set()
                await asyncio.Event().wait()
            raise asyncio.CancelledError

        handler = EndpointHandler(endpoint, Mark("endpoint", "asked"), InFlight())
        async for _ in handler.handle("null", caller):
            pass

    asyncio.run(main())
    (span,) = here.spans
    assert (span.failed, span.attributes.get("error.type")) == ((False, None) if leaves else (True, "worker_lost"))


def edge() -> FastAPI:
    """An application that fails in every way in which ours do."""
    app = FastAPI()
    answer_errors(app)
    app.add_middleware(Traced)
    failures = {"refused": InvalidRequest("no"), "away": StageUnavailable("nobody is left"), "defect": Odd("secret")}

    @app.get("/whole/{how}")
    async def whole(how: str) -> None:
        raise failures[how]

    @app.get("/stream/{how}")
    async def stream(how: str) -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            yield b"data: {}\n\n"
            try:
                raise failures[how]
            except EpdError as error:
                yield error_event(error)

        return StreamingResponse(events())

    return app


@pytest.mark.parametrize(
    ("path", "status", "failed"),
    [
        ("/whole/refused", 400, None),
        ("/whole/away", 503, "503"),
        ("/whole/defect", 500, "500"),
        ("/stream/refused", 200, None),
        ("/stream/away", 200, "stage_unavailable"),
        ("/stream/defect", 200, f"{__name__}.Odd"),
    ],
)
def test_an_http_span_fails_with_its_status_or_its_stream(
    here: Collector, path: str, status: int, failed: str | None
) -> None:
    client = TestClient(edge(), raise_server_exceptions=False)
    with suppress(Odd):  # in the middle of a reply nothing is left to say: the connection is cut
        assert client.get(path).status_code == status
    (span,) = here.spans
    assert span.attributes["http.response.status_code"] == status
    assert (span.failed, span.attributes.get("error.type")) == (failed is not None, failed)


def test_a_read_fails_as_its_caller_is_told(here: Collector) -> None:
    async def silent(_: str) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        arena = await Arena.open(4096, owner="me", resolve=silent)
        with await arena.reserve([5], 1) as (slot,):
            slot.write(b"hello")
            handle = arena.lease(slot.publish(), 60)
        elsewhere = replace(handle, owner="silent", incarnation=secrets.token_hex(8))
        with pytest.raises(TransferTimeout):
            async with arena.read([elsewhere], timeout=0.05):
                pass
        await arena.close()

    asyncio.run(main())
    (span,) = here.spans
    assert (span.name, span.failed) == ("nixl.read", True)
    assert span.attributes == {"nixl.handles": 1, "nixl.bytes": 5, "error.type": "transfer_timeout"}


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
        "with tracing.span('a', kind='server') as span: span.describe({'b': 1}); span.fail('x'); tracing.usage(1, 2)\n"
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
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (tracing.protocol(), tracing.endpoint()) == (protocol, endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ValueError, match="http/json"):
        tracing.protocol()
