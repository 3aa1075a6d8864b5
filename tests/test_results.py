# SPDX-License-Identifier: Apache-2.0
"""What stays: jobs, stored pictures, addresses, and the routes of older systems, over a whole graph."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.pixels import pixels, same_picture
from tests.serving import Graph

STAR = "a large red star on a blue background"
BOUND = 120.0


@pytest.fixture(scope="module")
def http(seeing: Graph) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=seeing.url, timeout=BOUND) as client:
        yield client


@pytest.fixture(scope="module")
def client(seeing: Graph) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0, timeout=BOUND) as one:
        yield one


def ended(http: httpx.Client, id: str) -> dict[str, Any]:
    until = time.monotonic() + BOUND
    while time.monotonic() < until:
        state: dict[str, Any] = http.get(f"/v1/images/jobs/{id}").json()
        if state["status"] in ("completed", "failed"):
            return state
        time.sleep(0.1)
    raise AssertionError(f"the job is still {state['status']}")


def picture_of(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def refused(reply: httpx.Response, status: int, param: str | None = None) -> None:
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["param"] == param


def test_a_job_makes_the_pictures_that_a_request_would(
    http: httpx.Client, client: openai.OpenAI, seeing: Graph
) -> None:
    stored_before = seeing.metrics("ImageWorker").total("epd_images_stored_total")
    reply = http.post("/v1/images/jobs", json={"prompt": STAR, "n": 2, "seed": 7})
    assert reply.status_code == 202
    accepted = reply.json()
    assert reply.headers["location"] == f"/v1/images/jobs/{accepted['id']}"
    assert (accepted["object"], accepted["n"], accepted["prompt"]) == ("image.job", 2, STAR)
    state = ended(http, accepted["id"])
    assert (state["status"], state["attempts"]) == ("completed", 1)
    assert [one["seed"] for one in state["data"]] == [7, 8]
    assert seeing.metrics("ImageWorker").total("epd_images_stored_total") == stored_before + 2
    direct = client.images.generate(model="tiny-image", prompt=STAR, n=2, extra_body={"seed": 7})
    assert direct.data
    for stored, made in zip(state["data"], direct.data, strict=True):
        assert same_picture(pixels(http.get(stored["url"]).content), pixels(made.b64_json))


def test_an_idempotency_key_is_one_job(http: httpx.Client) -> None:
    key = {"Idempotency-Key": f"key-{time.time_ns()}"}
    first = http.post("/v1/images/jobs", json={"prompt": STAR}, headers=key).json()
    assert http.post("/v1/images/jobs", json={"prompt": STAR}, headers=key).json()["id"] == first["id"]
    refused(http.post("/v1/images/jobs", json={"prompt": "another"}, headers=key), 422)
    refused(http.post("/v1/images/jobs", json={"prompt": STAR}, headers={"Idempotency-Key": "two words"}), 400)
    assert len(ended(http, first["id"])["data"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": STAR, "size": "big"}, "size"),
        ({"prompt": STAR, "stream": True}, "stream"),
        ({"prompt": STAR, "response_format": "b64_json"}, "response_format"),
        ({"prompt": STAR, "num_inference_steps": 500}, "num_inference_steps"),
        ({"prompt": STAR, "lora": "none"}, "lora"),
        ({"prompt": STAR, "size": "61x67"}, "size"),
        ({"prompt": "star " * 6000}, "prompt"),
        ({"prompt": STAR, "colour": "red"}, "colour"),
    ],
)
def test_a_job_is_refused_before_it_is_accepted(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    refused(http.post("/v1/images/jobs", json=fields), 400, param)


def test_an_unknown_model_is_no_job(http: httpx.Client) -> None:
    refused(http.post("/v1/images/jobs", json={"prompt": STAR, "model": "other"}), 404, "model")


@pytest.mark.parametrize("path", ["/v1/images/jobs/job-0", "/v1/images/img-0", "/v1/images/..%2F..", "/results/job-0"])
def test_what_is_not_there(http: httpx.Client, path: str) -> None:
    refused(http.get(path), 404)


def test_openais_client_gets_an_address(client: openai.OpenAI, http: httpx.Client) -> None:
    reply = client.images.generate(model="tiny-image", prompt=STAR, response_format="url", extra_body={"seed": 3})
    assert reply.data
    (one,) = reply.data
    assert one.b64_json is None
    assert picture_of(http.get(one.url or "").content).size == (64, 64)


def test_a_stored_picture_is_a_file(http: httpx.Client) -> None:
    made = http.post("/v1/images/generations", json={"prompt": STAR, "response_format": "url", "seed": 4}).json()
    url = made["data"][0]["url"]
    whole = http.get(url)
    assert whole.status_code == 200
    assert whole.headers["content-type"] == "image/png"
    assert http.head(url).headers["content-length"] == str(len(whole.content))
    part = http.get(url, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, whole.content[8:16])
    assert http.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    beyond = http.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416
    assert http.delete(url).json()["deleted"] is True
    refused(http.get(url), 404)
    refused(http.delete(url), 404)


def test_a_gallery_shows_the_newest_first_with_what_was_found(http: httpx.Client) -> None:
    prompts = [STAR, "a small green ring on a yellow background"]
    made = [
        http.post("/v1/validations", json={"prompt": prompt, "response_format": "url"}).json()["data"][0]
        for prompt in prompts
    ]
    shown = http.get("/v1/images", params={"limit": 2}).json()["data"]
    assert [one["prompt"] for one in shown] == prompts[::-1]
    for one, validated in zip(shown, made[::-1], strict=True):
        assert one["id"] == validated["id"]
        assert one["url"] == validated["url"]
        for name in ("caption", "similarity", "verdict", "threshold"):
            assert one[name] == validated[name]
    refused(http.get("/v1/images", params={"limit": 0}), 400, "limit")


def test_the_older_routes(http: httpx.Client) -> None:
    accepted = http.post("/text-to-image", params={"text": STAR})
    assert accepted.status_code == 202
    assert accepted.json()["message"]
    ended(http, accepted.json()["job-id"])
    found = http.get(f"/results/{accepted.json()['job-id']}").json()
    assert found["status"] == "SUCCESS"
    url = found["url"]
    assert picture_of(http.get(url).content).size == (64, 64)
    http.delete(url)
    assert http.get(f"/results/{accepted.json()['job-id']}").json()["status"] == "ERROR"
    refused(http.post("/text-to-image"), 400, "prompt")


def test_kserves_predict(http: httpx.Client) -> None:
    body = {"instances": [{"prompt": STAR, "seed": 1}, STAR], "parameters": {"num_inference_steps": 2, "seed": 9}}
    found = http.post("/v1/models/tiny-image:predict", json=body).json()["predictions"]
    assert [one["seed"] for one in found] == [1, 9]
    assert all(picture_of(base64.b64decode(one["image"]["b64"])).size == (64, 64) for one in found)
    vectors = http.post("/v1/models/tiny-t5:predict", json={"instances": [STAR]}).json()["predictions"]
    direct = http.post("/v1/embeddings", json={"input": STAR}).json()["data"][0]["embedding"]
    assert vectors[0] == pytest.approx(direct, abs=1e-6)
    refused(http.post("/v1/models/other:predict", json={"instances": [STAR]}), 404, "model")
    refused(http.post("/v1/models/tiny-image:predict", json={}), 400, "instances")
    refused(
        http.post("/v1/models/tiny-image:predict", json={"instances": [{"n": 2, "prompt": STAR}]}), 400, "instances"
    )
