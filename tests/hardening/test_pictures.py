# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md about the bytes of pictures, sent in the body: bombs, broken ones, foreign ones, odd ones."""

from __future__ import annotations

import base64
import io
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from tests.hardening.edge import CHAT, MARK, Door, Peaks, Reply, Work, chat_with, refused, waited_for
from tests.hardening.files import (
    ABSURD,
    BOMBS,
    BROKEN,
    FOREIGN,
    ODD,
    blocks,
    bomb,
    chunk,
    commented,
    jpeg_with,
    png_with,
    saved,
    segment,
)
from tests.hardening.report import Clock, Report
from tests.questions import ask, chat, data_url, difference, picture, user

pytestmark = pytest.mark.usefixtures("unharmed")

AT_ONCE = 64
BOMB_SECONDS = 0.05
"""For one refusal: as a lone client sees it in the median, and of CPU time where 64 share the machine's cores."""
LONE_SECONDS = 5 * BOMB_SECONDS
"""The worst that a lone client sees: other processes may have had their turn before."""
BROKEN_SECONDS = 2.0
"""For what has to be decoded, or unpacked, as far as its defect."""
LONE = 3
"""How often a bomb is sent by itself."""
BOMB_BYTES = 64 << 20
ABSURD_BYTES = 128 << 20
"""Of one process, which may hold a body of 6 MB more than once, and answers it."""


def reply_to(door: Door, file: bytes, kind: str = "png") -> Reply:
    return door.post(CHAT, chat_with(data_url(file, kind)))


def in_time(seconds: list[float], clock: Clock) -> None:
    """Fails unless these refusals of a lone client were as quick as is promised, on a machine that let it run."""
    assert statistics.median(seconds) < BOMB_SECONDS + clock.late(), seconds
    assert max(seconds) < LONE_SECONDS + clock.late(), seconds


def at_once(door: Door, bodies: list[Any], *others: Callable[[], None]) -> tuple[list[Reply], list[float]]:
    """The replies to these bodies, with ``others`` beside them, and what each process has worked until the last one."""
    work = Work(door)
    with ThreadPoolExecutor(len(bodies) + len(others)) as pool:
        asked = [pool.submit(door.post, CHAT, body) for body in bodies]
        beside = [pool.submit(other) for other in others]
        replies = [one.result() for one in asked]
        worked = work.seconds()
        for one in beside:
            one.result()
    return replies, worked


@pytest.mark.usefixtures("neighbour")
class TestBombs:
    @pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
    def test_too_many_pixels_are_refused_from_the_header(self, door: Door, make: object) -> None:
        assert callable(make)
        file = make()
        peaks = Peaks(door)
        with Clock() as clock:
            replies = [reply_to(door, file) for _ in range(LONE)]
        for reply in replies:
            refused(reply, 400, "image_too_large")
        assert max(peaks.grown().values()) < BOMB_BYTES
        in_time([reply.seconds for reply in replies], clock)

    def test_64_bombs_at_once_cost_little_and_keep_nobody_waiting(self, door: Door) -> None:
        """Decoded, each would take 180 MB. They are sent alone first: what a process needs once is not theirs. Of 64
        the last has to wait for those in front of it, and for nothing but their CPU time, and the neighbour's."""
        file = bomb()
        bodies = [chat_with(data_url(file + bytes([index]))) for index in range(AT_ONCE)]
        cores = len(os.sched_getaffinity(0))
        with Report("bombs", at_once=AT_ONCE) as report:
            with Clock() as clock:
                alone = [door.post(CHAT, body).seconds for body in bodies[:16]]
            report.note(alone={"median": statistics.median(alone), "worst": max(alone), "late": clock.late()})
            in_time(alone, clock)
            peaks = Peaks(door)
            first, (_, *graphs) = at_once(door, bodies)
            each = sum(graphs) / AT_ONCE
            with Clock() as clock:
                second, spent = at_once(door, bodies, door.neighbour.asks)
            for reply in first + second:
                refused(reply, 400, "image_too_large")
            seconds = [reply.seconds for reply in second]
            worst, grown = max(seconds), max(peaks.grown().values())
            bound = BOMB_SECONDS + waited_for(spent, cores) + clock.late()
            report.note(
                together={"median": statistics.median(seconds), "worst": worst, "late": clock.late()},
                cpu_seconds={"each": each, "whole": sum(spent), "busiest process": max(spent), "client": spent[0]},
            )
            report.goal("each takes less than 50 ms of CPU time", each < BOMB_SECONDS, f"{each * 1e3:.1f} ms")
            waits = f"{worst * 1e3:.0f} ms, where {bound * 1e3:.0f} ms is the most"
            report.goal("nobody waits for anything but the cores", worst < bound, waits)
            report.goal("no process grows by 64 MiB", grown < BOMB_BYTES, f"{grown / 2**20:.1f} MiB")
        assert not report.missed, report.missed


def in_scans(more: int) -> bytes:
    """A progressive JPEG of 4 megapixels whose last scan comes again, 14 bytes and 2 ms each time."""
    data = saved(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more + data[-2:]


PIECES: dict[str, Callable[[], bytes]] = {
    "JPEG of 5 000 scans": lambda: in_scans(5_000),
    "JPEG of 101 scans": lambda: in_scans(101),
    "JPEG of comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 10**6 + saved(blocks(), "JPEG")[2:],
    "JPEG of frames": lambda: jpeg_with(segment(0xC0, b"\x08\0\x32\0\x3c\3" + b"\1\x11\0" * 21_000) * 32),
    "JPEG of tables": lambda: jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1_000) * 32),
    "GIF with a comment in letters": lambda: commented(b"\1x" * 10**6),
    "PNG of empty chunks": lambda: png_with(chunk(b"abCd", b"") * 10**5),
    "PNG of pixels in empty chunks": lambda: png_with(chunk(b"IDAT", b"") * 10**5),
}
"""Small for what they cost a decoder that goes through all of their parts."""


@pytest.mark.usefixtures("neighbour")
class TestPieces:
    @pytest.mark.parametrize("make", PIECES.values(), ids=PIECES)
    def test_a_picture_in_too_many_pieces_is_refused(self, door: Door, make: Callable[[], bytes]) -> None:
        refused(reply_to(door, make()), 400, "invalid_image")

    def test_as_many_scans_as_an_encoder_writes_are_answered(self, door: Door) -> None:
        assert reply_to(door, in_scans(10), "jpeg").status == 200


@pytest.mark.usefixtures("neighbour")
class TestAbsurd:
    @pytest.mark.parametrize("make", ABSURD.values(), ids=ABSURD)
    def test_what_a_picture_says_of_itself_is_not_read(self, door: Door, make: Callable[[], bytes]) -> None:
        """Read, it would take gigabytes or many seconds. A plain one goes first: what a process needs once."""
        file = make()
        assert reply_to(door, saved(blocks(), "PNG")).status == 200
        peaks = Peaks(door)
        assert reply_to(door, file).status == 200
        grown = peaks.grown()
        assert max(grown.values()) < ABSURD_BYTES, grown


@pytest.mark.usefixtures("neighbour")
class TestBroken:
    @pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
    def test_what_cannot_be_decoded_is_refused(self, door: Door, make: object) -> None:
        """Some would unpack to 128 MB of text."""
        assert callable(make)
        file = make()
        peaks = Peaks(door)
        with Clock() as clock:
            reply = reply_to(door, file)
        refused(reply, (400, 415))
        grown = peaks.grown()
        assert max(grown.values()) < BOMB_BYTES, grown
        assert reply.seconds < BROKEN_SECONDS + clock.late()

    @pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
    @pytest.mark.parametrize("kind", ["png", "svg+xml"])
    def test_another_format_is_refused_whatever_it_is_called(self, door: Door, make: object, kind: str) -> None:
        assert callable(make)
        refused(reply_to(door, make(), kind), 415, "unsupported_media_type")

    def test_an_empty_file_is_refused(self, door: Door) -> None:
        refused(reply_to(door, b""), 400, "invalid_image")

    def test_a_good_picture_beside_a_bad_one_does_not_help(self, door: Door) -> None:
        good = data_url(picture(1))
        for urls in ((good, data_url(b"\x89")), (data_url(b"\x89"), good)):
            refused(door.post(CHAT, chat_with(*urls)), (400, 415))


@pytest.mark.usefixtures("neighbour")
class TestOdd:
    @pytest.mark.parametrize("make", ODD.values(), ids=ODD)
    def test_an_odd_picture_is_answered_or_refused(self, door: Door, make: object) -> None:
        assert callable(make)
        reply = reply_to(door, make())
        if reply.status != 200:
            refused(reply, 400)

    def test_the_same_pixels_at_two_sizes_are_two_pictures(self, door: Door) -> None:
        pixels = Image.open(io.BytesIO(picture(92_000, (80, 40)))).tobytes()
        said = []
        for size in ((80, 40), (40, 80), (80, 40)):
            file = io.BytesIO()
            Image.frombytes("RGB", size, pixels).save(file, "PNG")
            said.append(ask(door.graph.url, chat(user("Describe the picture.", data_url(file.getvalue())))))
        assert difference(said[0], said[2]) is None
        assert difference(said[0], said[1]) is not None


GOOD = base64.b64encode(picture(1)).decode()
URLS = {
    "bad character": f"data:image/png;base64,{GOOD[:40]}!{GOOD[41:]}",
    "white space": f"data:image/png;base64,{GOOD[:40]} {GOOD[40:]}",
    "line breaks": f"data:image/png;base64,{GOOD[:40]}\n{GOOD[40:]}",
    "no padding": "data:image/png;base64,QUJDRA",
    "padding inside": "data:image/png;base64,QUI=QUI=",
    "URL alphabet": "data:image/png;base64,-_-_",
    "full-width": "data:image/png;base64,\uff21\uff21\uff21\uff21",
    "no comma": f"data:image/png;base64{GOOD}",
    "comma far away": f"data:image/png;{'x' * 2000};base64,{GOOD}",
    "nothing": "data:",
    "empty": "data:,",
    "empty base64": "data:image/png;base64,",
    "a comma alone": "data:image/png,",
    "not said to be base64": f"data:image/png,{GOOD}",
    "percent signs": "data:image/png,%%%%%%%",
    "outside ASCII": "data:image/png,\u00e9\u00e9",
    "twice": f"data:image/png;base64,data:image/png;base64,{GOOD}",
    "a mark": f"data:image/png;base64,{MARK}",
}


@pytest.mark.usefixtures("neighbour")
class TestDataUrls:
    @pytest.mark.parametrize("url", URLS.values(), ids=URLS)
    def test_a_bad_one_is_refused(self, door: Door, url: str) -> None:
        refused(door.post(CHAT, chat_with(url)), (400, 415))

    def test_more_pictures_than_allowed_are_refused(self, door: Door) -> None:
        refused(door.post(CHAT, chat_with(*[data_url(picture(1))] * 9)), 400, "too_many_images", "messages")

    def test_a_thousand_pictures_are_refused(self, door: Door) -> None:
        refused(door.post(CHAT, chat_with(*["data:,"] * 1000)), 400, "too_many_images", "messages")

    def test_pictures_are_counted_over_all_messages(self, door: Door) -> None:
        turn = [user("?", *[data_url(picture(1))] * 3), {"role": "assistant", "content": "."}]
        body = CHAT.with_(messages=[*turn * 3, user("?")])
        refused(door.post(CHAT, body), 400, "too_many_images", "messages")

    def test_one_over_size_is_413(self, door: Door) -> None:
        url = "data:image/png;base64," + "A" * (45 << 20)
        refused(door.post(CHAT, chat_with(url)), 413, "payload_too_large")

    def test_one_over_size_and_not_base64_is_413(self, door: Door) -> None:
        refused(door.post(CHAT, chat_with("data:image/png," + "A" * (2 << 20))), 413, "payload_too_large")
