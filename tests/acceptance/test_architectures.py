# SPDX-License-Identifier: Apache-2.0
"""Architectures beside LLaVA's and Qwen2.5-VL's, on toy checkpoints: three engines and an encoder, without services.

Handed on and split over two engines, an answer must be what one engine gives that got the pixels.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from models import untrained

PLACEHOLDERS = {
    "llama4": "<|image|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava_next": "<image>\n",
    "internvl": "<IMG_CONTEXT>\n",
}

TIE = 1e-3
"""Of the reference's two best tokens' log probabilities: rounding may then choose either."""


def pictures(turn: int) -> list[Image.Image]:
    """None to four, of several sizes and shapes."""
    random = numpy.random.default_rng(turn)
    found = []
    for index in range(turn % 5):
        blocks = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=numpy.uint8))
        found.append(blocks.resize((60 + 40 * index, 80 + 30 * (turn % 3)), Image.Resampling.NEAREST))
    return found


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_split_answers_are_whole_answers(family: str, tmp_path: Path) -> None:
    asyncio.run(_compare(family, tmp_path / family))


async def _compare(family: str, directory: Path) -> None:
    untrained.write(family, directory)
    args = {
        "model": str(directory),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 8},
    }
    from dynamo_epd.engine.environment import prepare

    prepare(args)
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from dynamo_epd.engine.encoder import load_encoder
    from dynamo_epd.engine.language import ImageInput, LanguageEngine, encode_sampling
    from dynamo_epd.families import FAMILIES

    with ExitStack() as stack:
        engines = []
        for role in ("both", "prefill", "decode"):
            engines.append(await LanguageEngine.start(args, role, 120))  # type: ignore[arg-type]
            stack.callback(engines[-1].close)
        whole, prefill, decode = engines
        encoder = load_encoder(args)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        (architecture,) = architectures_of(directory)
        grids = FAMILIES[architecture].decode_reads == "metadata"
        sampling = encode_sampling(SamplingParams(temperature=0, max_tokens=16, logprobs=2, ignore_eos=True))

        async def one(turn: int) -> None:
            images = pictures(turn)
            prompt = PLACEHOLDERS[family] * len(images) + f"What is it? {turn}"
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            items = [encoder.process(image) for image in images]
            names = [f"{turn}-{index}" for index in range(len(images))]
            handed = [
                ImageInput(name, tensor, encoder.metadata(item))
                for name, tensor, item in zip(names, encoder.embed(items) if items else [], items, strict=True)
            ]
            pixels = [ImageInput(f"pixels {name}", _pixels(image)) for name, image in zip(names, images, strict=True)]
            expected = await _answer(whole, f"whole {turn}", ids, pixels, sampling)
            filled = await prefill.prefill(f"split {turn}", ids, handed, cache_salt=None)
            if handed and grids:
                taken = ids, [ImageInput(image.uuid, metadata=image.metadata) for image in handed]
            else:
                taken = filled.token_ids, []
            salt = "-".join(names) or None
            got = await _answer(decode, f"split {turn}", *taken, sampling, salt, filled.kv)
            assert_equal_but_for_ties(expected, got)

        for turn in range(5):
            await one(turn)
        # At once: embeddings of different lengths, and of different requests, meet in one step.
        await asyncio.gather(*(one(turn) for turn in range(5, 15)))


def architectures_of(directory: Path) -> list[str]:
    import json

    return list(json.loads((directory / "config.json").read_text())["architectures"])


def _pixels(image: Image.Image) -> Any:
    import torch

    return torch.from_numpy(numpy.array(image))


async def _answer(
    engine: Any, request: str, ids: list[int], images: Any, sampling: str, salt: str | None = None, kv: Any = None
) -> list[Any]:
    """A (token, gap between the two best log probabilities) pair a position."""
    found = []
    async for delta in engine.generate(request, ids, images, sampling=sampling, cache_salt=salt, kv=kv):
        for token, position in zip(delta.token_ids, delta.logprobs, strict=True):
            best = sorted(position.logprobs, reverse=True)
            found.append((token, best[0] - best[1]))
    return found


def assert_equal_but_for_ties(expected: list[Any], got: list[Any]) -> None:
    assert len(expected) == len(got) == 16
    for (token, gap), (other, _) in zip(expected, got, strict=True):
        if token != other:
            # What follows a tie answers another text.
            assert gap < TIE
            return
