# SPDX-License-Identifier: Apache-2.0
"""The aggregated graph with its own configuration: the same answers, the address rules as they ship, and tools."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.picture_server import Canary
from tests.questions import Refused, ask, ask_all, assert_same, chat, data_url, picture, post, question, user
from tests.reference import NAME, Reference
from tests.serving import Graph, at_rest, serve, untrained

TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def agg(reference: Reference) -> Iterator[Graph]:
    with serve(
        "graphs.agg:Frontend", "configs/tiny-agg.yaml", "--Processor.tool-call-parser=hermes", model=untrained("llava")
    ) as graph:
        yield graph


def test_answers_are_those_of_the_plain_engine(agg: Graph, reference: Reference) -> None:
    questions = [question(seed) for seed in range(1000, 1016)]
    expected = ask_all(reference.url, questions, model=NAME)
    assert_same(expected, ask_all(agg.url, questions))
    assert_same(expected, ask_all(agg.url, questions, at_once=16))


def test_warm_workers_see_another_picture_under_the_same_text(agg: Graph, reference: Reference) -> None:
    text = "Describe the whole scene, from its left to its right, and every colour that there is. " * 4
    questions = [chat(user(text, data_url(picture(20_000 + number % 3)))) for number in range(6)]
    expected = ask_all(reference.url, questions, model=NAME)
    assert len({said.text for said in expected}) == 3
    assert_same(expected, ask_all(agg.url, questions))


def test_health_lists_the_stages_of_this_graph(agg: Graph) -> None:
    with urllib.request.urlopen(f"{agg.url}/health") as reply:
        stages = json.loads(reply.read())["stages"]
    assert stages == {"Frontend": 1, "Processor": 1, "EncodeWorker": 1, "DecodeWorker": 1}


def test_addresses_of_the_inside_are_refused_and_nothing_is_dialled(agg: Graph) -> None:
    hosts = (
        "127.0.0.1", "localhost", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "2130706433",
        "0x7f000001", "0177.0.0.1", "127.1", "\uff10x7f.1", "\u2460\u2461\u2466.0.0.1", "0.0.0.0", "[::]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "metadata.google.internal", "10.0.0.1",
        "192.168.1.1", "172.16.0.1", "[fe80::1]", "[fd00::1]",
    )  # fmt: skip
    with Canary() as canary:
        urls = [f"http://{host}{port}/x.png" for host in hosts for port in ("", f":{canary.port}")]
        urls += [f"https://{host}/x.png" for host in hosts]
        urls += ["file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1/x", f"http://user:word@127.0.0.1:{canary.port}/"]
        refusals = {}
        for url in urls:
            began = time.monotonic()
            with pytest.raises(Refused) as refused:
                ask(agg.url, chat(user("?", url)))
            assert refused.value.status == 400, f"{url}: {refused.value}"
            assert refused.value.size < 2048
            assert "127.0.0.1" not in refused.value.error["message"] or "127.0.0.1" in url
            assert time.monotonic() - began < 60
            refusals[url] = refused.value.error["code"]
        assert set(refusals.values()) == {"url_not_allowed"}, refusals
        assert canary.dialled() == 0
        with urllib.request.urlopen(f"{agg.url}/live"):
            pass
    at_rest(agg, 5)


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "paint"}}, "required"])
def test_a_tool_that_must_be_called_is_called(agg: Graph, choice: Any) -> None:
    """The stop string ends what random weights would go on with: one call after the other."""
    body = chat(user("Paint it.", data_url(picture(300_000))), max_tokens=600, tools=[TOOL], tool_choice=choice)
    body |= {"stop": ["</tool_call>"], "include_stop_str_in_output": True}
    message = post(f"{agg.url}/v1/chat/completions", body)["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "paint", message
    assert json.loads(call["function"]["arguments"])["colour"] in ("red", "green"), message


def test_with_tools_at_will_the_answer_is_text_or_a_call(agg: Graph) -> None:
    body = chat(user("Paint it.", data_url(picture(300_000))), tools=[TOOL], tool_choice="auto")
    choice = post(f"{agg.url}/v1/chat/completions", body)["choices"][0]
    assert choice["message"].get("content") or choice["message"].get("tool_calls"), choice
