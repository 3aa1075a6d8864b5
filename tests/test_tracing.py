# SPDX-License-Identifier: Apache-2.0
"""One request is one trace, with a span for each stage that it crosses, as a collector gets them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Span
from tests.questions import data_url, picture, user
from tests.serving import Graph, eventually

CLIENT_SPAN = "00f067aa0ba902b7"
STAR = "a large red star on a blue background"


def traced(
    graph: Graph, collector: Collector, path: str, body: dict[str, Any], names: set[str]
) -> tuple[dict[str, Any], list[Span]]:
    """Asks as a client with a trace of its own; the reply, and the trace once it has spans of all ``names``."""
    trace = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace}-{CLIENT_SPAN}-01"}
    reply = httpx.post(f"{graph.url}{path}", json=body, headers=headers, timeout=120)
    spans: list[Span] = []

    def whole() -> bool:
        spans[:] = collector.trace(trace)
        return names <= {span.name for span in spans}

    eventually(whole, f"spans {names}", 60)
    return reply.json(), spans


def named(spans: list[Span], name: str) -> Span:
    (one,) = (span for span in spans if span.name == name)
    return one


def test_a_chat_about_a_picture_is_one_trace(seeing: Graph, collector: Collector) -> None:
    messages = [user("Describe the picture.", data_url(picture(880_001)))]
    body = {"model": "tiny-llava", "messages": messages, "max_tokens": 8, "temperature": 0}
    stages = ["Processor.chat", "EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"]
    names = {"POST /v1/chat/completions", *stages, "nixl.read", "llm_request"}
    reply, spans = traced(seeing, collector, "/v1/chat/completions", body, names)

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


def test_a_validation_is_one_trace(seeing: Graph, collector: Collector) -> None:
    language = {"EncodeWorker.encode", "PrefillWorker.prefill", "DecodeWorker.generate"}
    names = {"POST /v1/validations", "Processor.validate", "ImageWorker.generate", *language}
    names |= {"EmbedWorker.embed", "nixl.read"}
    _, spans = traced(seeing, collector, "/v1/validations", {"prompt": STAR, "seed": 880_002}, names)
    ids = {span.id for span in spans}
    assert [span.name for span in spans if span.parent not in ids] == ["POST /v1/validations"], "each has its caller"
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
    assert "error" in reply
    assert named(spans, "Processor.chat").failed
    assert named(spans, "POST /v1/chat/completions").attributes["http.response.status_code"] == 400


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
