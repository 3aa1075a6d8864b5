# SPDX-License-Identifier: Apache-2.0
"""The world of the tiny models: coloured shapes on a plain ground, drawn and worded.

All three models are trained and judged on it. A tenth of all combinations of a thing's size, colour and shape with a
background (`HELD_OUT`) is never trained on, alone or beside another thing; `scenes` gives either kind.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Pixels of a side of a picture, where nothing else is said."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SIZES = {"small": 0.17, "large": 0.34}
"""Radius of the circle around a thing, as a part of the picture's side."""
RADIUS_JITTER = 0.06
GAP = 0.03
"""Between two things, as a part of the side."""
APART = 0.12
"""Two things are named from left to right, and their centres are never closer than this from side to side."""
COLOUR_JITTER = 8
NOISE = 5.0

HOLD_OUT_SEED = 20261121


def a(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Thing:
    """One shape."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two from left to right, on a background of another colour than theirs. Two are never both large:
    there is no room for that."""

    things: tuple[Thing, ...]
    background: str

    @property
    def caption(self) -> str:
        return f"{' and '.join(f'a {thing}' for thing in self.things)} on {a(self.background)} background"

    @property
    def held_out(self) -> bool:
        return any((thing, self.background) in HELD_OUT for thing in self.things)


class Place(NamedTuple):
    """Where a thing is, in parts of the side."""

    x: float
    y: float
    radius: float


COMBINATIONS = tuple(
    (Thing(size, colour, shape), background)
    for size, colour, shape, background in itertools.product(SIZES, COLOURS, SHAPES, COLOURS)
    if colour != background
)
HELD_OUT = frozenset(random.Random(HOLD_OUT_SEED).sample(COMBINATIONS, len(COMBINATIONS) // 10))


def scenes(chance: random.Random, *, held_out: bool, pairs: float) -> Iterator[Scene]:
    """Endless scenes of the wanted kind. ``pairs``: the part of them with two things."""
    kept = [(thing, ground) for thing, ground in COMBINATIONS if ((thing, ground) in HELD_OUT) == held_out]
    trained = [(thing, ground) for thing, ground in COMBINATIONS if (thing, ground) not in HELD_OUT]
    beside = {ground: [thing for thing, other in trained if other == ground] for ground in COLOURS}
    while True:
        thing, ground = chance.choice(kept)
        if chance.random() >= pairs:
            yield Scene((thing,), ground)
            continue
        # Half of the pairs are of one large and one small thing: drawn alike, they would be two thirds.
        other = chance.choice(beside[ground])
        while other.size == thing.size == "large":
            other = chance.choice(beside[ground])
        things = (thing, other) if chance.random() < 0.5 else (other, thing)
        yield Scene(things, ground)


def changed(scene: Scene, chance: random.Random) -> tuple[Scene, str]:
    """The scene with one attribute changed, and which: size, colour, shape or background."""
    while True:
        what = chance.choice(("size", "colour", "shape", "background"))
        if what == "background":
            used = {scene.background, *(thing.colour for thing in scene.things)}
            return replace(scene, background=chance.choice([name for name in COLOURS if name not in used])), what
        index = chance.randrange(len(scene.things))
        thing = scene.things[index]
        if what == "size":
            thing = replace(thing, size=chance.choice([name for name in SIZES if name != thing.size]))
        elif what == "colour":
            free = [name for name in COLOURS if name not in (thing.colour, scene.background)]
            thing = replace(thing, colour=chance.choice(free))
        else:
            thing = replace(thing, shape=chance.choice([name for name in SHAPES if name != thing.shape]))
        things = tuple(thing if at == index else other for at, other in enumerate(scene.things))
        if sum(thing.size == "large" for thing in things) < 2:
            return Scene(things, scene.background), what


def places(scene: Scene, chance: random.Random, spread: float = 1.0) -> list[Place]:
    """Where the things of a scene are: by chance, inside the picture, apart, from left to right.

    ``spread``: how far, from 0 to 1, they stray from their usual size and from where a lone thing is (the middle) and
    two are (two corners).
    """
    sizes = [SIZES[thing.size] for thing in scene.things]
    draw = chance.random  # and not `uniform`, which takes three times as long: some pairs are placed 300 times
    while True:
        found = []
        for index, size in enumerate(sizes):
            radius = size * (1 + spread * (2 * RADIUS_JITTER * draw() - RADIUS_JITTER))
            slack = 0.5 - radius - 0.01
            home = 0.5 + slack * (2 * index - 1) if len(sizes) == 2 else 0.5
            if len(sizes) == 1:
                slack = min(slack, 0.2)
            x = 0.5 + (2 * slack * draw() - slack)
            y = 0.5 + (2 * slack * draw() - slack)
            found.append((home + spread * (x - home), home + spread * (y - home), radius))
        if len(found) == 1 or _apart(*found):
            return [Place(*one) for one in found]


def _apart(left: tuple[float, float, float], right: tuple[float, float, float]) -> bool:
    (x, y, radius), (other_x, other_y, other_radius) = left, right
    return other_x - x >= APART and math.hypot(other_x - x, other_y - y) >= radius + other_radius + GAP


def outline(shape: str, place: Place) -> list[list[tuple[float, float]]]:
    """The shape's polygons in parts of the side: the first is filled, a second is cut out of it."""
    x, y, r = place

    def around(radii: list[float], turn: float) -> list[tuple[float, float]]:
        step = 2 * math.pi / len(radii)
        return [
            (x + radius * math.sin(turn + index * step), y - radius * math.cos(turn + index * step))
            for index, radius in enumerate(radii)
        ]

    if shape == "circle":
        return [around([r] * 48, 0)]
    if shape == "ring":
        return [around([r] * 48, 0), around([0.55 * r] * 48, 0)]
    if shape == "square":
        return [around([r] * 4, math.pi / 4)]
    if shape == "triangle":
        return [around([r] * 3, 0)]
    if shape == "star":
        return [around([r, 0.42 * r] * 5, 0)]
    arm = 0.3 * r  # a cross: a plus sign with arms 0.6 r wide
    tip = 0.95 * r
    corner = [(arm, -tip), (arm, -arm), (tip, -arm)]
    turned = [corner]
    for _ in range(3):
        turned.append([(-dy, dx) for dx, dy in turned[-1]])
    return [[(x + dx, y + dy) for part in turned for dx, dy in part]]


class Picture(NamedTuple):
    """A drawn scene.

    image: RGB, ``side`` × ``side`` pixels.
    owner: uint8 (side, side): 0 where the background is, 1 and 2 where the first and the second thing is.
    """

    image: Image.Image
    owner: np.ndarray


def draw(scene: Scene, chance: random.Random, side: int = SIDE, spread: float = 1.0) -> Picture:
    """Draw a scene with jitter of place (``spread``: see `places`), size and colour and with noise in the pixels."""
    generator = np.random.default_rng(chance.getrandbits(64))

    def paint(colour: str) -> tuple[int, int, int]:
        jitter = generator.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
        red, green, blue = (int(level) for level in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))
        return red, green, blue

    image = Image.new("RGB", (side, side), paint(scene.background))
    owner = Image.new("L", (side, side), 0)
    for index, (thing, place) in enumerate(zip(scene.things, places(scene, chance, spread), strict=True), start=1):
        mask = Image.new("1", (side, side), 0)
        for polygon, filled in zip(outline(thing.shape, place), (1, 0), strict=False):
            ImageDraw.Draw(mask).polygon([(px * side - 0.5, py * side - 0.5) for px, py in polygon], fill=filled)
        image.paste(paint(thing.colour), mask=mask)
        owner.paste(index, mask=mask)
    noise = generator.standard_normal((side, side, 3), dtype=np.float32) * NOISE
    pixels = np.clip(np.asarray(image, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    return Picture(Image.fromarray(pixels), np.asarray(owner))


PARAPHRASES = (
    "a picture of {things} on {ground}",
    "on {a_ground} background there is {things}",
    "{things}, background {ground}",
    "{a_ground} background with {things}",
    "an image showing {things} in front of {a_ground} background",
    "{ground} background, {things}",
)
THINGS = ("a {size} {colour} {shape}", "{a_colour} {shape} that is {size}", "one {size} {shape} in {colour}")
SYNONYMS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}


def reordered(scene: Scene, chance: random.Random) -> Scene:
    """The scene, now and then with its two things named the other way round: it means the same."""
    if len(scene.things) == 2 and chance.random() < 0.3:
        return replace(scene, things=scene.things[::-1])
    return scene


def paraphrase(scene: Scene, chance: random.Random) -> str:
    """The caption's meaning in other words; two things may change places."""
    return worded(reordered(scene, chance), chance)


def worded(scene: Scene, chance: random.Random) -> str:
    """The caption in other words, its things in the same order."""
    wording = chance.choice(THINGS)
    worded = [
        wording.format(
            size=chance.choice(SYNONYMS[thing.size]), colour=thing.colour, a_colour=a(thing.colour), shape=thing.shape
        )
        for thing in scene.things
    ]
    return chance.choice(PARAPHRASES).format(
        things=chance.choice((" and ", " and ", " next to ")).join(worded),
        ground=scene.background,
        a_ground=a(scene.background),
    )


class Question(NamedTuple):
    """What is asked about one picture or two, and the only right answer. ``about``: the kind, for the figures."""

    about: str
    text: str
    answer: str


DESCRIBE = (
    "Describe the picture.",
    "Describe the picture.",
    "What is in this picture?",
    "What do you see?",
    "Describe this image.",
    "What does the image show?",
    "Write a caption for this picture.",
)
NUMBERS = ("none", "one", "two")


def describe(scene: Scene, chance: random.Random) -> Question:
    """Asks for the caption."""
    return Question("caption", chance.choice(DESCRIBE), scene.caption)


def question(scene: Scene, chance: random.Random, about: str = "") -> Question:
    """One question about the scene that has one right answer. ``about``: its kind, else any."""
    about = about or chance.choice(("colour", "shape", "background", "size", "count", "presence"))
    thing = chance.choice(scene.things)
    alone = len(scene.things) == 1
    if about == "background":
        text = chance.choice(
            ("What colour is the background?", "Which colour is the background?", "What is the background?")
        )
        return Question(about, text, scene.background)
    if about == "count":
        text = chance.choice(
            ("How many shapes are there?", "How many shapes do you see?", "How many things are in the picture?")
        )
        return Question(about, text, NUMBERS[len(scene.things)])
    if about == "presence":
        return _presence(scene, chance)
    names = _names(scene, thing, asked=about)
    if names is None:
        return describe(scene, chance)
    if alone and chance.random() < 0.4:
        names = ["shape" if about != "shape" else "thing"]
    name = chance.choice(names)
    if about == "colour":
        phrasings = (f"What colour is the {name}?", f"Which colour does the {name} have?", f"What color is the {name}?")
        return Question(about, chance.choice(phrasings), thing.colour)
    if about == "size":
        phrasings = (f"How big is the {name}?", f"What size is the {name}?", f"How large is the {name}?")
        return Question(about, chance.choice(phrasings), thing.size)
    if alone and name == "thing":
        phrasings = ("Which shape is it?", "What shape do you see?", "What shape is it?")
    else:
        phrasings = (f"Which shape is the {name}?", f"What shape is the {name}?", f"What is the {name}?")
    return Question(about, chance.choice(phrasings), thing.shape)


def _names(scene: Scene, thing: Thing, asked: str) -> list[str] | None:
    """Ways to point at ``thing`` that leave out what is asked and fit no other thing of the scene."""
    ways: dict[str, tuple[str, ...]]
    if asked == "shape":
        ways = {f"{thing.colour} one": ("colour",), f"{thing.size} one": ("size",)}
    elif asked == "colour":
        ways = {thing.shape: ("shape",), f"{thing.size} {thing.shape}": ("size", "shape")}
    else:
        ways = {thing.shape: ("shape",), f"{thing.colour} {thing.shape}": ("colour", "shape")}
    others = [other for other in scene.things if other is not thing]
    fitting = [
        name
        for name, attributes in ways.items()
        if all(any(getattr(other, one) != getattr(thing, one) for one in attributes) for other in others)
    ]
    return fitting or None


def _presence(scene: Scene, chance: random.Random) -> Question:
    thing = chance.choice(scene.things)
    kind = chance.choice(("shape", "colour and shape", "whole"))
    wanted = thing
    if chance.random() < 0.5:
        attributes = {
            "shape": ("shape",),
            "colour and shape": ("colour", "shape"),
            "whole": ("size", "colour", "shape"),
        }
        one = chance.choice(attributes[kind])
        values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}[one]
        wanted = replace(thing, **{one: chance.choice([value for value in values if value != getattr(thing, one)])})

    def fits(other: Thing) -> bool:
        return other.shape == wanted.shape and (
            kind == "shape" or (other.colour == wanted.colour and (kind != "whole" or other.size == wanted.size))
        )

    name = {"shape": wanted.shape, "colour and shape": f"{wanted.colour} {wanted.shape}", "whole": str(wanted)}[kind]
    text = chance.choice((f"Is there {a(name)}?", f"Do you see {a(name)}?"))
    return Question("presence", text, "yes" if any(fits(other) for other in scene.things) else "no")


def second_of_two(first: Scene, second: Scene, chance: random.Random) -> Question:
    """Asks for the caption of one of two pictures."""
    text, scene = chance.choice((("Describe the first picture.", first), ("Describe the second picture.", second)))
    return Question("one of two", text, scene.caption)


def what_differs(first: Scene, second: Scene, what: str) -> Question:
    """Two scenes of one thing that differ in the attribute ``what``."""
    if what == "background":
        before, after = first.background, second.background
    else:
        before, after = getattr(first.things[0], what), getattr(second.things[0], what)
    return Question("difference", "What differs?", f"the {what}: {before} and {after}")
