# SPDX-License-Identifier: Apache-2.0
"""Reads a picture of the world without a model: colours by the palette, shapes by the overlap with their outlines.

It judges pictures that a model painted, so it never guesses: what is not clearly one scene is None.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from models.world import COLOURS, SHAPES, SIZES, Place, Scene, Thing, outline

SIDE = 192
"""Pictures are read at this side, so that an edge is found to a third of a 64-pixel picture's pixel."""
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
COLOUR_LIMIT = 40.0
"""How far a colour may be from the palette's, in levels: yellow and orange, the nearest two, are 71 apart."""
SMOOTH = 1.0
"""Against noise: the deviation of a Gaussian in pixels of `SIDE`."""
NEAR = np.ones((9, 9))
"""A neighbourhood: wider than half of a soft edge, narrower than the gap between two things."""
BORDER = 6
"""Width of the frame that is taken for ground."""
CONTRAST = 32.0
"""What is nearer to the ground's colour than this is ground."""
SPECK = 0.004
"""Smaller than this part of the picture is no thing, but dirt, of which there may be as much."""
THING = 0.015
"""At least as large a part of the picture is every thing; what lies between the two is not of this world."""
GROUND = 0.7
"""Part of the picture's border that must have the ground's colour: things may come near it."""
SAME = 0.9
"""Part of a thing's inner pixels that must have its colour."""
SIZE_LIMIT = 1.25
"""How many times larger or smaller than its size says a thing may be."""
EDGE = 0.01
"""How far from its outline a thing's edge may lie on average, in parts of the side..."""
FIT = 0.76
"""...and the intersection over union that it must have with it however much edge it has..."""
LEAD = 0.04
"""...and by how much more than with any other shape's."""
APART = 0.04
"""Two things whose centres are nearer than this from side to side have no order."""


def read(image: Image.Image) -> Scene | None:
    """The scene that a square picture shows, or None where it does not clearly show one."""
    if image.width != image.height:
        return None
    sharp = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    smooth = cv2.GaussianBlur(sharp, (0, 0), SMOOTH)

    edge = np.ones((SIDE, SIDE), dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(smooth[edge], axis=0)
    background = _colour(ground)
    contrast = np.linalg.norm(smooth - ground, axis=2)
    if background is None or (contrast[edge] < CONTRAST).mean() < GROUND:
        return None

    found: list[tuple[float, Thing]] = []
    dirt = 0.0
    for mask in _parts(contrast):
        area = mask.mean()
        if area < SPECK:
            dirt += area
            continue
        thing = _thing(smooth, mask) if area >= THING else None
        if thing is None or len(found) == 2:
            return None
        found.append(thing)
    if not found or dirt > SPECK or background in {thing.colour for _, thing in found}:
        return None
    found.sort(key=lambda one: one[0])
    if len(found) == 2 and found[1][0] - found[0][0] < APART:
        return None
    return Scene(tuple(thing for _, thing in found), background)


def _colour(level: np.ndarray) -> str | None:
    """The palette's name of a colour."""
    far = np.linalg.norm(PALETTE - level, axis=1)
    best = int(far.argmin())
    return list(COLOURS)[best] if far[best] <= COLOUR_LIMIT else None


def _parts(contrast: np.ndarray) -> list[np.ndarray]:
    """Masks of what stands out from the ground, each connected. ``contrast``: every pixel's distance from the ground.

    An edge lies where a pixel has half of its neighbourhood's contrast: a soft one is neither fat nor a bridge.
    """
    near = cv2.dilate(contrast, NEAR)
    inside = ((contrast > CONTRAST) & (contrast > near / 2)).astype(np.uint8)
    count, labels = cv2.connectedComponents(inside, connectivity=4)
    return [labels == index for index in range(1, count)]


def _thing(smooth: np.ndarray, mask: np.ndarray) -> tuple[float, Thing] | None:
    """Where from left to right a thing's centre is, and the thing."""
    core = cv2.erode(mask.astype(np.uint8), NEAR).astype(bool)
    if not core.any():
        return None
    level = np.median(smooth[core], axis=0)
    colour = _colour(level)
    if colour is None or (np.linalg.norm(smooth[core] - level, axis=1) < COLOUR_LIMIT).mean() < SAME:
        return None
    fits = sorted((_fit(mask, shape) for shape in SHAPES), reverse=True)
    best, second = fits[:2]
    area, length = _measures(best.shape)
    if best.overlap < max(FIT, 1 - EDGE * length / area / best.place.radius) or best.overlap - second.overlap < LEAD:
        return None
    for size, radius in SIZES.items():
        if 1 / SIZE_LIMIT < best.place.radius / radius < SIZE_LIMIT:
            return best.place.x, Thing(size, colour, best.shape)
    return None


class Fit(NamedTuple):
    """How well an outline fits a mask: intersection over union."""

    overlap: float
    shape: str
    place: Place


def _fit(mask: np.ndarray, shape: str) -> Fit:
    """The shape's outline with the mask's area and centroid, which is the centre of all six."""
    rows, columns = np.nonzero(mask)
    radius = math.sqrt(len(rows) / _measures(shape)[0]) / SIDE
    place = Place((columns.mean() + 0.5) / SIDE, (rows.mean() + 0.5) / SIDE, radius)
    drawn = Image.new("1", (SIDE, SIDE), 0)
    for polygon, filled in zip(outline(shape, place), (1, 0), strict=False):
        ImageDraw.Draw(drawn).polygon([(x * SIDE - 0.5, y * SIDE - 0.5) for x, y in polygon], fill=filled)
    wanted = np.asarray(drawn)
    return Fit(float((mask & wanted).sum() / (mask | wanted).sum()), shape, place)


@functools.cache
def _measures(shape: str) -> tuple[float, float]:
    """Area and length of edge of the shape with radius 1."""
    area, length = 0.0, 0.0
    for polygon, sign in zip(outline(shape, Place(0, 0, 1)), (1, -1), strict=False):
        for (x, y), (next_x, next_y) in itertools.pairwise([*polygon, polygon[0]]):
            area += sign * (x * next_y - y * next_x) / 2
            length += math.hypot(next_x - x, next_y - y)
    return area, length
