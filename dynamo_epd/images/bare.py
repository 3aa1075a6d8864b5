# SPDX-License-Identifier: Apache-2.0
"""The file of a picture without what it only says of itself, and the one thing said that matters: which way up it is.

Pillow reads all that a file says when it opens it, and again when it turns the picture, and bounds little of it: 300 KB
of EXIF whose tags all name the same bytes become 5 GB, 60 KB of an MPF index become millions of fractions, 2 MB of
colour profiles are unpacked for seconds, and 100 bytes of an animation make it fill a canvas before its size can be
looked at. None of that is asked for. So Pillow is given the parts that pixels are made of, each found by one walk that
is counted and copies nothing, and the orientation is read here, from its own twelve bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from dynamo_epd.errors import MediaError

MAX_SCANS = 100
"""Scans of one JPEG. Each is a pass over all of its pixels and may be 14 bytes long; encoders write some ten."""
MAX_SEGMENTS = 4096
"""Segments of one JPEG, those of its scans included: a colour profile may take 255 of them."""
MAX_TABLES = 4096
"""Bytes of a JPEG's quantisation tables before its first scan. A frame uses four of at most 129 bytes; Pillow makes a
list of each that comes."""
MAX_PIECES = 20_000
"""Chunks of a PNG (32 MB in chunks of 8 KB are 4,096), and blocks before the first frame of a GIF."""

# What ends a stretch of a JPEG's coded data, and begins a segment (ISO/IEC 10918-1, B.1.1.2).
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SCAN, _TABLES = 0xDA, 0xDB
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Those that libjpeg decodes by: also tables, restart intervals, and by which of JFIF and Adobe the colours are meant.
_OF_PIXELS = _FRAMES | {0xC4, 0xCC, _TABLES, 0xDD, 0xE0, 0xEE}
# Those that it skips: a number of lines, the other applications, comments.
_SAID = frozenset({0xDC, *range(0xE1, 0xEE), 0xEF, 0xFE})

# The texts of a PNG in which Pillow looks for an orientation, as it does in its eXIf.
_TEXTS = frozenset({b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp"})

_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_TURNED = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ORIENTATION = 0x0112
# Byte orders by the head of a block (TIFF 6.0, and two that Pillow takes as well); bytes of one value by its type; and
# how to read those types whose values are numbers and stand in the entry itself.
_ORDERS = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 13: "L"}


def bare(data: bytes, kind: str) -> tuple[bytes, dict[str, bytes]]:
    """The file of ``kind`` (Pillow's name), left with what its first frame is made of, and what was said in the rest.

    What was said is named as in Pillow's ``info``, and only of a JPEG: Pillow itself gathers that of a PNG, which keeps
    what may tell an orientation, and of a WebP, which is left as it is (libwebp skips and Pillow copies what it holds).
    Takes a copy of the file, and tens of milliseconds at the bounds above. Raises `MediaError` for too many parts or
    malformed ones, and `IndexError` for a GIF that ends before its first frame.
    """
    if kind == "JPEG":
        return _jpeg(data)
    if kind == "PNG":
        return _png(data), {}
    if kind == "GIF":
        return _gif(data), {}
    return data, {}


def _jpeg(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Before its first scan the segments in `_OF_PIXELS`, end to end; from there on everything.

    Also bounds what libjpeg would go through: it counts nothing, and only warns of a scan that comes again.
    """
    view = memoryview(data)
    kept = [view[:2]]
    exif: list[bytes] = []
    said: dict[str, bytes] = {}
    at, scans, frames, tables = 2, 0, 0, 0
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":  # end of image: what follows is not decoded
            break
        begin, at, marker = found.start(), found.end(), found[0][1]
        length = int.from_bytes(data[at : at + 2])
        at += length if marker not in (0xD8, 0x01) else 0  # these two have none
        if scans:
            pass  # kept with the first
        elif marker == _SCAN:
            kept.append(view[begin:])
        elif marker in _OF_PIXELS and length >= 2:
            kept.append(view[begin:at])
            frames += marker in _FRAMES
            tables += length if marker == _TABLES else 0
            if frames > 1:
                raise MediaError("the image has too many frames")
            if tables > MAX_TABLES:
                raise MediaError("the image has too many tables")
        elif marker not in _SAID:
            raise MediaError("the image is truncated or broken")
        elif marker == 0xE1 and data.startswith(_EXIF, begin + 4):
            exif.append(data[begin + 4 + (6 if exif else 0) : at])  # in several segments it is one block
        elif marker == 0xE1 and data.startswith(_XMP, begin + 4):
            said["xmp"] = data[begin + 4 + len(_XMP) : at]
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            raise MediaError("the image has too many scans")
    else:
        raise MediaError("the image has too many segments")
    if exif:
        said["exif"] = b"".join(exif)
    return b"".join(kept), said


def _png(data: bytes) -> bytes:
    """Its header, palette, transparency and pixels, what may tell an orientation, and of each such text the last one.

    Without the chunks of an animation Pillow decodes the same picture: the pixels that are no frame's or the first's.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[:8]]
    texts: dict[bytes, int] = {}
    at = 8
    for _ in range(MAX_PIECES):
        begin, name = at, data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4])
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[begin + 8 : min(begin + 88, at - 4)].partition(b"\0")[0]
            if keyword in _TEXTS:
                # Pillow unpacks each to up to a megabyte, and counts those that it cannot read for nothing.
                if keyword in texts:
                    kept[texts[keyword]] = b""
                texts[keyword] = len(kept)
                kept.append(view[begin:at])
        elif name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):
            kept.append(view[begin:at])
        if name == b"IEND" or at >= len(data):
            return b"".join(kept)
    raise MediaError("the image is in too many pieces")


def _gif(data: bytes) -> bytes:
    """Its screen, its palette, the graphic controls of its first frame, and everything from that frame on."""
    view = memoryview(data)
    at = begin = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept: list[bytes | memoryview] = [view[:at]]
    extension = False
    for _ in range(MAX_PIECES):
        mark = data[at]
        if extension:
            at += 1 + mark
            extension = mark > 0
            if not extension and data[begin + 1] == 0xF9 and data[begin + 2]:
                # What becomes of the frame when the next one comes is left out: Pillow makes ready for it at once.
                kept += [view[begin : begin + 3], bytes([data[begin + 3] & 0xE3]), view[begin + 4 : at]]
        elif mark == ord("!"):
            begin, at, extension = at, at + 2, True
        elif mark in b",;":
            kept.append(view[at:])
            return b"".join(kept)
        else:
            at += 1
    raise MediaError("the image is in too many pieces")


def orientation(info: Mapping[Any, Any]) -> float:
    """The EXIF orientation, 1 to 8, of a picture of which ``info`` says what Pillow gathers; another number is none.

    Found where Pillow's ``exif_transpose`` finds it: EXIF first, XMP where that has none, and 1 where it is broken. It
    must stand in the first directory's own entry; no offset but that directory's is followed.
    """
    try:
        block = info.get("exif")
        if block is None and "Raw profile type exif" in info:
            block = bytes.fromhex("".join(info["Raw profile type exif"].split("\n", 3)[3:]).replace("\n", ""))
        found = _in_directory(block) if block else None
    except (struct.error, ValueError, TypeError):
        return 1
    if found is not None:
        return found
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    match = _TURNED.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(match[1]) if match else 1


def _in_directory(block: bytes) -> float | None:
    """The orientation in the first directory of an EXIF block, None where that holds none, 0 where it is unreadable.

    Raises `struct.error` for a block that ends within its head.
    """
    start = 0
    while start < 4 * len(_EXIF) and block.startswith(_EXIF, start):  # the format's, the writer's, and some to spare
        start += len(_EXIF)
    if start == len(block):
        return None
    order = _ORDERS.get(block[start : start + 4])
    if order is None:
        return 0
    at = start + struct.unpack_from(order + "L", block, start + 4)[0]
    if at + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, at)
    count = min(count, (len(block) - at - 2) // 12)
    found: float | None = None
    for tag, kind, values, offset in struct.iter_unpack(order + "HHLL", block[at + 2 : at + 2 + 12 * count]):
        size = values * _UNITS.get(kind, 0)
        if size > 4 and offset + size > len(block) - start:  # Pillow, too, reads no further
            break
        if tag == _ORIENTATION and size > 0:
            number = _NUMBERS.get(kind) if size <= 4 else None
            found = struct.unpack_from(order + number, struct.pack(order + "L", offset))[0] if number else 0
    return found
