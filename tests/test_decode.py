# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from dynamo_epd.errors import ImageTooLarge, MediaError, UnsupportedMediaType
from dynamo_epd.images.decode import MAX_READS, MAX_SCANS, MAX_SEGMENTS, decode

PIXELS = 1_000_000


def picture(mode: str = "RGB", size: tuple[int, int] = (9, 5)) -> Image.Image:
    noise = random.Random(7)
    ground = Image.frombytes("RGBA", size, noise.randbytes(4 * size[0] * size[1]))
    return Image.new("I;16", size, 40_000) if mode == "I;16" else ground.convert(mode)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG whose header promises what its data need not hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def oriented(tag: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return stored(picture(), "PNG", exif=exif.tobytes())


SERVED = {
    "png RGB": stored(picture(), "PNG"),
    "png grey": stored(picture("L"), "PNG"),
    "png of one bit": stored(picture("1"), "PNG"),
    "png grey and alpha": stored(picture("LA"), "PNG"),
    "png RGBA": stored(picture("RGBA"), "PNG"),
    "png palette": stored(picture("P"), "PNG"),
    "png palette with transparency": stored(picture("P"), "PNG", transparency=3),
    "png RGB with a transparent colour": stored(picture(), "PNG", transparency=(1, 2, 3)),
    "png grey with a transparent level": stored(picture("L"), "PNG", transparency=7),
    "png of 16 bits": stored(picture("I;16"), "PNG"),
    "png 1x1": stored(picture(size=(1, 1)), "PNG"),
    "png animated": stored(picture(), "PNG", save_all=True, append_images=[picture("L").convert("RGB")]),
    "jpeg": stored(picture(), "JPEG"),
    "jpeg grey": stored(picture("L"), "JPEG"),
    "jpeg CMYK": stored(picture("CMYK"), "JPEG"),
    "jpeg progressive": stored(picture(), "JPEG", progressive=True),
    "webp lossy": stored(picture(), "WEBP"),
    "webp lossless with alpha": stored(picture("RGBA"), "WEBP", lossless=True),
    "webp animated": stored(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 5))]),
    "gif": stored(picture("P"), "GIF"),
    "gif with transparency": stored(picture("P"), "GIF", transparency=3),
    "gif animated": stored(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (9, 5))]),
    "ratio at the limit": stored(picture(size=(200, 1)), "PNG"),
} | {f"orientation {tag}": oriented(tag) for tag in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)}


@pytest.mark.parametrize("data", SERVED.values(), ids=SERVED)
def test_pixels_are_those_that_a_plain_vllm_sees(data: bytes) -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    reference = ImageMediaIO().load_bytes(data).media
    image = decode(data, PIXELS)
    assert image.mode == "RGB"
    assert image.size == reference.size
    assert image.tobytes() == reference.tobytes()


def test_orientation_turns_the_picture() -> None:
    assert decode(oriented(1), PIXELS).size == (9, 5)
    assert decode(oriented(6), PIXELS).size == (5, 9)


def test_transparency_lies_on_white() -> None:
    clear = stored(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG")
    assert decode(clear, PIXELS).getpixel((0, 0)) == (255, 255, 255)


OTHER_FORMATS = {
    "html": b"<!doctype html><img src=x>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "tiff": stored(picture(), "TIFF"),
    "bmp": stored(picture(), "BMP"),
    "ico": stored(picture(), "ICO"),
    "ppm": stored(picture(), "PPM"),
    "pdf": stored(picture(), "PDF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "jpeg 2000": stored(picture(), "JPEG2000"),
    "avif": b"\x00\x00\x00\x20ftypavif" + bytes(64),
    "riff that is not webp": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(64),
    "one byte": b"\x89",
}


@pytest.mark.parametrize("data", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_another_format_is_415(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        decode(data, PIXELS)
    assert caught.value.status == 415


def test_an_empty_picture_is_an_error() -> None:
    with pytest.raises(MediaError):
        decode(b"", PIXELS)


@pytest.mark.parametrize("name", ["png RGB", "jpeg", "jpeg progressive", "webp lossy", "webp animated", "gif animated"])
def test_a_truncated_picture_is_never_more_than_a_media_error(name: str) -> None:
    data = SERVED[name]
    for length in range(12, len(data)):
        try:
            decode(data[:length], PIXELS)
        except MediaError as error:
            assert error.status == 400
    with pytest.raises(MediaError):
        decode(data[: len(data) // 3], PIXELS)


@pytest.mark.parametrize("magic", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\x04\x00\x00\x00WEBP"])
def test_html_behind_the_magic_of_a_picture_is_an_error(magic: bytes) -> None:
    with pytest.raises(MediaError):
        decode(magic + b"<html><body>not a picture at all, but long enough</body></html>", PIXELS)


@pytest.mark.parametrize("name", sorted(SERVED))
def test_a_damaged_picture_is_decoded_or_refused(name: str) -> None:
    noise = random.Random(name)
    for _ in range(60):
        data = bytearray(SERVED[name])
        for _ in range(noise.randint(1, 6)):
            data[noise.randrange(12, len(data))] = noise.randrange(256)
        try:
            assert decode(bytes(data), PIXELS).mode == "RGB"
        except MediaError as error:
            assert error.status == 400


def webp(width: int, height: int, chunk: bytes) -> bytes:
    if chunk == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif chunk == b"VP8L":
        body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(8)
    else:
        body = b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(8)
    riff = b"WEBP" + chunk + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(riff)) + riff


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(stored(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png": png(13_377, 13_377),
    "png over Pillow's own bound": png(60_000, 60_000),
    "jpeg": jpeg_that_claims(16_000, 16_000),
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 16_000, 16_000, 0, 0, 0)
    + b"\x2c"
    + struct.pack("<HHHHB", 0, 0, 16_000, 16_000, 0)
    + b"\x02\x00;",
    "gif frame over its screen": b"GIF89a"
    + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    + b"\x2c"
    + struct.pack("<HHHHB", 0, 0, 9_000, 9_000, 0)
    + b"\x02\x00;",
    "webp canvas": webp(16_000, 16_000, b"VP8X"),
    "webp lossless": webp(16_000, 16_000, b"VP8L"),
    "webp lossy": webp(16_000, 16_000, b"VP8 "),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_too_many_pixels_are_refused_from_the_header(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoding(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoding)
    with pytest.raises(ImageTooLarge) as caught:
        decode(data, PIXELS)
    assert caught.value.code == "image_too_large" and len(data) < 100_000


def test_the_webp_sizes_read_here_are_those_of_libwebp() -> None:
    for width, height in ((1, 1), (9, 5), (300, 70)):
        for options in ({}, {"lossless": True}, {"lossless": True, "exif": b"Exif\x00\x00"}):
            data = stored(picture("RGBA", (width, height)), "WEBP", **options)
            assert decode(data, width * height).size == (width, height)
            with pytest.raises(ImageTooLarge):
                decode(data, width * height - 1)


def test_the_bound_itself_is_allowed() -> None:
    data = stored(picture(size=(10, 10)), "PNG")
    assert decode(data, 100).size == (10, 10)
    with pytest.raises(ImageTooLarge):
        decode(data, 99)


@pytest.mark.parametrize("size", [(201, 1), (1, 30_000)])
def test_a_strip_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(MediaError):
        decode(stored(Image.new("RGB", size), "PNG"), PIXELS)


def in_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan comes ``more`` times again; libjpeg warns, and passes over all pixels."""
    data = stored(picture(), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more + data[-2:]


def gif_with(blocks: bytes) -> bytes:
    """A GIF with more blocks before its frame."""
    data = SERVED["gif"]
    at = 13 + (3 << (data[10] & 7) + 1)  # the screen and its colours
    return data[:at] + blocks + data[at:]


IN_PIECES = {
    "jpeg of thousands of scans": in_scans(5000),
    "jpeg of one scan too many": in_scans(MAX_SCANS),
    "jpeg of many segments": b"\xff\xd8" + b"\xff\xfe\0\2" * MAX_SEGMENTS + SERVED["jpeg"][2:],
    "jpeg of many segments behind its scan": SERVED["jpeg"][:-2] + b"\xff\xfe\0\2" * MAX_SEGMENTS + b"\xff\xd9",
    "jpeg with junk before its first segment": b"\xff\xd8\xff\xfe\0\2" + bytes(MAX_READS) + SERVED["jpeg"][2:],
    "gif with a comment of single letters": gif_with(b"!\xfe" + b"\1x" * MAX_READS + b"\0"),
    "gif of comments": gif_with(b"!\xfe\1x\0" * MAX_READS),
    "png of empty chunks": SERVED["png RGB"][:33] + chunk(b"abCd", b"") * MAX_READS + SERVED["png RGB"][33:],
    "png of pixels in empty chunks": SERVED["png RGB"][:33] + chunk(b"IDAT", b"") * MAX_READS + SERVED["png RGB"][33:],
    "png of empty chunks behind": SERVED["png RGB"][:-12] + chunk(b"abCd", b"") * MAX_READS + SERVED["png RGB"][-12:],
}
"""Small files that cost seconds to minutes a megabyte where nothing counts what they are made of."""


@pytest.mark.parametrize("data", IN_PIECES.values(), ids=IN_PIECES)
def test_an_image_in_too_many_pieces_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="too many") as caught:
        decode(data, PIXELS)
    assert caught.value.status == 400


def test_scans_are_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def opening(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("PIL.Image.open", opening)
    with pytest.raises(MediaError, match="too many scans"):
        decode(in_scans(MAX_SCANS), PIXELS)


WHOLE = SERVED["jpeg progressive"]


@pytest.mark.parametrize(
    "data",
    [
        WHOLE[:2] + b"\xff\xfe\xff\xff" + b"\xff\xda" * 32_766 + b"." + WHOLE[2:],
        WHOLE + b"\xff\xda\0\2" * MAX_SEGMENTS,
        WHOLE[:2] + (b"\xff\xe2\xff\xff" + bytes(65_533)) * 255 + WHOLE[2:],
    ],
    ids=["what looks like scans in a comment", "a film behind it", "a colour profile of 16 MB"],
)
def test_what_only_looks_like_too_much_is_the_same_picture(data: bytes) -> None:
    assert decode(data, PIXELS).tobytes() == decode(WHOLE, PIXELS).tobytes()


def test_as_many_scans_as_are_allowed_are_taken() -> None:
    assert decode(in_scans(MAX_SCANS - WHOLE.count(b"\xff\xda")), PIXELS).size == (9, 5)


def test_a_png_of_32_mb_in_the_usual_chunks_is_taken() -> None:
    head, pixels = SERVED["png RGB"][:33], SERVED["png RGB"][33:]
    assert decode(head + chunk(b"abCd", bytes(8192)) * 4000 + pixels, PIXELS).size == (9, 5)
