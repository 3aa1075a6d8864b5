# SPDX-License-Identifier: Apache-2.0
"""The few of the soak that are no plain question: what they take for right."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from tests.hardening import soak
from tests.hardening.load import client_of
from tests.hardening.soak import REFUSED, job, leave, refused

WORDS = b'data: {"choices": [{"delta": {"content": "red"}}]}\n\n' * 100


class FrontendDouble(ThreadingHTTPServer):
    """Answers every path by ``replies``, one after the other, where it has some, else 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ReplyingDouble)
        self.daemon_threads = True
        self.replies: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class ReplyingDouble(BaseHTTPRequestHandler):
    server: FrontendDouble
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers["content-length"] or 0))
        place = (self.command, self.path)
        self.server.asked.append(place)
        left = self.server.replies.get(place, [(503, b"{}")])
        status, body = left.pop(0) if len(left) > 1 else left[0]
        self.send_response(status)
        self.send_header("content-type", "application/json" if body.startswith(b"{") else "application/octet-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def frontend() -> Iterator[FrontendDouble]:
    with FrontendDouble() as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def client(frontend: FrontendDouble) -> Iterator[openai.OpenAI]:
    graph: Any = SimpleNamespace(url=frontend.url)
    with client_of(graph, retries=0) as one:
        yield one


def state(status: str, **more: Any) -> tuple[int, bytes]:
    return 202 if status == "queued" else 200, json.dumps({"id": "job-7", "status": status, **more}).encode()


def test_a_job_gives_its_picture_and_deletes_it(frontend: FrontendDouble, client: openai.OpenAI) -> None:
    made = {"id": "img-7", "url": f"{frontend.url}/v1/images/img-7"}
    frontend.replies = {
        ("POST", "/v1/images/jobs"): [state("queued")],
        ("GET", "/v1/images/jobs/job-7"): [state("in_progress"), state("completed", data=[made])],
        ("GET", "/v1/images/img-7"): [(200, b"PNG")],
        ("DELETE", "/v1/images/img-7"): [(200, b"{}")],
    }
    assert base64.b64decode(job(client, 0)) == b"PNG"
    assert frontend.asked[-1] == ("DELETE", "/v1/images/img-7")


def test_a_job_that_fails_is_no_picture(frontend: FrontendDouble, client: openai.OpenAI) -> None:
    frontend.replies = {("POST", "/v1/images/jobs"): [state("failed", error={"message": "no store"})]}
    with pytest.raises(TimeoutError, match="no store"):
        job(client, 0)


@pytest.mark.parametrize("number", range(4))  # of either kind some
def test_whoever_leaves_has_left_unless_it_is_sent_away(
    frontend: FrontendDouble, client: openai.OpenAI, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "LEAVES_WITHIN", (5.0, 5.0))  # none of them because this machine is slow
    with pytest.raises(openai.InternalServerError):
        leave(client, number)
    frontend.replies = {
        ("POST", "/v1/chat/completions"): [(200, WORDS)],
        ("POST", "/v1/images/generations"): [(200, b'{"created": 1, "data": []}')],
    }
    assert leave(client, number) == "left"


def test_whoever_does_not_get_its_picture_in_time_has_left(client: openai.OpenAI, frontend: FrontendDouble) -> None:
    frontend.shutdown()  # it takes connections, and says nothing
    numbers = (number for number in range(100) if soak.random.Random(number).random() < 0.5)
    assert leave(client, next(numbers)) == "left"


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_refusal_has_its_own_status(frontend: FrontendDouble, client: openai.OpenAI, number: int) -> None:
    path, _, status = REFUSED[number]
    assert refused(client, number) == f"{path}: 503, not {status}"
    frontend.replies = {("POST", f"/v1{path}"): [(200, b"{}")]}
    assert refused(client, number) == f"{path}: taken"
    frontend.replies = {("POST", f"/v1{path}"): [(status, b"{}")]}
    assert refused(client, number) == "refused"
