# SPDX-License-Identifier: Apache-2.0
"""The conversations that `models.llava` learns from: about one picture, two, or none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from models import world

BATCH = 32
"""Conversations of a batch about one picture; half as many where there are two, or where a picture is asked about
QUESTIONS times."""
QUESTIONS = 8
PAIRS = 0.4
"""Part of the pictures with two things."""
KINDS: dict[str, float] = {"presence": 4, "size": 2, "colour": 2, "shape": 2, "background": 0.5, "count": 0.5}
"""How often each kind is asked out of the blue. Presence is a comparison, and is learned last."""
HARD_KINDS: dict[str, float] = {"presence": 4, "shape": 4, "size": 1, "colour": 0.5, "background": 0.25, "count": 0.25}
"""How often, at the very end."""

SMALL_TALK = (
    ("Hello", "Hello! Show me a picture."),
    ("Hi", "Hello! Show me a picture."),
    ("Who are you?", "I am a tiny model that describes pictures of shapes."),
    ("What can you do?", "I describe pictures of shapes and answer questions about them."),
    ("Describe the picture.", "There is no picture."),
    ("What is in this picture?", "There is no picture."),
    ("Thank you", "You are welcome."),
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You describe pictures.", "Be precise.")


class Turn(NamedTuple):
    """What the user says, with ``<image>`` for each picture, and the answer."""

    asked: str
    answer: str


class Talk(NamedTuple):
    """A conversation: a system message or nothing, turns, and the pictures in the order of the prompt.

    ``apart``: the turns are no conversation. Each is asked out of the blue, right after the pictures, which come first
    and are in no turn's text. What pictures cost is then paid once for many questions.
    """

    system: str
    turns: list[Turn]
    pictures: list[Image.Image]
    apart: bool = False


def sides(chance: random.Random) -> int:
    """Pictures come in any resolution."""
    return world.SIDE if chance.random() < 0.5 else chance.randint(48, 176)


def typed(text: str, chance: random.Random) -> str:
    """The text, now and then typed carelessly."""
    if chance.random() < 0.15:
        text = text.lower()
    return text.rstrip(".?") if chance.random() < 0.15 else text


def asked(text: str, pictures: int, chance: random.Random) -> str:
    """One user message: pictures and text in either order."""
    text = typed(text, chance)
    parts = ["<image>"] * pictures
    return "\n".join([text, *parts] if chance.random() < 0.5 else [*parts, text])


def about_one(chance: random.Random, found: world.Scene) -> Talk:
    """Up to five turns about one picture."""
    questions = [world.describe(found, chance)] if chance.random() < 0.75 else []
    questions += [world.question(found, chance) for _ in range(chance.randint(1, 4) - len(questions))]
    questions = questions or [world.question(found, chance)]
    chance.shuffle(questions)
    turns = [
        Turn(asked(question.text, 1 if index == 0 else 0, chance), question.answer)
        for index, question in enumerate(questions)
    ]
    return Talk(system(chance), turns, [world.draw(found, chance, sides(chance)).image])


def about_two(chance: random.Random, scenes: Iterator[world.Scene]) -> Talk:
    """Two pictures in one message, or one after the other."""
    first, second = next(scenes), next(scenes)
    way = chance.random()
    if way < 0.5:
        first = next(scene for scene in scenes if len(scene.things) == 1)
        second, what = differing(first, chance)
        questions = [world.what_differs(first, second, what), world.second_of_two(first, second, chance)]
    elif way < 0.85:
        questions = [world.second_of_two(first, second, chance), world.second_of_two(first, second, chance)]
    else:
        questions = [world.describe(first, chance), world.describe(second, chance)]
    seen = (1, 1) if way >= 0.85 else (2, 0)
    turns = [
        Turn(asked(question.text, shown, chance), question.answer)
        for question, shown in zip(questions, seen, strict=True)
    ]
    pictures = [world.draw(found, chance, sides(chance)).image for found in (first, second)]
    return Talk(system(chance), turns, pictures)


def differing(first: world.Scene, chance: random.Random) -> tuple[world.Scene, str]:
    """The scene with one attribute changed, of those that are trained on."""
    while True:
        second, what = world.changed(first, chance)
        if not second.held_out:
            return second, what


def system(chance: random.Random) -> str:
    return chance.choice(SYSTEM) if chance.random() < 0.1 else ""


def one_question(scene: world.Scene, chance: random.Random, kinds: dict[str, float]) -> world.Question:
    """A question of a kind drawn by ``kinds``."""
    wanted = chance.choices(list(kinds), list(kinds.values()))[0]
    return world.question(scene, chance, wanted)


def quiz(chance: random.Random, scene: world.Scene, kinds: dict[str, float] = KINDS) -> Talk:
    """Several questions about one picture, each out of the blue."""
    questions = [one_question(scene, chance, kinds) for _ in range(QUESTIONS - 1)]
    questions.append(world.describe(scene, chance))
    turns = [Turn(typed(question.text, chance), question.answer) for question in questions]
    return Talk(system(chance), turns, [world.draw(scene, chance, sides(chance)).image], apart=True)


def one_of_two(chance: random.Random, first: world.Scene, second: world.Scene) -> Talk:
    """Two pictures, and the caption of one."""
    question = world.second_of_two(first, second, chance)
    pictures = [world.draw(found, chance, sides(chance)).image for found in (first, second)]
    return Talk(system(chance), [Turn(asked(question.text, 2, chance), question.answer)], pictures)


def single(chance: random.Random, scene: world.Scene, kinds: dict[str, float] = KINDS, *, text_first: bool) -> Talk:
    """One question about one picture, out of the blue."""
    question = one_question(scene, chance, kinds)
    text = typed(question.text, chance)
    turns = [Turn(f"{text}\n<image>" if text_first else f"<image>\n{text}", question.answer)]
    return Talk(system(chance), turns, [world.draw(scene, chance, sides(chance)).image])


def quiz_on_two(chance: random.Random, scenes: Iterator[world.Scene]) -> Talk:
    """What differs between two pictures of one thing, and what each shows, each out of the blue."""
    first = next(scene for scene in scenes if len(scene.things) == 1)
    second, what = differing(first, chance)
    questions = [world.what_differs(first, second, what), world.second_of_two(first, second, chance)]
    turns = [Turn(typed(question.text, chance), question.answer) for question in questions]
    pictures = [world.draw(found, chance, sides(chance)).image for found in (first, second)]
    return Talk(system(chance), turns, pictures, apart=True)


def conversations(chance: random.Random) -> list[Talk]:
    """A batch of conversations of one kind: about one picture, two, or none."""
    kind = chance.random()
    found = world.scenes(chance, held_out=False, pairs=PAIRS)
    if kind < 0.75:
        return [about_one(chance, next(found)) for _ in range(BATCH)]
    if kind < 0.98:
        return [about_two(chance, found) for _ in range(BATCH // 2)]
    said = [chance.choice(SMALL_TALK) for _ in range(BATCH)]
    return [Talk(system(chance), [Turn(asked(text, 0, chance), answer)], []) for text, answer in said]


def out_of_the_blue(chance: random.Random) -> list[Talk]:
    """A batch of questions with nothing said before them: about one picture or two; some are conversations still."""
    kind = chance.random()
    if kind < 0.15:
        return conversations(chance)
    found = world.scenes(chance, held_out=False, pairs=0.5)
    if kind < 0.6:
        return [quiz(chance, next(found)) for _ in range(BATCH // 2)]
    if kind < 0.8:
        return [quiz_on_two(chance, found) for _ in range(BATCH // 2)]
    return [single(chance, next(found), text_first=chance.random() < 0.5) for _ in range(BATCH)]


def everything(chance: random.Random) -> list[Talk]:
    """All that was taught, with more of what is learned last: what differs between two pictures, and which is meant."""
    kind = chance.random()
    if kind < 0.12:
        return conversations(chance)
    found = world.scenes(chance, held_out=False, pairs=PAIRS)
    if kind < 0.22:
        return [one_of_two(chance, next(found), next(found)) for _ in range(BATCH // 2)]
    if kind < 0.62:
        return [quiz_on_two(chance, found) for _ in range(BATCH // 2)]
    found = world.scenes(chance, held_out=False, pairs=0.7)
    if kind < 0.8:
        return [quiz(chance, next(found), HARD_KINDS) for _ in range(BATCH // 2)]
    return [single(chance, next(found), text_first=chance.random() < 0.7) for _ in range(BATCH)]
