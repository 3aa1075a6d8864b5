# SPDX-License-Identifier: Apache-2.0
"""KV caches so small that they run out: wrong answers, or blocks that nobody gives back, would show here."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.questions import Refused, ask, ask_all, assert_same, chat, data_url, picture, post, user
from tests.reference import NAME, Reference
from tests.serving import Graph, at_rest, eventually, serve, untrained
from tests.test_leaving import Client

BLOCK = 128
BLOCKS = 2048 // BLOCK + 1
"""The least that an engine with this context length starts with, and the block that vLLM keeps for itself."""
LEASE = 10.0

LONG = [
    chat(user("Tell.", data_url(picture(800_000 + seed))), max_tokens=500 + 40 * (seed % 3), ignore_eos=True)
    for seed in range(10)
]


def small(service: str) -> list[str]:
    return [
        f"--{service}.num-gpu-blocks-override={BLOCKS}",
        f"--{service}.block-size={BLOCK}",
        f"--{service}.disable-log-stats=false",
    ]


@pytest.mark.parametrize("shape", ["disagg", "agg"])
def test_answers_are_right_although_decode_preempts(shape: str, reference: Reference) -> None:
    """Without a prefix cache, for it would hide the loss: a preempted request may find its own blocks there again."""
    expected = ask_all(reference.url, LONG, model=NAME)
    overrides = [*small("DecodeWorker"), "--DecodeWorker.enable-prefix-caching=false"]
    with serve(f"graphs.{shape}:Frontend", f"configs/tiny-{shape}.yaml", *overrides, model=untrained("llava")) as graph:
        assert_same(expected, ask_all(graph.url, LONG, at_once=len(LONG)))
        assert graph.metrics("DecodeWorker").total("vllm:num_preemptions_total") > 0
        at_rest(graph, 5)


@pytest.fixture(scope="module")
def tight() -> Iterator[Graph]:
    """Prefill has room for one long prompt. Every KV cache that is kept too long stops the next."""
    with serve(
        "graphs.disagg:Frontend", "configs/tiny-disagg.yaml", *small("PrefillWorker"), model=untrained("llava")
    ) as graph:
        yield graph


def long_prompt(seed: int, **fields: Any) -> dict[str, Any]:
    return chat(user("x" * 1850, data_url(picture(seed))), max_tokens=4, **fields)


def prefills(graph: Graph) -> float:
    return graph.metrics("PrefillWorker").total("epd_stage_run_seconds_count")


def test_one_prompt_after_the_other_fits(tight: Graph, reference: Reference) -> None:
    questions = [long_prompt(810_000 + seed) for seed in range(6)]
    expected = ask_all(reference.url, questions, model=NAME)
    assert_same(expected, ask_all(tight.url, questions))
    assert_same(expected, ask_all(tight.url, questions, at_once=6))


def test_three_answers_take_three_prefills(tight: Graph) -> None:
    """A KV handle is used once."""
    before = prefills(tight)
    body = long_prompt(820_000, n=3, temperature=1, top_k=1)
    reply = post(f"{tight.url}/v1/chat/completions", body)
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 1
    assert prefills(tight) - before == 3


def test_kv_caches_of_clients_that_left_are_given_back(tight: Graph) -> None:
    """Left at many moments around the end of prefill. If only the lease gave blocks back, this would take minutes."""
    since = time.monotonic()
    for step in range(30):
        client = Client(tight, long_prompt(830_000 + step))
        time.sleep(0.02 + step * 0.01)  # the moment is what is tried here; nothing is awaited
        client.leave()
    ask(tight.url, long_prompt(839_000))
    at_rest(tight, 5)
    assert time.monotonic() - since < 6 * LEASE


def test_with_decode_dead_the_lease_gives_them_back(tight: Graph) -> None:
    """Decode stands still, so that nothing takes the KV cache over and nothing rejects it."""
    body = long_prompt(840_000)
    expected = ask(tight.url, body)
    decode = psutil.Process(tight.pid("DecodeWorker"))
    stopped = [decode, *decode.children(recursive=True)]
    before = prefills(tight)
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        left = Client(tight, long_prompt(840_001))
        eventually(lambda: prefills(tight) > before, "prefilled")
        left.leave()
        after = prefills(tight)
        staying = Client(tight, body)
        eventually(lambda: prefills(tight) > after, "the next prompt has its blocks", 2 * LEASE)
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    staying.leave()
    at_rest(tight, 2 * LEASE)
    eventually(lambda: _answers(tight, body, expected), "answers again", 30)


def _answers(graph: Graph, body: dict[str, Any], expected: Any) -> bool:
    try:
        assert_same([expected], [ask(graph.url, body)])
    except Refused:
        return False
    return True
