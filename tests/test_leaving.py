# SPDX-License-Identifier: Apache-2.0
"""A client that goes away, at each stage of its request: leases, requests and connections are given back.

The bounds lie below every lease (10 s and 30 s), so that no lease's end can have done it, and far above the second that
it takes, since the machine may be busy.
"""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

import pytest

from tests.picture_server import silent
from tests.questions import ask, assert_same, chat, data_url, picture, user
from tests.serving import Graph, at_rest, eventually

GIVEN_BACK = 5.0


class Client:
    """One HTTP request by hand, so that it can be left anywhere."""

    def __init__(self, graph: Graph, body: dict[str, Any]):
        raw = json.dumps(body).encode()
        self._socket = socket.create_connection(("127.0.0.1", graph.port))
        self._socket.settimeout(120)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
        self._socket.sendall(head.encode() + raw)
        self._received = b""

    def read_until(self, count: int, what: bytes = b"data: {") -> None:
        """Reads until ``what`` has come ``count`` times."""
        while self._received.count(what) < count:
            more = self._socket.recv(65536)
            assert more, self._received
            self._received += more
            assert not self._received.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), self._received

    def read_to_the_end(self) -> list[str]:
        """What the events of a stream say; a connection that breaks off is none of its ends."""
        self.read_until(1, b"\r\n0\r\n\r\n")
        assert self._received.endswith(b"\r\n0\r\n\r\n"), self._received
        return re.findall(r"^data: (.*?)\r?$", self.body(), re.MULTILINE)

    def body(self) -> str:
        """What has been received of the reply's body."""
        return self._received.partition(b"\r\n\r\n")[2].decode()

    def usage(self) -> dict[str, Any]:
        """Of a stream that has ended with it."""
        events = re.findall(r"^data: (\{.*\})\r?$", self.body(), re.MULTILINE)
        found: dict[str, Any] = json.loads(events[-1])["usage"]
        return found

    def leave(self) -> None:
        self._socket.close()


def long_answer(seed: int, **fields: Any) -> dict[str, Any]:
    """It would go on for far longer than the bound."""
    body = chat(user("Tell a story without an end.", data_url(picture(seed))), max_tokens=1900, ignore_eos=True)
    return body | {"logprobs": False, "top_logprobs": None} | fields


@pytest.mark.parametrize("n", [1, 3])
def test_in_mid_stream(disagg: Graph, n: int) -> None:
    client = Client(disagg, long_answer(100_000 + n, stream=True, n=n, temperature=1))
    client.read_until(10)
    eventually(lambda: disagg.busy().get("DecodeWorker-0 epd_stage_queue_depth") == n, f"{n} are decoded")
    client.leave()
    at_rest(disagg, GIVEN_BACK)


def test_while_a_whole_answer_is_decoded(disagg: Graph) -> None:
    client = Client(disagg, long_answer(100_010))
    eventually(lambda: "DecodeWorker-0 epd_stage_queue_depth" in disagg.busy(), "decoding")
    client.leave()
    at_rest(disagg, GIVEN_BACK)


def test_at_any_moment_before_the_first_token(disagg: Graph) -> None:
    """Left after 0, 4, 8, … ms, so that all of fetching, encoding, prefill and both hand-offs are met."""
    for step in range(25):
        pictures = [data_url(picture(101_000 + 10 * step + number)) for number in range(4)]
        client = Client(disagg, chat(user("x" * 1500, *pictures), stream=True))
        time.sleep(step * 0.004)  # the moment is what is tried here; nothing is awaited
        client.leave()
    at_rest(disagg, GIVEN_BACK)


def test_while_a_picture_is_fetched(disagg: Graph) -> None:
    """The fetch ends too: its connection is closed long before it would time out."""
    with silent() as (listener, url):
        client = Client(disagg, chat(user("What is this?", url)))
        fetch, _ = listener.accept()
        with fetch:
            fetch.settimeout(3)
            while not fetch.recv(4096).endswith(b"\r\n\r\n"):
                pass
            client.leave()
            assert fetch.recv(1) == b""
    at_rest(disagg, GIVEN_BACK)


def test_those_who_stay_are_not_disturbed(disagg: Graph) -> None:
    body = chat(user("Who stays?", data_url(picture(103_000))), max_tokens=64, ignore_eos=True)
    alone = ask(disagg.url, body)
    leaving = [Client(disagg, long_answer(103_001 + number, stream=True)) for number in range(4)]
    for client in leaving:
        client.read_until(2)
    staying = Client(disagg, body)
    for client in leaving:
        client.read_until(4)
        client.leave()
    staying.read_until(1, b"\r\n\r\n")
    staying.read_until(1, b'"usage"')
    assert_same([alone], [ask(disagg.url, body)])
    at_rest(disagg, GIVEN_BACK)
