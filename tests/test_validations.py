# SPDX-License-Identifier: Apache-2.0
"""``/v1/validations`` on the graph that `make serve` starts: prompt → picture → caption → similarity."""

from __future__ import annotations

import base64
import io
import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import world
from tests.pixels import pixels, same_picture
from tests.questions import Refused, data_url, post, user
from tests.serving import Graph, at_rest

STAR = "a large red star on a blue background"


def validate(graph: Graph, prompt: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = post(f"{graph.url}/v1/validations", {"prompt": prompt, **fields}, timeout=300)
    return found


def prompts(count: int) -> list[str]:
    found = world.scenes(random.Random(11), held_out=True, pairs=0.0)
    return [next(found).caption for _ in range(count)]


def test_a_prompt_becomes_a_picture_a_caption_and_a_verdict(seeing: Graph) -> None:
    reply = validate(seeing, STAR, seed=1, include_embeddings=True)
    (one,) = reply["data"]
    assert reply["prompt"] == STAR
    assert Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).size == (64, 64)
    assert one["caption"] == STAR
    assert one["similarity"] == pytest.approx(1, abs=1e-4)
    assert one["verdict"] == "match"
    assert [stage["name"] for stage in one["stages"]] == ["image", "caption", "similarity"]
    assert all(stage["run_seconds"] > 0 for stage in one["stages"])
    prompt, caption = np.array(one["prompt_embedding"]), np.array(one["caption_embedding"])
    assert prompt @ caption == pytest.approx(one["similarity"], abs=1e-5)
    vectors = [item["embedding"] for item in post(f"{seeing.url}/v1/embeddings", {"input": [STAR]})["data"]]
    np.testing.assert_allclose(prompt, vectors[0], atol=1e-5)


def test_the_caption_is_what_chat_says_of_the_picture(seeing: Graph) -> None:
    (one,) = validate(seeing, "a small green ring on a yellow background", seed=5)["data"]
    url = data_url(base64.b64decode(one["b64_json"]))
    body = {"model": "tiny-llava", "messages": [user("Describe the picture.", url)], "max_tokens": 40, "temperature": 0}
    said = post(f"{seeing.url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert said == one["caption"]


def test_32_at_once_are_32_right_pairs(seeing: Graph) -> None:
    asked = prompts(32)
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda index: validate(seeing, asked[index], seed=index), range(32)))
    assert [reply["prompt"] for reply in replies] == asked
    results = [reply["data"][0] for reply in replies]
    alone = [validate(seeing, asked[index], seed=index)["data"][0] for index in (0, 9, 31)]
    for index, one in zip((0, 9, 31), alone, strict=True):
        assert same_picture(pixels(results[index]["b64_json"]), pixels(one["b64_json"])), "alone or among others"
        assert results[index]["caption"] == one["caption"]
    right = sum(one["caption"] == prompt for one, prompt in zip(results, asked, strict=True))
    assert right >= 26, [(one["caption"], prompt) for one, prompt in zip(results, asked, strict=True)]
    for one, prompt in zip(results, asked, strict=True):
        assert (one["verdict"] == "match") == (one["similarity"] >= one["threshold"])
        if one["caption"] == prompt:
            assert one["verdict"] == "match"
    at_rest(seeing, 5)


def test_events_come_stage_by_stage(seeing: Graph) -> None:
    body = json.dumps({"prompt": STAR, "seed": 1, "stream": True}).encode()
    request = urllib.request.Request(f"{seeing.url}/v1/validations", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        lines = reply.read().decode().splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [one["type"] for one in events] == ["validation.image", "validation.caption", "validation.similarity"]
    assert events[1]["caption"] == STAR
    assert events[2]["verdict"] == "match"


def test_several_of_one_prompt(seeing: Graph) -> None:
    found = validate(seeing, STAR, n=3, seed=40)["data"]
    assert [one["seed"] for one in found] == [40, 41, 42]
    assert len({one["b64_json"] for one in found}) == 3


def test_a_threshold_decides(seeing: Graph) -> None:
    (one,) = validate(seeing, STAR, seed=1, threshold=1.0)["data"]
    assert one["threshold"] == 1.0


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt": " "}, "prompt"), ({"threshold": 2}, "threshold"), ({"images": 1}, "images")]
)
def test_refusals(seeing: Graph, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        validate(seeing, **({"prompt": STAR} | fields))
    assert (caught.value.status, caught.value.error["param"]) == (400, param)


def test_models_and_health_name_every_stage(seeing: Graph) -> None:
    with urllib.request.urlopen(f"{seeing.url}/v1/models", timeout=30) as reply:
        names = {one["id"] for one in json.load(reply)["data"]}
    assert names == {"tiny-llava", "tiny-image", "tiny-t5"}
    with urllib.request.urlopen(f"{seeing.url}/health", timeout=30) as reply:
        stages = json.load(reply)["stages"]
    assert stages["ImageWorker"] == stages["EmbedWorker"] == 1
