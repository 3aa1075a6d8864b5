# SPDX-License-Identifier: Apache-2.0
"""The checker that is no model reads what was drawn, whoever drew it, and refuses what is no picture of the world."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from models import checker, renderer, world
from models.world import COLOURS, SHAPES, SIZES, Place, Scene, Thing


def right(count: int, side: int, blur: float, seed: int) -> float:
    """Part of drawn scenes that are read as what they are. One read as another thing than it is fails at once."""
    chance = random.Random(seed)
    drawn = world.scenes(chance, held_out=False, pairs=0.5)
    hits = 0
    for _ in range(count):
        scene = next(drawn)
        image = world.draw(scene, chance, side).image
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        seen = checker.read(image)
        assert seen in (scene, None), f"{scene.caption}, read as: {seen.caption if seen else None}"
        hits += seen == scene
    return hits / count


def test_drawn_scenes_are_read() -> None:
    assert right(500, 64, 0, 1) >= 0.998


def test_soft_pictures_are_read() -> None:
    """As a decoder of latents paints them."""
    assert right(500, 64, 0.6, 2) >= 0.995


@pytest.mark.parametrize("side", [48, 96, 160, 512])
def test_other_sides_are_read(side: int) -> None:
    assert right(150, side, 0, side) >= 0.97


def test_the_other_renderer_is_read() -> None:
    """The checker and the renderer share no line that draws, so each proves the other."""
    chance = random.Random(3)
    for held_out in (True, False):
        scenes = world.scenes(chance, held_out=held_out, pairs=0.5)
        for scene in (next(scenes) for _ in range(100)):
            assert checker.read(renderer.render(scene, chance)) == scene


def test_a_changed_attribute_is_seen() -> None:
    chance = random.Random(4)
    scenes = world.scenes(chance, held_out=False, pairs=0.3)
    for _ in range(200):
        before = next(scenes)
        after, what = world.changed(before, chance)
        seen = checker.read(world.draw(after, chance).image)
        assert seen is not None, after.caption
        assert seen != before, f"the changed {what} of {before.caption}"


def plain(*things: tuple[str, Place, tuple[int, int, int]], ground: str = "white") -> Image.Image:
    """Shapes where and in which colour the test wants them, 64 pixels wide."""
    image = Image.new("RGB", (256, 256), COLOURS[ground])
    for shape, place, colour in things:
        mask = Image.new("1", image.size)
        for polygon, filled in zip(world.outline(shape, place), (1, 0), strict=False):
            ImageDraw.Draw(mask).polygon([(x * 256, y * 256) for x, y in polygon], fill=filled)
        image.paste(colour, mask=mask)
    return image.resize((64, 64), Image.Resampling.BOX)


RED = COLOURS["red"]


def test_what_is_no_picture_of_the_world_is_refused() -> None:
    generator = np.random.default_rng(5)
    noise = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert checker.read(noise) is None
    assert checker.read(noise.filter(ImageFilter.GaussianBlur(4))) is None, "clouds"
    assert checker.read(plain()) is None, "an empty ground"
    assert checker.read(Image.new("RGB", (64, 64), (128, 128, 128))) is None, "no colour of the palette"
    assert checker.read(plain(("circle", Place(0.5, 0.5, 0.34), (128, 128, 128)))) is None, "a grey thing"
    assert checker.read(plain(("circle", Place(0.5, 0.5, 0.25), RED))) is None, "between small and large"
    assert checker.read(plain(("circle", Place(0.5, 0.5, 0.06), RED))) is None, "a dot"
    assert checker.read(plain(("circle", Place(0.1, 0.5, 0.34), RED))) is None, "a circle that is cut off"
    assert checker.read(plain(("star", Place(0.5, 0.5, 0.34), RED)).resize((64, 96))) is None, "not square"


def test_three_things_are_refused() -> None:
    places = [Place(0.2, 0.2, 0.17), Place(0.8, 0.3, 0.17), Place(0.5, 0.75, 0.17)]
    assert checker.read(plain(*(("star", place, RED) for place in places[:2]))) is not None
    assert checker.read(plain(*(("star", place, RED) for place in places))) is None


def test_two_things_above_each_other_have_no_order() -> None:
    things = [("star", Place(0.5, 0.25, 0.17), RED), ("ring", Place(0.51, 0.75, 0.17), RED)]
    assert checker.read(plain(*things)) is None


def test_a_thing_of_two_colours_is_refused() -> None:
    whole = plain(("square", Place(0.5, 0.5, 0.34), RED))
    assert checker.read(whole) is not None
    half = np.asarray(whole).copy()
    half[32:][half[32:, :, 1] < 140] = COLOURS["blue"]
    assert checker.read(Image.fromarray(half)) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_half_a_thing_is_refused(shape: str, size: str) -> None:
    whole = np.asarray(plain((shape, Place(0.5, 0.5, SIZES[size]), RED)))
    assert checker.read(Image.fromarray(whole)) == Scene((Thing(size, "red", shape),), "white")
    for part in (np.s_[:, 32:], np.s_[:, :32], np.s_[32:], np.s_[:32]):
        half = whole.copy()
        half[part] = COLOURS["white"]
        assert checker.read(Image.fromarray(half)) is None


@pytest.mark.parametrize("size", SIZES)
def test_a_shape_between_two_is_refused(size: str) -> None:
    """From circle to square, and from square to diamond."""

    def drawn(share: float, turn: float) -> Scene | None:
        image = Image.new("RGB", (256, 256), COLOURS["white"])
        corners = []
        for step in range(180):
            angle = math.pi * step / 90
            square = math.sqrt(0.5) / max(abs(math.cos(angle)), abs(math.sin(angle)))
            radius = SIZES[size] * (share * square + (1 - share))
            corners.append(
                (256 * (0.5 + radius * math.cos(angle + turn)), 256 * (0.5 + radius * math.sin(angle + turn)))
            )
        ImageDraw.Draw(image).polygon(corners, RED)
        return checker.read(image.resize((64, 64), Image.Resampling.BOX))

    assert drawn(0, 0) == Scene((Thing(size, "red", "circle"),), "white")
    assert drawn(1, 0) == Scene((Thing(size, "red", "square"),), "white")
    assert drawn(0.5, 0) is None
    assert drawn(0.6, 0) is None
    assert drawn(1, math.pi / 8) is None
    assert drawn(1, math.pi / 4) is None


@pytest.mark.parametrize("shape", ["triangle", "star", "cross"])
def test_a_tilted_thing_is_refused(shape: str) -> None:
    image = plain((shape, Place(0.5, 0.5, 0.34), RED))
    for angle in (25, 45):
        tilted = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=COLOURS["white"])
        assert checker.read(tilted) is None


def test_a_blob_is_refused() -> None:
    """What a bad model paints: things that run, and shapes with bites and bulges."""
    chance = random.Random(6)
    refused = 0
    for _ in range(200):
        image = Image.new("RGB", (256, 256), COLOURS["white"])
        bumps = [chance.uniform(0.55, 1) for _ in range(9)]
        corners = []
        for step in range(180):
            at, share = divmod(step / 20, 1)
            level = bumps[int(at)] * (1 - share) + bumps[(int(at) + 1) % 9] * share
            angle = math.pi * step / 90
            corners.append((256 * (0.5 + 0.34 * level * math.cos(angle)), 256 * (0.5 + 0.34 * level * math.sin(angle))))
        ImageDraw.Draw(image).polygon(corners, RED)
        refused += checker.read(image.resize((64, 64), Image.Resampling.BOX)) is None
    assert refused >= 198


def test_left_and_right_are_kept() -> None:
    left, right = Thing("small", "red", "star"), Thing("large", "blue", "ring")
    scene = Scene((left, right), "yellow")
    chance = random.Random(7)
    seen = checker.read(world.draw(scene, chance).image)
    assert seen == scene and seen != replace(scene, things=(right, left))
