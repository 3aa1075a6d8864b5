# SPDX-License-Identifier: Apache-2.0
"""Conversations become the tokens of the chat template, and a quiz's questions do not see each other."""

import random

import pytest
import torch
from torch.nn import functional

from models import llava, talks, world


@pytest.fixture(scope="module")
def made():
    return llava.processor()


@pytest.fixture(scope="module")
def examples(made):
    return llava.Examples(made.tokenizer, llava.Pixels(made.image_processor))


def draw(count):
    chance = random.Random(7)
    scenes = world.scenes(chance, held_out=False, pairs=0.5)
    return chance, [next(scenes) for _ in range(count)], scenes


def test_a_conversations_tokens_are_the_chat_templates(made, examples):
    chance, (scene,), _ = draw(1)
    talk = talks.about_one(chance, scene)._replace(system="Be precise.")
    messages = [{"role": "system", "content": talk.system}]
    for turn in talk.turns:
        messages += [{"role": "user", "content": turn.asked}, {"role": "assistant", "content": turn.answer}]
    text = made.apply_chat_template(messages)
    assert "".join(made.tokenizer.convert_ids_to_tokens(examples.row(talk).ids)) == "".join(
        made.tokenizer.tokenize(text.replace("<image>", "<image>" * llava.PATCHES**2))
    )


def test_questions_of_a_quiz_are_asked_out_of_the_blue(made, examples):
    """Each answer's likelihood is what it is with that question alone."""
    chance, drawn, scenes = draw(3)
    model = llava.model_of(made.tokenizer).eval()
    batch = [talks.quiz(chance, scene) for scene in drawn] + [talks.quiz_on_two(chance, scenes)]
    asked = sum(len(talk.turns) for talk in batch)
    together = losses(model, examples, batch)
    apart = [losses(model, examples, [talk._replace(turns=[turn])])[0] for talk in batch for turn in talk.turns]
    assert len(apart) == asked == 3 * talks.QUESTIONS + 2
    assert torch.allclose(torch.cat(together), torch.cat(apart), atol=1e-4)


def test_halves_are_the_batch_with_less_padding(made, examples):
    batch = talks.conversations(random.Random(5))
    model = llava.model_of(made.tokenizer).eval()
    halves = examples.halves(batch)
    ids = [half["input_ids"] for half in halves]
    assert [len(one) for one in ids] == [len(batch) // 2, len(batch) - len(batch) // 2]
    assert ids[0].shape[1] < ids[1].shape[1] == examples.batch(batch)["input_ids"].shape[1]
    assert sum(len(half.get("pixel_values", ())) for half in halves) == sum(len(talk.pictures) for talk in batch)
    by_length = sorted(batch, key=lambda talk: len(examples.row(talk).ids))
    apart = losses(model, examples, by_length[: len(batch) // 2]) + losses(
        model, examples, by_length[len(batch) // 2 :]
    )
    assert torch.allclose(torch.cat(apart), torch.cat(losses(model, examples, by_length)), atol=1e-4)
    assert examples.halves(batch[:1])[0].keys() == examples.batch(batch[:1]).keys()


@torch.inference_mode()
def losses(model, examples, batch):
    """The loss of every learned token, one tensor a conversation."""
    inputs = examples.batch(batch)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    every = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=llava.IGNORED)
    return [row[kept != llava.IGNORED] for row, kept in zip(every, labels, strict=True)]


def test_a_quiz_is_on_pictures_and_kinds_that_are_trained(examples):
    chance = random.Random(3)
    batches = [talks.out_of_the_blue(chance) for _ in range(12)]
    assert any(talk.apart for batch in batches for talk in batch)
    assert any(not talk.apart for batch in batches for talk in batch)
    for talk in (talk for batch in batches for talk in batch):
        row = examples.row(talk)
        assert row.ids.count(examples._image) == len(talk.pictures) * llava.PATCHES**2
        assert max(row.part) == (len(talk.turns) if talk.apart else 0)
