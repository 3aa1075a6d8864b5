# SPDX-License-Identifier: Apache-2.0
"""Files that pretend to be pictures, and pictures of every odd kind. All are made here, byte by byte where need be."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def bomb(width: int = 13_400, height: int = 13_400, *, depth: int = 1, interlaced: int = 0) -> bytes:
    """A whole PNG of one colour: 22 KB that hold 179 megapixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width * depth + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return PNG + ihdr(width, height, depth, 0, interlaced) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_with(*chunks: bytes, width: int = 4, height: int = 4) -> bytes:
    """A good PNG with more chunks before its pixels."""
    data = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(height)))
    return PNG + ihdr(width, height) + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed(nbytes: int) -> bytes:
    packer = zlib.compressobj(9)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(nbytes >> 20)) + packer.flush()


def gif(screen: tuple[int, int], frame: tuple[int, int], extensions: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + extensions + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def jpeg(width: int, height: int) -> bytes:
    """The head of one: enough for its size to be read."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\x01\x11\0\x02\x11\0\x03\x11\0"
    return (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">H", len(frame) + 2)
        + frame
        + b"\xff\xda\0\x0c\x03\1\0\2\0\3\0\0\x3f\0\xff\xd9"
    )


def webp(kind: bytes, body: bytes) -> bytes:
    data = b"WEBP" + kind + struct.pack("<I", len(body)) + body + b"\0" * 16
    return b"RIFF" + struct.pack("<I", len(data)) + data


def webp_canvas(width: int, height: int) -> bytes:
    return webp(b"VP8X", b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def webp_lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + (width - 1 | (height - 1) << 14).to_bytes(4, "little") + bytes(16))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def blocks(width: int = 60, height: int = 50, mode: str = "RGB", seed: int = 3) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).convert(mode)


Make = Callable[[], bytes]

BOMBS: dict[str, Make] = {
    "PNG, 179 megapixels in 22 KB": bomb,
    "PNG, 179 megapixels interlaced": lambda: bomb(interlaced=1),
    "PNG, one pixel above the limit": lambda: bomb(50_000_001 // 7_000 + 1, 7_000),
    "PNG, a header alone": lambda: PNG + ihdr(65_535, 65_535) + chunk(b"IDAT", b""),
    "PNG, largest header": lambda: PNG + ihdr(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b""),
    "PNG, 16 bits RGBA": lambda: PNG + ihdr(30_000, 30_000, 16, 6) + chunk(b"IDAT", b""),
    "PNG, animated": lambda: (
        PNG + ihdr(20_000, 20_000) + chunk(b"acTL", struct.pack(">II", 9, 0)) + chunk(b"IDAT", b"")
    ),
    "PNG, animated, that clears its canvas": lambda: (
        PNG
        + ihdr(12_000, 12_000, 8, 6)
        + chunk(b"acTL", struct.pack(">II", 2, 0))
        + chunk(b"fcTL", struct.pack(">5I2H2B", 0, 12_000, 12_000, 0, 0, 1, 1, 1, 0))
        + chunk(b"IDAT", b"")
    ),
    "GIF, screen": lambda: gif((65_535, 65_535), (1, 1)),
    "GIF, frame beyond the screen": lambda: gif((10, 10), (65_535, 65_535)),
    "GIF, that clears its frame": lambda: gif((13_000, 13_000), (13_000, 13_000), b"!\xf9\4\x08\0\0\0\0"),
    "JPEG": lambda: jpeg(65_500, 65_500),
    "WebP, canvas": lambda: webp_canvas(16_384, 16_384),
    "WebP, largest canvas": lambda: webp_canvas(1 << 24, 1 << 24),
    "WebP, lossless": lambda: webp_lossless(16_384, 16_384),
    "WebP, lossy": lambda: webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(16)),
}
"""Too large by their header alone."""

BROKEN: dict[str, Make] = {
    "one byte": lambda: b"\x89",
    "magic number alone": lambda: PNG,
    "truncated PNG": lambda: saved(blocks(), "PNG")[:-60],
    "truncated JPEG": lambda: saved(blocks(300, 300), "JPEG")[:700],
    "truncated WebP": lambda: saved(blocks(300, 300), "WEBP")[:80],
    "truncated GIF": lambda: saved(blocks(300, 300), "GIF")[:820],
    "JPEG head alone": lambda: jpeg(64, 64),
    "PNG without pixels": lambda: PNG + ihdr(4, 4) + chunk(b"IEND", b""),
    "PNG with a wrong checksum": lambda: saved(blocks(), "PNG").replace(b"IDAT", b"IDAT\xff", 1),
    "PNG of no width": lambda: PNG + ihdr(0, 4) + chunk(b"IDAT", zlib.compress(b"")),
    "PNG of a depth that is none": lambda: PNG + ihdr(4, 4, 7) + chunk(b"IDAT", zlib.compress(bytes(20))),
    "PNG whose pixels are no zlib": lambda: PNG + ihdr(4, 4) + chunk(b"IDAT", b"x" * 99) + chunk(b"IEND", b""),
    "PNG with a chunk of 2 GB": lambda: PNG + ihdr(4, 4) + struct.pack(">I", 2**31 - 1) + b"IDAT",
    "text bomb in a PNG": lambda: png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + packed(128 << 20))),
    "international text bomb in a PNG": lambda: png_with(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(128 << 20))
    ),
    "WebP of an unknown chunk": lambda: webp(b"VP9Z", bytes(64)),
    "WebP of zeros": lambda: webp(b"VP8L", bytes(64)),
    "GIF of an endless code": lambda: gif((100, 100), (100, 100))[:-3] + b"\xff" * 300,
    "JPEG of markers": lambda: b"\xff\xd8\xff" + b"\xff\xfe\0\x02" * 100_000,
    "JPEG that says it is a PNG": lambda: PNG + saved(blocks(), "JPEG"),
}
"""400, whatever the code."""

FOREIGN: dict[str, Make] = {
    "HTML": lambda: b"<!doctype html><html><body>404</body></html>",
    "text": lambda: b"there is no picture here",
    "JSON": lambda: b'{"error": "expired"}',
    "SVG": lambda: (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    ),
    "SVG, packed": lambda: gzip.compress(b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "TIFF": lambda: saved(blocks(), "TIFF"),
    "BMP": lambda: saved(blocks(), "BMP"),
    "ICO": lambda: saved(blocks(64, 64), "ICO"),
    "PPM": lambda: saved(blocks(), "PPM"),
    "TGA": lambda: saved(blocks(), "TGA"),
    "PCX": lambda: saved(blocks(), "PCX"),
    "PDF": lambda: saved(blocks(), "PDF"),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "MVG": lambda: b"push graphic-context\nfill 'url(https://127.0.0.1/x.jpg\"|ls \"-la)'\n",
    "JPEG 2000": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
    "AVIF": lambda: b"\0\0\0\x20ftypavif" + bytes(64),
    "HEIC": lambda: b"\0\0\0\x20ftypheic" + bytes(64),
    "PSD": lambda: b"8BPS\0\x01" + bytes(64),
    "MP4": lambda: b"\0\0\0\x20ftypisom" + bytes(64),
    "ELF": lambda: b"\x7fELF\x02\x01\x01" + bytes(64),
    "pickle": lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "NumPy": lambda: b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "safetensors": lambda: struct.pack("<Q", 2) + b"{}",
    "zeros": lambda: bytes(4096),
    "a RIFF that is no WebP": lambda: b"RIFF\x40\0\0\0WAVEfmt " + bytes(64),
}
"""415."""


def segment(marker: int, data: bytes) -> bytes:
    """Of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def directory(nbytes: int, tags: int, kind: int = 7, unit: int = 1, turn: int = 6) -> bytes:
    """A TIFF block of ``nbytes`` with an orientation, and ``tags`` that each name all but its head and the last bytes.

    ``kind`` is their type, of ``unit`` bytes a value: 7 octets, 5 fractions.
    """
    values = (nbytes - 16) // unit
    entries = struct.pack("<HHII", 0x0112, 3, 1, turn)
    entries += b"".join(struct.pack("<HHII", 0x0200 + tag, kind, values, 8) for tag in range(tags))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", tags + 1) + entries + bytes(4)).ljust(nbytes, b"\0")


def jpeg_with(*segments: bytes) -> bytes:
    data = saved(blocks(), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def exif_in_jpeg(block: bytes) -> bytes:
    """In as many segments as it takes."""
    pieces = (block[at : at + 65_000] for at in range(0, len(block), 65_000))
    return jpeg_with(*(segment(0xE1, b"Exif\0\0" + piece) for piece in pieces))


def blocks_with(*chunks: bytes) -> bytes:
    """A good PNG of `blocks` with more chunks before its pixels."""
    data = saved(blocks(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def commented(blocks_of_comment: bytes) -> bytes:
    """A GIF with a comment made of these blocks, each behind its length."""
    data = saved(blocks(mode="P"), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + b"!\xfe" + blocks_of_comment + b"\0" + data[at:]


ABSURD: dict[str, Make] = {
    "PNG, EXIF": lambda: blocks_with(chunk(b"eXIf", directory(300_000, 5_000))),
    "PNG, EXIF in a text": lambda: blocks_with(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\n" + directory(300_000, 5_000).hex().encode())
    ),
    "WebP, EXIF": lambda: saved(blocks(), "WEBP", exif=directory(300_000, 5_000)),
    "JPEG, EXIF": lambda: exif_in_jpeg(directory(300_000, 5_000)),
    "JPEG, EXIF of fractions": lambda: exif_in_jpeg(directory(65_000, 1_000, 5, 8)),
    "JPEG, index of pictures": lambda: jpeg_with(segment(0xE2, b"MPF\0" + directory(65_000, 1_000, 5, 8))),
    "JPEG, junk": lambda: jpeg_with(segment(0xFE, b""), bytes(10**6)),
    "PNG, heads of EXIF": lambda: blocks_with(chunk(b"eXIf", b"Exif\0\0" * 170_000)),
    "PNG, chromaticities": lambda: blocks_with(chunk(b"cHRM", bytes(4 << 20))),
    "PNG, profiles": lambda: blocks_with(chunk(b"iCCP", b"x\0\0" + packed(1 << 20)) * 2_000),
    "PNG, texts": lambda: blocks_with(*(chunk(b"zTXt", b"%d\0\0" % number + packed(1 << 20)) for number in range(60))),
    "PNG, texts that end amiss": lambda: blocks_with(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + packed(1 << 20)[:-4] + b"\xff" * 4) * 2_000
    ),
    "PNG, text of 128 MB": lambda: blocks_with(chunk(b"zTXt", b"Comment\0\0" + packed(128 << 20))),
    "PNG, lines": lambda: blocks_with(chunk(b"tEXt", b"Raw profile type exif\0" + b"aa\n" * (1 << 20))),
    "GIF, comment": lambda: commented((b"\xff" + b"x" * 255) * 9_900),
}
"""Good pictures, which say of themselves what takes a reader gigabytes or many seconds. Those with ", EXIF" stand on
their side."""


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(blocks(), "JPEG", exif=exif)


def _text() -> bytes:
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "x" * 10_000)
    return saved(blocks(), "PNG", pnginfo=about)


ODD: dict[str, Make] = {
    "1x1": lambda: saved(blocks(1, 1), "PNG"),
    "1x1 JPEG": lambda: saved(blocks(1, 1), "JPEG"),
    "1x1 WebP": lambda: saved(blocks(1, 1), "WEBP"),
    "1x1 GIF": lambda: saved(blocks(1, 1), "GIF"),
    "2x3": lambda: saved(blocks(2, 3), "PNG"),
    "a row": lambda: saved(blocks(200, 1), "PNG"),
    "a long row": lambda: saved(blocks(201, 1), "PNG"),
    "a very long row": lambda: saved(blocks(60_000, 1), "PNG"),
    "a very tall column": lambda: saved(blocks(1, 60_000), "PNG"),
    "many pixels of one colour": lambda: saved(Image.new("L", (4000, 3000)), "PNG"),
    "CMYK": lambda: saved(blocks(mode="CMYK"), "JPEG"),
    "YCbCr": lambda: saved(blocks(mode="YCbCr"), "JPEG"),
    "grey": lambda: saved(blocks(mode="L"), "PNG"),
    "grey with alpha": lambda: saved(blocks(mode="LA"), "PNG"),
    "two colours": lambda: saved(blocks(mode="1"), "PNG"),
    "palette": lambda: saved(blocks(mode="P"), "PNG"),
    "palette with a transparent colour": lambda: saved(blocks(mode="P"), "PNG", transparency=0),
    "alpha": lambda: saved(blocks(mode="RGBA"), "PNG"),
    "all transparent": lambda: saved(Image.new("RGBA", (40, 40)), "PNG"),
    "alpha in WebP": lambda: saved(blocks(mode="RGBA"), "WEBP", lossless=True),
    "16 bits grey": lambda: saved(Image.fromarray(np.arange(2500, dtype=np.uint16).reshape(50, 50) * 26), "PNG"),
    "16 bits RGB": lambda: PNG + ihdr(4, 4, 16, 2) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""),
    "interlaced": lambda: PNG + ihdr(1, 1, 8, 0, 1) + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b""),
    **{f"EXIF orientation {turn}": (lambda turn=turn: _exif(turn)) for turn in (2, 3, 6, 8, 0, 9, 65_535)},  # type: ignore[misc]
    "broken EXIF": lambda: saved(blocks(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40),
    "EXIF of 60 KB": lambda: saved(blocks(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\x01" * 60_000),
    "progressive JPEG": lambda: saved(blocks(), "JPEG", progressive=True),
    "animated GIF": lambda: saved(blocks(), "GIF", save_all=True, append_images=[blocks(seed=9)] * 30),
    "animated WebP": lambda: saved(blocks(), "WEBP", save_all=True, append_images=[blocks(seed=9)] * 3),
    "animated PNG": lambda: saved(blocks(), "PNG", save_all=True, append_images=[blocks(seed=9)] * 3),
    "a colour profile that is none": lambda: saved(blocks(), "PNG", icc_profile=b"x" * 1000),
    "a long comment": _text,
    "PNG with a palette of nothing": lambda: PNG + ihdr(4, 4, 8, 3) + chunk(b"IDAT", zlib.compress(bytes(20))),
    "bytes after its end": lambda: saved(blocks(), "PNG") + b"<script>" * 1000,
    "a zip behind it": lambda: saved(blocks(), "JPEG") + b"PK\x03\x04" + bytes(100),
}
"""200 or 400."""
