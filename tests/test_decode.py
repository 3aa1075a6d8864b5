# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dynamo_epd.errors import ImageTooLarge, MediaError, UnsupportedMediaType
from dynamo_epd.images.bare import MAX_PIECES, MAX_SCANS, MAX_SEGMENTS, MAX_TABLES, bare, orientation
from dynamo_epd.images.decode import decode
from tests.hardening.files import ABSURD, segment

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


def marked_as_rgb() -> bytes:
    """A JPEG whose components have the numbers of YCbCr: what they are its Adobe segment alone says."""
    data = bytearray(stored(picture(), "JPEG", keep_rgb=True))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for index in range(3):
        data[frame + 10 + 3 * index] = data[scan + 5 + 2 * index] = index + 1
    return bytes(data)


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
    "png animated, with a picture that is no frame": stored(
        picture(), "PNG", save_all=True, default_image=True, append_images=[Image.new("RGB", (9, 5))] * 2
    ),
    "png animated, each frame cleared": stored(
        picture("RGBA"), "PNG", save_all=True, disposal=1, append_images=[Image.new("RGBA", (9, 5))]
    ),
    "jpeg": stored(picture(), "JPEG"),
    "jpeg grey": stored(picture("L"), "JPEG"),
    "jpeg CMYK": stored(picture("CMYK"), "JPEG"),
    "jpeg progressive": stored(picture(), "JPEG", progressive=True),
    "jpeg that Adobe alone marks as RGB": marked_as_rgb(),
    "jpeg of several pictures": stored(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 5))]),
    "webp lossy": stored(picture(), "WEBP"),
    "webp lossless with alpha": stored(picture("RGBA"), "WEBP", lossless=True),
    "webp animated": stored(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 5))]),
    "gif": stored(picture("P"), "GIF"),
    "gif with transparency": stored(picture("P"), "GIF", transparency=3),
    "gif animated": stored(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (9, 5))]),
    "gif animated, each frame cleared": stored(
        picture("P"), "GIF", save_all=True, disposal=2, transparency=3, append_images=[Image.new("P", (9, 5))]
    ),
    "gif with a comment": stored(picture("P"), "GIF", comment=b"x" * 999),
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


def tiff(order: str, turn: int, *, kind: int = 3, values: int = 1, maker: int = 0, further: bytes = b"") -> bytes:
    """A camera's EXIF block: its maker (at that offset, or where it is), the orientation, a resolution, a maker's note
    and a thumbnail; then the entries of ``further``. ``order`` is "II" or "MM"."""
    end = "<" if order == "II" else ">"
    entry = struct.Struct(end + "HHII")
    count = 5 + len(further) // 12
    at = 8 + 2 + 12 * count + 4
    note = struct.pack(end + "H", 1) + entry.pack(0x927C, 7, 99, at + 24 + 18) + bytes(4) + b"n" * 99
    thumbnail = stored(picture(size=(4, 4)), "JPEG")
    second = at + 24 + len(note)
    value = struct.unpack(end + "I", struct.pack(end + ("H2x" if kind in (3, 8) else "I"), turn))[0]
    first = (
        entry.pack(0x010F, 2, 16, maker or at)
        + entry.pack(0x0112, kind, values, value)
        + entry.pack(0x011A, 5, 1, at + 16)
        + entry.pack(0x0128, 3, 1, 2 if order == "II" else 2 << 16)
        + entry.pack(0x8769, 4, 1, at + 24)
        + further
    )
    return (
        order.encode()
        + struct.pack(end + "HI", 42, 8)
        + struct.pack(end + "H", count)
        + first
        + struct.pack(end + "I", second)
        + b"The maker of it\0"
        + struct.pack(end + "II", 72, 1)
        + note
        + struct.pack(end + "H", 2)
        + entry.pack(0x0201, 4, 1, second + 30)
        + entry.pack(0x0202, 4, 1, len(thumbnail))
        + bytes(4)
        + thumbnail
    )


def jpeg_with(*segments: bytes, at: int = 2) -> bytes:
    data = SERVED["jpeg"]
    return data[:at] + b"".join(segments) + data[at:]


def png_with(added: bytes, at: int = 33) -> bytes:
    data = SERVED["png RGB"]
    return data[:at] + added + data[at:]


def described(block: bytes, packed: bool = False) -> bytes:
    """As ImageMagick writes EXIF into a PNG."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=packed)
    return stored(picture(), "PNG", pnginfo=text)


EXIF = b"Exif\0\0"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
IN_XMP = b"http://ns.adobe.com/xap/1.0/\0" + XMP
PROFILE = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(500)) + segment(0xED, b"Photoshop 3.0\0" + bytes(50))

CARRIERS = {
    "jpeg": lambda block: jpeg_with(segment(0xE1, EXIF + block)),
    "jpeg, behind JFIF and a profile": lambda block: jpeg_with(PROFILE, segment(0xE1, EXIF + block), at=20),
    "jpeg, two heads": lambda block: jpeg_with(segment(0xE1, EXIF + EXIF + block), PROFILE),
    "jpeg, in two segments": lambda block: jpeg_with(
        segment(0xE1, EXIF + block[:20]), PROFILE, segment(0xE1, EXIF + block[20:])
    ),
    "jpeg, padded": lambda block: jpeg_with(b"\xff" * 9, segment(0xE1, EXIF + block), b"\xff\xff"),
    "png": lambda block: png_with(chunk(b"eXIf", block)),
    "png, behind the pixels": lambda block: png_with(chunk(b"eXIf", block), at=-12),
    "png, in a text": described,
    "png, in a packed text": lambda block: described(block, packed=True),
    "webp": lambda block: stored(picture(), "WEBP", lossless=True, exif=block),
    "webp, with a head": lambda block: stored(picture("RGBA"), "WEBP", lossless=True, exif=EXIF + block),
}


def turned(data: bytes) -> Image.Image:
    """As Pillow does it."""
    with Image.open(BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGBA":
        ground = Image.new("RGB", upright.size, (255, 255, 255))
        ground.paste(upright, mask=upright.getchannel("A"))
        return ground
    return upright.convert("RGB")


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_every_orientation_is_applied_as_pillow_applies_it(carrier: Callable[[bytes], bytes], order: str) -> None:
    pixels = set()
    for turn in range(10):
        data = carrier(tiff(order, turn))
        image, reference = decode(data, PIXELS), turned(data)
        assert image.size == reference.size == ((5, 9) if turn in (5, 6, 7, 8) else (9, 5))
        assert image.tobytes() == reference.tobytes()
        pixels.add(image.tobytes())
    assert len(pixels) == 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_a_picture_of_another_mode_is_turned_too(mode: str) -> None:
    options = {"transparency": 3} if mode == "P" else {}
    for turn in range(1, 9):
        data = stored(picture(mode), "PNG", exif=tiff("MM", turn), **options)
        plain = decode(stored(picture(mode), "PNG", **options), PIXELS)
        plain.info["exif"] = tiff("MM", turn)
        assert decode(data, PIXELS).tobytes() == ImageOps.exif_transpose(plain).tobytes()


ASKEW = {
    "a long": tiff("MM", 6, kind=4),
    "a signed short": tiff("II", 6, kind=8),
    "octets": tiff("II", 6, kind=1),
    "letters": tiff("II", ord("6"), kind=2),
    "of no type": tiff("II", 6, kind=99),
    "no values": tiff("II", 6, values=0),
    "two values": tiff("MM", 6, values=2),
    "a maker beyond the end, before it": tiff("II", 6, maker=10**6),
    "an entry beyond the end, behind it": tiff("II", 6, further=struct.pack("<HHII", 0x9000, 7, 99, 10**6)),
    "twice": tiff("II", 6, further=struct.pack("<HHII", 0x0112, 3, 1, 3)),
    "a directory that is cut off": tiff("II", 6)[:50],
    "a directory that is cut off before it": tiff("II", 6)[:30],
    "a directory beyond the end": b"II*\0\xff\xff\xff\xff",
    "a head that is cut off": b"II*\0\x08",
    "another head": b"XX*\0" + tiff("II", 6)[4:],
    "the head of a BigTIFF": b"II+\0" + tiff("II", 6)[4:],
    "nothing": b"",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("xmp", [b"", XMP % 3, b"<tiff:Orientation>8</tiff:Orientation>"])
@pytest.mark.parametrize("block", ASKEW.values(), ids=ASKEW)
def test_an_exif_block_that_is_askew_is_taken_as_pillow_takes_it(block: bytes, xmp: bytes) -> None:
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    said = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    for data in (png_with(chunk(b"eXIf", block) + text), jpeg_with(said, segment(0xE1, EXIF + block))):
        try:
            reference = turned(data)
        except (SyntaxError, struct.error):  # vLLM, too, then takes the picture as it is stored
            reference = Image.open(BytesIO(data))
        assert decode(data, PIXELS).tobytes() == reference.tobytes()


def test_an_orientation_that_stands_elsewhere_is_not_followed() -> None:
    assert orientation({"exif": tiff("II", 8, values=3), "xmp": XMP % 6}) not in range(2, 9)


def test_what_was_said_is_not_passed_on() -> None:
    """Else whoever gets the picture reads it again: vLLM's hasher does, and processors that turn pictures."""
    for carrier in CARRIERS.values():
        for turn in (1, 6):
            image = decode(carrier(tiff("II", turn)), PIXELS)
            assert image.info == {} and not image.getexif()


class Asked(BaseException):
    """Not among what `decode` takes for a broken picture."""


@pytest.mark.parametrize("make", ABSURD.values(), ids=ABSURD)
def test_pillow_reads_nothing_of_what_a_picture_says(
    make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = []
    unpack = PngImagePlugin._safe_zlib_decompress

    def asked(*_: object, **__: object) -> None:
        raise Asked

    def unpacking(data: bytes) -> bytes:
        unpacked.append(data)
        return unpack(data)

    monkeypatch.setattr("PIL.TiffImagePlugin.ImageFileDirectory_v2.load", asked)
    monkeypatch.setattr("PIL.Image.Exif.load", asked)
    monkeypatch.setattr("PIL.PngImagePlugin._safe_zlib_decompress", unpacking)
    assert decode(make(), PIXELS).size in ((60, 50), (50, 60))
    assert len(unpacked) <= 1


def test_the_orientation_is_found_among_what_is_absurd() -> None:
    on_their_side = {name for name, make in ABSURD.items() if decode(make(), PIXELS).size == (50, 60)}
    assert on_their_side == {name for name in ABSURD if ", EXIF" in name}


COSTS = """
import json, resource
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
from dynamo_epd.errors import MediaError
from dynamo_epd.images.decode import decode
from tests.hardening.files import ABSURD, BOMBS, blocks, saved

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line) << 10

costs = {}
for kind in ("PNG", "JPEG", "WEBP", "GIF"):
    decode(saved(blocks(), kind), 50_000_000)
for name, make in {**ABSURD, **BOMBS}.items():
    data = make()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    try:
        decode(data, 50_000_000)
    except MediaError:
        pass
    costs[name] = len(data), resident("VmHWM") - before
print(json.dumps(costs))
"""


def test_a_bomb_costs_a_few_times_its_file() -> None:
    """In a process of its own, which may not harm the machine where one does go off."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COSTS], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)
    assert len(costs) > len(ABSURD)
    assert {name: cost for name, cost in costs.items() if cost[1] > 8 * cost[0] + (8 << 20)} == {}


def test_a_bare_jpeg_is_what_its_pixels_are_made_of() -> None:
    data = SERVED["jpeg"]
    said = b"".join(segment(marker, b"of itself") for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE, 0xDC))
    for at in (2, 20):
        assert bare(data[:at] + said + b"junk\xff\xff\0\xff\xd0" + data[at:], "JPEG") == (data, {})
    at = data.index(b"\xff\xda")
    assert bare(data[:at] + said + data[at:] + said, "JPEG") == (data + said, {})
    short = b"\xff\xe1\0\0" + b"\xff\xfe\0\1"  # libjpeg takes lengths below two as two
    assert bare(data[:2] + short + data[2:], "JPEG") == (data, {})
    with pytest.raises(MediaError):  # kept, it would take the next marker for its length
        bare(data[:2] + b"\xff\xe0\0\1" + data[2:], "JPEG")


def test_a_bare_png_is_what_its_pixels_are_made_of() -> None:
    data = stored(picture("P"), "PNG", transparency=bytes(range(256)))
    names = b"cHRM gAMA iCCP sBIT sRGB bKGD hIST pHYs sPLT tIME acTL fcTL fdAT tEXt zTXt iTXt abCd".split()
    said = b"".join(chunk(name, b"of itself") for name in names)
    for at in (33, data.index(b"IDAT") - 4, len(data) - 12):
        assert bare(data[:at] + said + data[at:], "PNG")[0] == data
    text = [chunk(b"tEXt", b"Raw profile type exif\0%d" % number) for number in range(9)]
    assert bare(data[:33] + b"".join(text) + data[33:], "PNG")[0] == data[:33] + text[-1] + data[33:]


def test_a_bare_gif_is_what_its_pixels_are_made_of() -> None:
    data = SERVED["gif with transparency"]
    at = data.index(b"!\xf9\4")
    said = b"!\xfe\3abc\1d\0" + b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0" + b"!\1\0" + b"!\xf9\0"
    for place in (at, at + 8):
        assert bare(data[:place] + said + data[place:], "GIF")[0] == data
    for disposal in range(8):
        cleared = data[: at + 3] + bytes([data[at + 3] | disposal << 2]) + data[at + 4 :]
        assert bare(cleared, "GIF")[0] == data


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
    "jpeg of two frames": SERVED["jpeg"][:20] + segment(0xC0, b"\x08\0\5\0\x09\1\1\x11\0") + SERVED["jpeg"][20:],
    "jpeg of tables": SERVED["jpeg"][:20] + segment(0xDB, bytes(65)) * (MAX_TABLES // 67 + 1) + SERVED["jpeg"][20:],
    "gif with a comment of single letters": gif_with(b"!\xfe" + b"\1x" * MAX_PIECES + b"\0"),
    "gif of comments": gif_with(b"!\xfe\1x\0" * MAX_PIECES),
    "png of empty chunks": SERVED["png RGB"][:33] + chunk(b"abCd", b"") * MAX_PIECES + SERVED["png RGB"][33:],
    "png of pixels in empty chunks": SERVED["png RGB"][:33] + chunk(b"IDAT", b"") * MAX_PIECES + SERVED["png RGB"][33:],
    "png of empty chunks behind": SERVED["png RGB"][:-12] + chunk(b"abCd", b"") * MAX_PIECES + SERVED["png RGB"][-12:],
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
        WHOLE[:2] + b"\xff\xfe\0\2" + bytes(10**6) + WHOLE[2:],
    ],
    ids=["what looks like scans in a comment", "a film behind it", "a colour profile of 16 MB", "junk before it"],
)
def test_what_only_looks_like_too_much_is_the_same_picture(data: bytes) -> None:
    assert decode(data, PIXELS).tobytes() == decode(WHOLE, PIXELS).tobytes()


def test_as_many_scans_as_are_allowed_are_taken() -> None:
    assert decode(in_scans(MAX_SCANS - WHOLE.count(b"\xff\xda")), PIXELS).size == (9, 5)


def test_a_png_of_32_mb_in_the_usual_chunks_is_taken() -> None:
    head, pixels = SERVED["png RGB"][:33], SERVED["png RGB"][33:]
    assert decode(head + chunk(b"abCd", bytes(8192)) * 4000 + pixels, PIXELS).size == (9, 5)
