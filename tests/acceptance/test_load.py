# SPDX-License-Identifier: Apache-2.0
"""Many requests at the same moment, large pictures, and what the graph weighs meanwhile."""

from __future__ import annotations

import io
import statistics
import time

import numpy as np
from PIL import Image

from tests.picture_server import PictureServer
from tests.questions import ask, ask_all, assert_same, chat, data_url, picture, user
from tests.reference import NAME, Reference
from tests.serving import Graph, at_rest
from tests.test_leaving import Client, long_answer

MEMORY = 12 * 2**30


def photograph(seed: int) -> bytes:
    """12 MB: noise, which no codec makes smaller."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2000, 2100, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    assert len(file.getvalue()) > 12_000_000
    return file.getvalue()


def test_200_requests_at_the_same_moment_get_200_right_answers(disagg: Graph) -> None:
    questions = [chat(user("What is it?", data_url(picture(500_000 + number)))) for number in range(200)]
    together = ask_all(disagg.url, questions, at_once=200)
    assert_same(ask_all(disagg.url, questions), together)
    assert len({said.text for said in together}) > 190
    at_rest(disagg, 5)


def test_a_12_mb_photograph_in_the_body_and_by_http(disagg: Graph, reference: Reference) -> None:
    file = photograph(1)
    in_body = chat(user("What is it?", data_url(file)))
    expected = ask(reference.url, in_body, model=NAME)
    with PictureServer() as server:
        by_http = chat(user("What is it?", server.put("photo.png", file)))
        assert_same([expected, expected], [ask(disagg.url, in_body), ask(disagg.url, by_http)])
        assert server.asked == ["photo.png"]


def test_eight_photographs_at_once(disagg: Graph) -> None:
    questions = [chat(user("What is it?", data_url(photograph(10 + number)))) for number in range(8)]
    together = ask_all(disagg.url, questions, at_once=8)
    assert_same(ask_all(disagg.url, questions), together)


def test_the_whole_graph_fits_in_12_gib(disagg: Graph) -> None:
    """After the burst and the photographs of the tests before."""
    weight = disagg.memory_bytes()
    assert weight < MEMORY, f"{weight / 2**30:.2f} GiB"


def test_a_client_that_leaves_is_forgotten_within_a_second(disagg: Graph) -> None:
    seconds = []
    for number in range(9):
        client = Client(disagg, long_answer(510_000 + number, stream=True))
        client.read_until(3)
        client.leave()
        since = time.monotonic()
        at_rest(disagg, 10)
        seconds.append(time.monotonic() - since)
    assert statistics.median(seconds) < 1, seconds
