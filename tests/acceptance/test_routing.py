# SPDX-License-Identifier: Apache-2.0
"""Routing by KV cache on real engines: a conversation's next turn is prefilled where its beginning is cached."""

from __future__ import annotations

from tests.questions import ask_all, assert_same, chat, data_url, picture, user
from tests.reference import NAME, Reference
from tests.serving import Graph, at_rest, serve, untrained

TALKS = 5
"""With two workers that take turns, every second turn would reach the worker that had not the first one."""
LETTERS = 600
"""Each is a token. Blocks of the cache have 128 at most, so that 512 tokens of the first turn are surely kept."""


def cached_tokens(graph: Graph) -> list[float]:
    return [graph.metrics("PrefillWorker", index).total("vllm:prefix_cache_hits_total") for index in range(2)]


def prefills(graph: Graph) -> list[float]:
    return [graph.metrics("PrefillWorker", index).total("epd_stage_run_seconds_count") for index in range(2)]


def test_the_next_turn_goes_where_the_conversation_is_cached(reference: Reference) -> None:
    overrides = [
        "--PrefillWorker.ServiceArgs.workers=2",
        "--PrefillWorker.disable-log-stats=false",
        "--Processor.routing.prefill=kv",
    ]
    with serve("graphs.disagg:Frontend", "configs/tiny-disagg.yaml", *overrides, model=untrained("llava")) as graph:
        first = [user(chr(ord("a") + number) * LETTERS, data_url(picture(860_000 + number))) for number in range(TALKS)]
        ask_all(graph.url, [chat(turn, max_tokens=4) for turn in first])
        assert min(prefills(graph)) >= TALKS // 2, "conversations are spread over both"
        before = sum(cached_tokens(graph))
        said = {"role": "assistant", "content": "Fine."}
        second = [chat(turn, said, user("And now?"), max_tokens=4) for turn in first]
        assert_same(ask_all(reference.url, second, model=NAME), ask_all(graph.url, second))
        assert sum(cached_tokens(graph)) - before >= TALKS * 512
        at_rest(graph, 5)
