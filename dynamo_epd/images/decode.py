# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a picture to RGB pixels, the same ones that a plain ``vllm serve`` would see.

What vLLM does, and so what is done here: EXIF orientation is applied, transparency is laid on white, everything else is
Pillow's own conversion to RGB; of an animation the first frame counts. The bounds are ours: format by magic number,
size from the header before any pixel is decoded, and a limit on the ratio of the sides. What a file says beside its
pixels Pillow is not given to read (bare.py).
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image

from dynamo_epd.errors import ImageTooLarge, MediaError, UnsupportedMediaType
from dynamo_epd.images.bare import bare, orientation

MAX_RATIO = 200
"""Longer side over shorter side. Processors that scale the shorter side to a fixed length make gigapixels of a strip;
Qwen's refuses above the same 200."""

# What the EXIF orientations but the first ask for.
_TURNS: dict[float, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Everything that Pillow's parsers are known to raise on broken input; anything else is a defect and shows as one.
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    BufferError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture in ``data`` (png, jpeg, webp, or the first frame of a gif) as a loaded image of mode RGB.

    Takes up to tens of milliseconds a megapixel: call it in a thread. Raises `UnsupportedMediaType` (415) for another
    format, `ImageTooLarge` from the header alone, `MediaError` for what is empty, truncated or broken.
    """
    if not data:
        raise MediaError("the image is empty")
    kind = _kind(data)
    if kind == "WEBP":
        # libwebp allocates the canvas when the file is opened, so its header is read here first.
        _check_size(_webp_size(data), max_pixels)
    image: Image.Image
    try:
        file, said = bare(data, kind)
        with Image.open(BytesIO(file), formats=[kind]) as image:
            _check_size(image.size, max_pixels)
            image.load()
            _check_size(image.size, max_pixels)
            turn = _TURNS.get(orientation({**image.info, **said}))
            image = _to_rgb(image)
        # Nothing of what was said goes on to those who would read it again, and turn the picture again.
        image.info = {}
        return image if turn is None else image.transpose(turn)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"the image has more than {max_pixels} pixels") from error
    except _BROKEN as error:
        raise MediaError("the image is truncated or broken") from error


def _kind(data: bytes) -> str:
    """Pillow's name of the format, by magic number."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise UnsupportedMediaType("the image is not a png, jpeg, webp or gif")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError("the image has no pixels")
    if width * height > max_pixels:
        raise ImageTooLarge(f"the image has {width}x{height} pixels, more than {max_pixels}")
    if max(size) > MAX_RATIO * min(size):
        raise MediaError(f"one side of the image is more than {MAX_RATIO} times the other")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from the first chunk (WebP container specification; RFC 6386 9.1 and the lossless bitstream)."""
    if len(data) < 30:
        raise MediaError("the image is truncated or broken")
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise MediaError("the image is truncated or broken")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")
