# SPDX-License-Identifier: Apache-2.0
"""The graph that `make serve` starts sees: trained weights, held-out pictures, answers that must be right."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from models import world
from tests.questions import ask_all, data_url, post, user
from tests.serving import Graph
from tests.toys.running import ROOT

SEED = 20261122
DESCRIBE = "Describe the picture."


def scenes(count: int, pairs: float) -> list[world.Scene]:
    found = world.scenes(random.Random(SEED), held_out=True, pairs=pairs)
    return [next(found) for _ in range(count)]


def drawn(scene: world.Scene, seed: int) -> Image.Image:
    return world.draw(scene, random.Random(seed), side=120).image


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_url(file.getvalue())


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tiny-llava", "messages": list(messages), "max_tokens": 40, "temperature": 0}


def said(graph: Graph, *messages: dict[str, Any]) -> str:
    content: str = post(f"{graph.url}/v1/chat/completions", chat(*messages))["choices"][0]["message"]["content"]
    return content


def test_64_pictures_at_once_have_their_own_captions(seeing: Graph) -> None:
    asked = scenes(64, pairs=0.3)
    bodies = [chat(user(DESCRIBE, url(drawn(scene, index)))) for index, scene in enumerate(asked)]
    answers = ask_all(seeing.url, bodies, 64, logprobs=True, top_logprobs=2)
    right = sum(answer.text == scene.caption for answer, scene in zip(answers, asked, strict=True))
    assert right >= 58, [(answer.text, scene.caption) for answer, scene in zip(answers, asked, strict=True)]


def test_answers_are_those_of_plain_transformers(seeing: Graph) -> None:
    directory = ROOT / "models/tiny/llava"
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    for index, scene in enumerate(scenes(12, pairs=0.5)):
        picture = drawn(scene, index)
        question = world.question(scene, random.Random(index))
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said(seeing, user(question.text, url(picture))) == expected


def test_a_second_turn_knows_the_picture_of_the_first(seeing: Graph) -> None:
    right = 0
    for index, scene in enumerate(scenes(10, pairs=0.0)):
        first = user(DESCRIBE, url(drawn(scene, index)))
        answer = {"role": "assistant", "content": said(seeing, first)}
        right += said(seeing, first, answer, user("What colour is the background?")) == scene.background
    assert right >= 9


def test_two_pictures_keep_their_order(seeing: Graph) -> None:
    asked = scenes(20, pairs=0.0)
    right = 0
    for index, (first, second) in enumerate(zip(asked[::2], asked[1::2], strict=True)):
        pictures = url(drawn(first, index)), url(drawn(second, index + 100))
        right += said(seeing, user("Describe the first picture.", *pictures)) == first.caption
        right += said(seeing, user("Describe the second picture.", *pictures)) == second.caption
    assert right >= 17


@pytest.mark.parametrize("text", ["Hello", "Describe the picture."])
def test_without_a_picture_it_says_so(seeing: Graph, text: str) -> None:
    assert "picture" in said(seeing, {"role": "user", "content": text})
