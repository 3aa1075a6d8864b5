# SPDX-License-Identifier: Apache-2.0
"""``/v1/images/generations`` with OpenAI's client, on random weights, against plain diffusers.

The T5 is the trained one. Noise shows as well as pictures do whether every pixel is right.
"""

from __future__ import annotations

import base64
import io
import json
import random
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from models import world
from tests.pixels import pixels, same_picture
from tests.questions import Refused, post
from tests.serving import Graph, at_rest, serve, untrained

MODEL = "tiny-image"
STAR = "a large red star on a blue background"
CONFIG = """
EmbedWorker: {model: models/tiny/t5, served-model-name: tiny-t5}
ImageWorker:
  model: build/untrained/pixart
  served-model-name: tiny-image
  sizes: {default: 64x64}
  qualities: {low: 4}
  ServiceArgs: {workers: 2}
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    untrained("pixart")
    config = tmp_path_factory.mktemp("picturing") / "config.yaml"
    config.write_text(CONFIG)
    with serve("tests.toys.picturing:Frontend", str(config)) as served:
        yield served


@pytest.fixture(scope="module")
def client(graph: Graph) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def made(client: openai.OpenAI, prompt: str, seed: int, **fields: Any) -> np.ndarray:
    reply = client.images.generate(model=MODEL, prompt=prompt, extra_body={"seed": seed, **fields})
    assert reply.data
    return pixels(reply.data[0].b64_json)


@pytest.fixture(scope="module")
def plain() -> Any:
    pipeline = DiffusionPipeline.from_pretrained(untrained("pixart"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pixels_are_those_of_the_pipeline_with_its_own_t5(client: openai.OpenAI, plain: Any) -> None:
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        expected = plain(STAR, generator=generator, use_resolution_binning=False, clean_caption=False, output_type="np")
        difference = np.abs(made(client, STAR, seed) / 255 - expected.images[0])
        assert difference.max() < 0.02


def test_the_image_worker_holds_no_t5(graph: Graph) -> None:
    from dynamo_epd.diffusion.generator import Generator
    from dynamo_epd.diffusion.text_encoder import Row

    def ask(row: Row) -> Any:
        raise AssertionError("nothing is asked of it here")

    held = Generator(str(untrained("pixart")), ask=ask).parameters
    own = Generator(str(untrained("pixart"))).parameters
    assert held["text_encoder"] == 0 < own["text_encoder"]
    assert {name: count for name, count in held.items() if name != "text_encoder"} == {
        name: count for name, count in own.items() if name != "text_encoder"
    }
    assert graph.metrics("EmbedWorker").total("epd_stage_run_seconds_count") > 0, "it is asked instead"


def test_one_seed_is_one_picture_alone_and_among_others(client: openai.OpenAI, graph: Graph) -> None:
    alone = made(client, STAR, 7)
    found = world.scenes(random.Random(3), held_out=True, pairs=0.3)
    prompts = [STAR, *(next(found).caption for _ in range(11))]
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda index: made(client, prompts[index], 7 + index), range(12)))
    assert same_picture(crowd[0], alone)
    assert not np.array_equal(made(client, STAR, 8), alone)
    worked = [graph.metrics("ImageWorker", index).total("epd_images_generated_total") for index in range(2)]
    assert all(worked), "both workers were asked"


def test_several_pictures_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    reply = client.images.generate(model=MODEL, prompt=STAR, n=3, size="64x64", extra_body={"seed": 20})
    assert reply.data
    assert [one.model_extra["seed"] for one in reply.data if one.model_extra] == [20, 21, 22]
    assert same_picture(pixels(reply.data[1].b64_json), made(client, STAR, 21))
    assert reply.usage
    assert reply.usage.output_tokens == 3 * 64
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(client: openai.OpenAI, kind: Any) -> None:
    reply = client.images.generate(model=MODEL, prompt=STAR, output_format=kind, quality="low")
    assert reply.data
    assert Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json or ""))).format == kind.upper()


def test_a_stream_shows_the_picture_on_its_way(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(model=MODEL, prompt=STAR, stream=True, partial_images=2, extra_body={"seed": 7})
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    np.testing.assert_array_equal(pixels(events[-1].b64_json), made(client, STAR, 7))
    first, second, last = (pixels(event.b64_json).astype(float) for event in events)
    assert np.abs(second - last).mean() < np.abs(first - last).mean(), "it nears the picture"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "star " * 10_000}, "prompt"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "-1x5"}, "size"),
        ({"size": "9000x9000"}, "size"),
        ({"size": "61x67"}, "size"),
        ({"n": 11}, "n"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"num_inference_steps": 900}, "num_inference_steps"),
        ({"quality": "best"}, "quality"),
        ({"lora": "none"}, "lora"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "n": 2}, "n"),
        ({"response_format": "file"}, "response_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"nvext": {"steps": 3}}, "nvext.steps"),
        ({"prompt_embeds": [1]}, "prompt_embeds"),
    ],
)
def test_refusals(graph: Graph, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        post(f"{graph.url}/v1/images/generations", {"model": MODEL, "prompt": STAR} | fields)
    assert caught.value.status == 400
    assert caught.value.error["param"] == param


def test_an_unknown_model(graph: Graph) -> None:
    with pytest.raises(Refused) as caught:
        post(f"{graph.url}/v1/images/generations", {"model": "../x", "prompt": STAR})
    assert (caught.value.status, caught.value.error["code"]) == (404, "model_not_found")


def test_a_client_that_leaves_stops_the_denoising(graph: Graph) -> None:
    def steps() -> float:
        return sum(graph.metrics("ImageWorker", index).total("epd_denoise_step_seconds_count") for index in range(2))

    before = steps()
    body = json.dumps({"model": MODEL, "prompt": STAR, "num_inference_steps": 100, "stream": True, "partial_images": 3})
    request = urllib.request.Request(
        f"{graph.url}/v1/images/generations", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert b"partial_image" in reply.readline()
    at_rest(graph, 5)
    stopped = steps()
    time.sleep(1)
    assert steps() == stopped
    assert 25 <= stopped - before < 100
