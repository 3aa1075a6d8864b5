# SPDX-License-Identifier: Apache-2.0
"""One request's timeline, from spans that a double of the graph sends to the real collector. No engine runs here: that
the graph itself sends them shows test_tracing.py."""

from __future__ import annotations

import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks import recorded, timeline
from benchmarks.traces import Span

STAGES = [
    ("Frontend", "POST /v1/chat/completions", 0.0, 0.080),
    ("Processor", "Processor.chat", 0.002, 0.078),
    ("EncodeWorker", "EncodeWorker.encode", 0.005, 0.025),
    ("EncodeWorker", "EncodeWorker.encode", 0.005, 0.030),
    ("EncodeWorker", "nixl.read", 0.006, 0.007),
    ("PrefillWorker", "PrefillWorker.prefill", 0.032, 0.050),
    ("PrefillWorker", "nixl.read", 0.033, 0.034),
    ("PrefillWorker", "llm_request", 0.036, 0.050),
    ("DecodeWorker", "DecodeWorker.generate", 0.051, 0.076),
    ("DecodeWorker", "llm_request", 0.052, 0.075),
]
"""Service, span, seconds after the request from and to: as a disaggregated graph on two cores has them."""


class GraphDouble:
    """As `ours_disagg`: answers a streamed chat, and tells a collector what its stages would have done. The ``lost``
    span is never sent; ``broken`` answers nothing but 503."""

    commands = ("dynamo serve a double",)

    def __init__(self, environment: Mapping[str, str], lost: str = "", broken: bool = False):
        self.traced: list[str] = []
        self.pictures: list[str] = []
        double, collector = self, environment["OTEL_EXPORTER_OTLP_ENDPOINT"]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                parts = body["messages"][0]["content"]
                double.pictures += [one["image_url"]["url"] for one in parts if one["type"] == "image_url"]
                began = time.time()
                self.send_response(503 if broken else 200)
                self.end_headers()
                for _ in range(body["max_tokens"]):
                    self.wfile.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
                if "traceparent" in self.headers:
                    trace = self.headers["traceparent"].split("-")[1]
                    double.traced.append(trace)
                    send(collector, trace, began, [one for one in STAGES if one[1] != lost])

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def send(collector: str, trace: str, began: float, stages: Sequence[tuple[str, str, float, float]]) -> None:
    """As each service's exporter: a request for each of them."""
    for service in {stage[0] for stage in stages}:
        request = ExportTraceServiceRequest()
        resource = request.resource_spans.add()
        resource.resource.attributes.add(key="service.name").value.string_value = service
        for owner, name, after, until in stages:
            if owner == service:
                one = resource.scope_spans.add().spans.add(name=name, trace_id=bytes.fromhex(trace))
                one.start_time_unix_nano, one.end_time_unix_nano = (int(1e9 * (began + at)) for at in (after, until))
        post = urllib.request.Request(f"{collector}/v1/traces", request.SerializeToString())
        urllib.request.urlopen(post, timeout=20).close()


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each `GraphDouble` is to be like; under ``graph`` the last one that was served."""
    about: dict[str, Any] = {}

    def served(model: Path, *, environment: Mapping[str, str]) -> GraphDouble:
        about["graph"] = GraphDouble(environment, **{name: of for name, of in about.items() if name != "graph"})
        return about["graph"]

    monkeypatch.setattr(timeline, "ours_disagg", served)
    monkeypatch.setattr(timeline.checkpoints, "directory", Path)
    monkeypatch.setattr(timeline, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(timeline, "lacking", lambda *, arms: "")
    monkeypatch.setattr(timeline, "rest", lambda: None)
    return about


def test_a_request_is_drawn_and_written_as_chromes_trace(
    doubles: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text(f"{recorded.begin('timeline')}\nnone\n{recorded.END}\n")
    monkeypatch.setattr(timeline, "keep", partial(recorded.keep, directory=tmp_path))
    made = tmp_path / "made"
    assert timeline.main(["--pictures", "2", "--tokens", "4", "--output", str(made), "--record"]) == 0
    graph = doubles["graph"]
    assert len(graph.traced) == len(set(graph.traced)) == timeline.AMONG, "questions that warm up are not recorded"
    assert len(set(graph.pictures)) == 2 * (timeline.WARM_UP + timeline.AMONG), "each about pictures of its own"

    whole = json.loads((made / "timeline.json").read_text())
    events = [event for event in whole["traceEvents"] if event["ph"] == "X"]
    names = {event["pid"]: event["args"]["name"] for event in whole["traceEvents"] if event["ph"] == "M"}
    assert sorted(names.values()) == sorted({timeline.CLIENT, *(service for service, *_ in STAGES)})
    assert len({event["args"]["trace"] for event in events}) == 1
    found = sorted((names[event["pid"]], event["name"], event["dur"]) for event in events)
    expected = [(service, name, 1e6 * (until - after)) for service, name, after, until in STAGES]
    of_stages = [one for one in found if one[0] != timeline.CLIENT]
    assert [one[:2] for one in of_stages] == sorted(one[:2] for one in expected)
    assert [one[2] for one in of_stages] == pytest.approx([one[2] for one in sorted(expected)], abs=2.0)
    assert min(event["ts"] for event in events) == 0
    places = [event["ts"] for event in events if event["name"] == "PrefillWorker.prefill"]
    begins = [event["ts"] for event in events if event["name"] == "POST /v1/chat/completions"]
    assert places[0] - begins[0] == pytest.approx(32_000, abs=2.0)
    assert (made / "timeline.png").read_bytes().startswith(b"\x89PNG")

    out = capsys.readouterr().out
    assert "llava-tiny, 2 pictures and 4 tokens, the median of 5 requests" in out
    assert out.count("| EncodeWorker | EncodeWorker.encode | ") == 2
    text = (tmp_path / "README.md").read_text()
    assert "](report/timeline.png)" in text and "| Frontend | POST /v1/chat/completions | " in text
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"timeline.json", "timeline.png"}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"lost": "DecodeWorker.generate"}, "spans that have not arrived: {'DecodeWorker.generate': 1}"),
        ({"broken": True}, "503: "),
    ],
)
def test_a_request_that_no_trace_can_be_made_of_is_said(
    about: dict[str, Any],
    said: str,
    doubles: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubles.update(about)
    monkeypatch.setattr("benchmarks.traces.ARRIVE_SECONDS", 0.5)
    assert timeline.main(["--pictures", "2", "--output", str(tmp_path / "made")]) == 1
    assert f"benchmarks.timeline: {said}" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_spans_that_overlap_have_lanes_of_their_own() -> None:
    def span(service: str, began: float, ended: float, name: str = "read") -> Span:
        return Span("t", name, began, ended, service)

    first, second, third = span("b", 2.0, 4.0), span("b", 3.0, 5.0), span("b", 4.0, 6.0)
    last, other = span("b", 6.0, 7.0, "generate"), span("a", 3.0, 9.0)
    lanes = [("b", [first, third]), ("b", [second]), ("b", [last]), ("a", [other])]
    assert timeline.lanes([last, third, other, second, first]) == lanes, "what is named otherwise has its own too"


def test_shares_are_of_the_whole_request() -> None:
    spans = [Span("t", "all", 8.0, 8.25, "a"), Span("t", "half", 8.0625, 8.1875, "b")]
    assert list(timeline.table(spans))[2:] == ["| a | all | 0 | 250 | 100% |", "| b | half | 62.50 | 125 | 50% |"]
