# SPDX-License-Identifier: Apache-2.0
"""Pictures as tests compare them where denoise steps may have been shared.

A row of a batch is rounded in another way than a row alone, so one seed is the same picture up to rounding. Where steps
are not shared (`max-batch: 1`) it is the same to the bit: tests/test_generator.py compares with plain diffusers.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

LEVELS = 1
"""Of 255, by which two makings of one seed may differ."""


def pixels(file: bytes | str | None) -> np.ndarray:
    """uint8 (height, width, 3) of a file, or of its base64."""
    data = base64.b64decode(file or "") if not isinstance(file, bytes) else file
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def same_picture(first: np.ndarray, second: np.ndarray) -> bool:
    """Both uint8 (height, width, 3)."""
    return first.shape == second.shape and int(np.abs(first.astype(int) - second).max()) <= LEVELS
