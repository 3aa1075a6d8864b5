# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a picture to RGB pixels, the same ones that a plain ``vllm serve`` would see.

What vLLM does, and so what is done here: EXIF orientation is applied, transparency is laid on white, everything else is
Pillow's own conversion to RGB; of an animation the first frame counts. The bounds are ours: format by magic number,
size from the header before any pixel is decoded, and a limit on the ratio of the sides.
"""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO

from PIL import Image, ImageOps

from dynamo_epd.errors import ImageTooLarge, MediaError, UnsupportedMediaType

MAX_RATIO = 200
"""Longer side over shorter side. Processors that scale the shorter side to a fixed length make gigapixels of a strip;
Qwen's refuses above the same 200."""

MAX_SCANS = 100
"""Scans of one JPEG. Each is a pass over all of its pixels and may be 14 bytes long; encoders write some ten."""
MAX_SEGMENTS = 4096
"""Segments of one JPEG, those of its scans included: a colour profile may take 255 of them."""
MAX_READS = 20_000
"""Pieces that one file may be read in. Pillow takes a step in Python for each chunk of a PNG (32 MB in chunks of 8 KB
are 12 000 reads) and for each block of a GIF's comment, which it also copies whole at each."""

# What ends a stretch of a JPEG's coded data, and begins a segment (ISO/IEC 10918-1, B.1.1.2).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

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
    elif kind == "JPEG":
        _check_scans(data)
    try:
        with Image.open(_Pieces(data), formats=[kind]) as image:
            _check_size(image.size, max_pixels)
            image.load()
            _check_size(image.size, max_pixels)
            _upright(image)
            return _to_rgb(image)
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


class _Pieces(BytesIO):
    """A file that may be read in `MAX_READS` pieces."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise MediaError("the image is in too many pieces")
        return super().read(size)


def _check_scans(data: bytes) -> None:
    """Bounds what libjpeg would go through: it counts nothing, and only warns of a scan that comes again."""
    at = scans = 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":  # end of image: what follows is not decoded
            return
        at = found.end()
        if found[0] not in (b"\xff\xd8", b"\xff\x01"):  # these two have no length
            at += int.from_bytes(data[at : at + 2])
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise MediaError("the image has too many scans")
    raise MediaError("the image has too many segments")


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


def _upright(image: Image.Image) -> None:
    """Apply EXIF orientation; a broken EXIF block leaves the picture as it is stored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _BROKEN:
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")
