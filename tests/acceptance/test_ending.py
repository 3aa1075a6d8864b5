# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while answers run: they finish, and then nothing is left."""

from __future__ import annotations

import json
import signal

import pytest

from tests.questions import chat, data_url, picture, user
from tests.serving import eventually, listens, serve, untrained
from tests.test_leaving import Client

TOKENS = 300


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_running_answers_finish_and_nothing_is_left(number: signal.Signals) -> None:
    with serve("graphs.disagg:Frontend", "configs/tiny-disagg.yaml", model=untrained("llava")) as graph:
        running = []
        for seed in range(8):
            body = chat(
                user("Tell.", data_url(picture(700_000 + seed))), max_tokens=TOKENS, ignore_eos=True, stream=True
            )
            running.append(Client(graph, body | {"stream_options": {"include_usage": True}}))
        for client in running:
            client.read_until(3)
        graph.signal(number)
        graph.wait_for("running requests finish first")
        eventually(lambda: not listens(graph.port), "no new client is let in", 20)
        for client in running:
            client.read_until(1, b"[DONE]")
            assert client.usage()["completion_tokens"] == TOKENS
        assert graph.wait() == 0, graph.text
        assert graph.leftovers() == []


def test_a_request_that_waits_to_be_encoded_is_finished_too() -> None:
    with serve("graphs.agg:Frontend", "configs/tiny-agg.yaml", model=untrained("llava")) as graph:
        clients = [Client(graph, chat(user("?", data_url(picture(710_000 + seed))))) for seed in range(32)]
        eventually(graph.busy, "something runs")
        graph.signal(signal.SIGTERM)
        for client in clients:
            client.read_until(1, b'"usage"')
            assert json.loads(client.body())["choices"][0]["logprobs"]["content"]
        assert graph.wait() == 0, graph.text
        assert graph.leftovers() == []
