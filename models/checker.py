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
"""Smaller than this part of the picture is no thing, but dirt."""
DIRT = 0.01
"""There may be so much of it."""
THING = 0.015
"""At least as large a part of the picture is every thing; what lies between the two is not of this world."""
GROUND = 0.7
"""Part of the picture's border that must have the ground's colour: things may come near it."""
FULL = 0.8
"""Quantile of a part's contrast that is taken for the whole, as edges have less."""
DEEP = 0.6
"""A thing's colour is looked for where it is at least so deep, as a part of the depth where it is deepest."""
SAME = 0.9
"""Part of a thing's pixels that must have its colour, or a mixture with the ground's."""
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
        thing = _thing(smooth, ground, mask) if area >= THING else None
        if thing is None or len(found) == 2:
            return None
        found.append(thing)
    if not found or dirt > DIRT or background in {thing.colour for _, thing in found}:
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

    A first look takes for a part's edge where a pixel has half of its neighbourhood's contrast, so that two things do
    not run together; a second where it has half of the part's own, so that a soft edge makes nothing fat.
    """
    near = cv2.dilate(contrast, NEAR)
    parts = []
    for rough in _connected((contrast > CONTRAST) & (contrast > near / 2)):
        full = np.quantile(contrast[rough], FULL)
        fine = rough & (contrast > full / 2)
        left_out = cv2.erode((rough & ~fine).astype(np.uint8), NEAR).astype(bool)
        parts += _connected(fine) + _connected(left_out)
    return parts


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return [labels == index for index in range(1, count)]


def _thing(smooth: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> tuple[float, Thing] | None:
    """Where from left to right a thing's centre is, and the thing."""
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
    level = np.median(smooth[depth >= DEEP * depth.max()], axis=0)
    colour = _colour(level)
    # A soft edge is a mixture of both colours; what is none belongs to another thing.
    share = np.clip((smooth[mask] - ground) @ (level - ground) / ((level - ground) ** 2).sum(), 0, 1)[:, None]
    mixed = ground + share * (level - ground)
    if colour is None or (np.linalg.norm(smooth[mask] - mixed, axis=1) < COLOUR_LIMIT).mean() < SAME:
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
