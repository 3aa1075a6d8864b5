# SPDX-License-Identifier: Apache-2.0
"""`models/tiny/t5`, loaded by plain transformers: held-out captions lie closer to their paraphrases than to others."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from models import world
from tests.toys.running import ROOT

DIRECTORY = ROOT / "models/tiny/t5"
TRIPLES = 100


@pytest.fixture(scope="module")
def model() -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(DIRECTORY).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@torch.inference_mode()
def vectors(model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    mask = batch.attention_mask[..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("pairs", [0.0, 1.0], ids=["one thing", "two things"])
def test_a_paraphrase_is_closer_than_a_text_with_one_attribute_changed(
    model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, pairs: float
) -> None:
    chance = random.Random(5)
    held_out = world.scenes(chance, held_out=True, pairs=pairs)
    scenes = [next(held_out) for _ in range(TRIPLES)]
    others = [world.changed(scene, chance)[0] for scene in scenes]
    wordings = [chance.getrandbits(32) for _ in scenes]
    captions, changed = (vectors(model, tokenizer, [scene.caption for scene in group]) for group in (scenes, others))
    same, differing = (
        vectors(
            model,
            tokenizer,
            [world.paraphrase(scene, random.Random(seed)) for scene, seed in zip(group, wordings, strict=True)],
        )
        for group in (scenes, others)
    )
    near = (captions * same).sum(-1)
    assert (near > (captions * changed).sum(-1)).sum() >= 0.99 * TRIPLES
    assert (near > (same * differing).sum(-1)).sum() >= 0.99 * TRIPLES


def test_every_text_has_tokens_and_comes_back(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("A large red star, on white.", 'Zoë said: "{x} < 7%"', "qqq"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.unk_token_id in tokenizer("漢字").input_ids
