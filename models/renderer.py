# SPDX-License-Identifier: Apache-2.0
"""Another painter of the world, which no model has been trained on.

Shapes are what their formulas hold, counted at 16 points a pixel: no polygons. The light falls from one side, the
camera is noisy, the paint and the places are its own.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
from PIL import Image

from models.world import APART, COLOURS, SIZES, Place, Scene

FINE = 4
"""Points along a pixel's side."""
MARGIN = 0.02
GAP = 0.04
RADIUS_JITTER = 0.04
LIGHT = 0.04
"""How much brighter one end of the picture is than its middle, and how much darker the other."""
PAINT = 5.0
NOISE = 8.0
"""Deviations, in levels: of a colour from the palette's, of a pixel from its colour."""


def render(scene: Scene, chance: random.Random, side: int = 160) -> Image.Image:
    """The scene, ``side`` × ``side`` pixels RGB."""
    generator = np.random.default_rng(chance.getrandbits(64))
    points = (np.arange(side * FINE) + 0.5) / (side * FINE)

    def paint(colour: str) -> np.ndarray:
        return np.array(COLOURS[colour]) + generator.normal(0, PAINT, 3)

    pixels = np.broadcast_to(paint(scene.background), (side, side, 3))
    for thing, (x, y, radius) in zip(scene.things, _places(scene, chance), strict=True):
        inside = _inside(thing.shape, (points[None, :] - x) / radius, (points[:, None] - y) / radius)
        cover = inside.reshape(side, FINE, side, FINE).mean((1, 3))[:, :, None]
        pixels = pixels * (1 - cover) + paint(thing.colour) * cover
    turn = chance.uniform(0, 2 * math.pi)
    middle = (np.arange(side) + 0.5) / side - 0.5
    light = 2 * LIGHT * (middle[None, :] * math.cos(turn) + middle[:, None] * math.sin(turn))
    pixels = pixels * (1 + light[:, :, None]) + generator.normal(0, NOISE, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _places(scene: Scene, chance: random.Random) -> list[Place]:
    """Anywhere inside the picture, apart, from left to right."""
    while True:
        places = []
        for thing in scene.things:
            radius = SIZES[thing.size] * (1 + chance.gauss(0, RADIUS_JITTER / 2))
            slack = 0.5 - radius - MARGIN
            places.append(Place(0.5 + chance.uniform(-slack, slack), 0.5 + chance.uniform(-slack, slack), radius))
        if all(
            right.x - left.x > APART and math.dist(left[:2], right[:2]) > left.radius + right.radius + GAP
            for left, right in itertools.pairwise(places)
        ):
            return places


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points are inside the shape of radius 1 around the origin (y grows downwards)."""
    from_x, from_y, radius = np.abs(x), np.abs(y), np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    if shape == "square":
        return np.maximum(from_x, from_y) <= math.sqrt(0.5)
    if shape == "triangle":
        return (y <= 0.5) & (math.sqrt(0.75) * from_x - 0.5 * y <= 0.5)
    if shape == "cross":
        return (np.minimum(from_x, from_y) <= 0.3) & (np.maximum(from_x, from_y) <= 0.95)
    # A star: folded into a tenth, it ends at the line from the tip (0, 1) to the notch between two tips.
    tenth = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    notch_x, notch_y = 0.42 * math.sin(tenth), 0.42 * math.cos(tenth)
    along, up = radius * np.sin(angle), radius * np.cos(angle)
    return along * (1 - notch_y) + up * notch_x <= notch_x
