# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging

import pytest
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from dynamo_epd.errors import (
    EpdError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    StageUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from dynamo_epd.http.errors import MAX_BODY, answer_errors, error_body


def app_raising(error: Exception) -> FastAPI:
    app = FastAPI()
    answer_errors(app)

    @app.get("/fail")
    async def fail() -> None:
        raise error

    @app.get("/typed")
    async def typed(n: int = Query(ge=1)) -> int:
        return n

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def events():  # type: ignore[no-untyped-def]
            yield b"data: 1\n\n"
            raise error

        return StreamingResponse(events())

    return app


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="n"),
        ModelNotFound("the model 'x' does not exist", param="model"),
        PayloadTooLarge("no"),
        UnsupportedMediaType("no"),
        Unauthorized("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_known_error_speaks_for_itself(error: EpdError) -> None:
    reply = TestClient(app_raising(error)).get("/fail")
    assert reply.status_code == error.status
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    }
    assert ("www-authenticate" in reply.headers) == (error.status == 401)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Overloaded("full"), "1"),
        (Overloaded("full", retry_after=2.2), "3"),
        (StageUnavailable("gone", retry_after=0.05), "1"),
    ],
)
def test_overload_says_when_to_come_back(error: EpdError, seconds: str) -> None:
    reply = TestClient(app_raising(error)).get("/fail")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, seconds)


def test_a_defect_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    app = app_raising(RuntimeError("secret /etc/passwd 10.0.0.1"))
    with caplog.at_level(logging.ERROR, logger="dynamo_epd.http.errors"):
        reply = TestClient(app).get("/fail")
    assert reply.status_code == 500
    assert reply.json()["error"] == {
        "message": "internal error",
        "type": "internal_error",
        "param": None,
        "code": "internal_error",
    }
    assert len(caplog.records) == 1 and "secret" in caplog.text and "secret" not in reply.text


@pytest.mark.parametrize("error", [RuntimeError("x"), InvalidRequest("x")])
def test_a_response_that_has_begun_is_broken_off_not_ended(error: Exception) -> None:
    with pytest.raises(RuntimeError):
        TestClient(app_raising(error)).get("/stream")


def test_an_unknown_route_and_method_have_the_same_body() -> None:
    client = TestClient(app_raising(RuntimeError()))
    unknown = client.get("/nowhere/../x%00")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    method = client.put("/fail")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (418, "invalid_request_error"),
        (503, "internal_error"),
        (499, "invalid_request_error"),
    ],
)
def test_an_http_exception_keeps_its_status_and_loses_its_detail(status: int, kind: str) -> None:
    reply = TestClient(app_raising(HTTPException(status, detail="secret"))).get("/fail")
    assert reply.status_code == status and reply.json()["error"]["type"] == kind
    assert "secret" not in reply.text


def test_an_http_exception_does_not_change_the_next_one() -> None:
    client = TestClient(app_raising(HTTPException(418)))
    assert client.get("/fail").status_code == 418
    assert InvalidRequest("x").status == 400


def test_a_typed_parameter_that_is_wrong_is_named_and_not_echoed() -> None:
    reply = TestClient(app_raising(RuntimeError())).get("/typed", params={"n": "secret"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "n" and "secret" not in reply.text


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "\u00e9" * 10_000, "\U0001f600" * 10_000, "\x01" * 10_000, "\ud800" * 10_000, '"' * 10_000]
)
def test_no_body_is_longer_than_it_may_be(text: str) -> None:
    raw = error_body(InvalidRequest(text, param=text))
    assert len(raw) <= MAX_BODY
    assert json.loads(raw)["error"]["code"] == "invalid_request"
