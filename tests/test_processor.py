# SPDX-License-Identifier: Apache-2.0
"""What the processor decides by itself; the conducting is tested on running graphs (test_graph_disagg.py)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from components.processor import (
    ENDED_WORKERS,
    Conversation,
    Leased,
    Processor,
    ProcessorConfig,
    continued,
    prompt_image,
    resumable,
    tenant_salt,
    texts_of,
)
from components.protocol import DecodeRequest, Delta, Encoded, Handle, PrefillReply, PrefillRequest
from dynamo_epd import tracing
from dynamo_epd.errors import EpdError, HandOffFailed, Preempted, StageUnavailable, WorkerLost
from dynamo_epd.families import FAMILIES
from tests.collector import Collector


def leased(uuid: str, **metadata: list[int]) -> Leased:
    handle = Handle("dynamo/EncodeWorker/1", "life", "lease", 0, 4, (1, 1), "float32", "0" * 32, 0.0, True)
    return Leased(Encoded(handle, uuid, metadata), worker=1)


def processor(family: str) -> Processor:
    one = Processor()
    one.family = FAMILIES[family]
    return one


LLAVA, QWEN = "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
PREFILLED = PrefillReply({"remote_host": "x"}, 5.0, [1, 9, 9, 2])


def taken_over(family: str, images: list[Leased], tenant: str = "") -> DecodeRequest:
    request = DecodeRequest("r", [1, 9, 2], [prompt_image(one) for one in images], "{}", tenant_salt(tenant), [7])
    return processor(family).take_over(request, images, PREFILLED)


def test_two_images_under_one_text_never_share_kv_on_decode():
    one, other = taken_over(LLAVA, [leased("a")]), taken_over(LLAVA, [leased("b")])
    assert one.token_ids == other.token_ids == PREFILLED.token_ids, "decode gets the expanded prompt"
    assert one.streamed == [], "they end with it"
    assert one.images == []
    assert (one.kv, one.kv_until) == (PREFILLED.kv, 5.0)
    assert one.cache_salt
    assert one.cache_salt != other.cache_salt


def test_the_order_of_images_is_part_of_what_decode_caches():
    ab = taken_over(LLAVA, [leased("a"), leased("b")])
    ba = taken_over(LLAVA, [leased("b"), leased("a")])
    assert ab.cache_salt != ba.cache_salt


def test_decode_of_a_model_with_image_positions_gets_metadata_and_the_short_prompt():
    request = taken_over(QWEN, [leased("a", image_grid_thw=[1, 4, 4])])
    assert (request.token_ids, request.streamed) == ([1, 9, 2], [7])
    assert (request.kv, request.kv_until) == (PREFILLED.kv, 5.0)
    assert [(image.uuid, image.handle, image.metadata) for image in request.images] == [
        ("a", None, {"image_grid_thw": [1, 4, 4]})
    ]


@pytest.mark.parametrize("family", [LLAVA, QWEN])
def test_tenants_never_share_a_prefix(family):
    images = [leased("a", **({"image_grid_thw": [1, 4, 4]} if family == QWEN else {}))]
    for pictures in (images, []):
        requests = [taken_over(family, pictures, tenant) for tenant in ("", "x", "y")]
        assert len({request.cache_salt for request in requests}) == 3
    assert tenant_salt("") is None


def test_an_answer_goes_on_only_where_its_beginning_can_move_into_the_prompt():
    def sampling(**fields: object) -> str:
        return json.dumps({"temperature": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **fields})

    assert resumable(sampling())
    assert resumable(sampling(temperature=0.0, seed=7))
    assert not resumable(sampling(seed=7))
    assert not resumable(sampling(presence_penalty=0.5))
    assert not resumable(sampling(frequency_penalty=-0.5))
    assert not resumable(sampling(structured_outputs={"json": "{}"}))


def test_what_was_streamed_counts_against_the_limits_of_the_rest():
    from vllm import SamplingParams

    from dynamo_epd.engine.language import decode_sampling, encode_sampling

    for most in (16, 40):  # the first is vLLM's default, which its text leaves out
        text = encode_sampling(SamplingParams(temperature=0.0, max_tokens=most, min_tokens=4))
        assert continued(text, 0) == text
        rest = decode_sampling(continued(text, 3))
        assert (rest.max_tokens, rest.min_tokens, rest.temperature) == (most - 3, 1, 0.0)
        assert decode_sampling(continued(text, 6)).min_tokens == 0
        assert decode_sampling(continued(text, most)).max_tokens == 1
    endless = encode_sampling(SamplingParams(max_tokens=None))
    assert decode_sampling(continued(endless, 6)).max_tokens is None


def test_every_text_of_a_body_is_looked_at():
    body = {
        "messages": [
            {"role": "system", "content": "one"},
            {"role": "user", "name": "two", "content": [{"type": "text", "text": "three"}, {"type": "image_url"}]},
            {"role": "assistant", "content": None},
        ]
    }
    assert {"one", "two", "three"} <= set(texts_of(body))
    assert texts_of({"prompt": ["a", "b"]}) == ["a", "b"]
    assert texts_of({"prompt": "a"}) == ["a"]
    assert texts_of({"prompt": [[1, 2]]}) == []


PROMPT_TOKENS = 7
KV = {"remote_host": "x"}


class CallDouble:
    """A call of ``instance``, which took it: these tokens, then ``end``; None is the end of the answer."""

    taken = True

    def __init__(self, instance: int, tokens: list[int], end: EpdError | None):
        self.instance, self._tokens, self._end = instance, tokens, end

    async def __anext__(self) -> Delta:
        if self._tokens:
            return Delta([self._tokens.pop(0)], prompt_tokens=PROMPT_TOKENS)
        raise self._end or StopAsyncIteration

    async def aclose(self) -> None:
        """Nothing is held."""


class DecodeWorkersDouble:
    """Decode workers, each of which is asked once: it gives one token if it is to, and ends as ``ends`` says.

    ``asked``: what they were asked, in order.
    """

    def __init__(self, *ends: EpdError | None, tokens: int = 0):
        self.asked: list[DecodeRequest] = []
        self._ends = ends
        self._tokens = tokens

    def generate(self, request: DecodeRequest, *, blocks: Any) -> CallDouble:
        self.asked.append(request)
        turn = len(self.asked)
        end = self._ends[turn - 1]
        return CallDouble(turn, [turn] * (self._tokens if end else 1), end)


class PrefillWorkersDouble:
    """Prefill workers that say a first token too, if they may. ``asked``: what they were asked, in order."""

    def __init__(self, finish_reason: str | None = None):
        self.asked: list[PrefillRequest] = []
        self._finish_reason = finish_reason

    def prefill(self, request: PrefillRequest, *, blocks: Any) -> Any:
        self.asked.append(request)
        first = Delta([100 + len(self.asked)], self._finish_reason, prompt_tokens=PROMPT_TOKENS)
        reply = PrefillReply(KV, time.time() + 10, [1, 9, *request.streamed], first=first if request.sampling else None)

        async def only() -> PrefillReply:
            return reply

        return SimpleNamespace(only=only, instance=1, taken=True)


def conversed(
    workers: DecodeWorkersDouble,
    sampling: str = "{}",
    *,
    prefill: PrefillWorkersDouble | None = None,
    heard: Callable[[], None] = lambda: None,
    **config: Any,
) -> list[int]:
    """The tokens of an answer that these workers give. ``heard`` is called with each part of it."""
    unobserved = SimpleNamespace(observe=lambda _: heard())
    conductor: Any = SimpleNamespace(
        config=ProcessorConfig(**config),
        metrics=SimpleNamespace(first_token=unobserved, inter_token=unobserved),
        prefills_apart=lambda *_: prefill is not None,
        blocks_of=lambda *_: (),
        prefill_worker=prefill,
        take_over=processor(LLAVA).take_over,
        decode_worker=workers,
    )
    request: Any = SimpleNamespace(pictures=[], deadline=time.time() + 60, request_id="q", tenant="")
    prompt: Any = SimpleNamespace(request_id="q", token_ids=[1], images=[], sampling=sampling, reasoning=None)

    async def main() -> list[int]:
        async with Conversation(conductor, request) as conversation:
            return [token async for delta in conversation.answer(prompt) for token in delta.token_ids]

    return asyncio.run(main())


@pytest.mark.parametrize("attempts", [1, 2, 3])
@pytest.mark.parametrize(
    "lost", [HandOffFailed("its bytes were wrong"), Preempted("no room")], ids=lambda one: one.code
)
def test_an_answer_is_begun_in_vain_as_often_as_attempts_say_and_no_more(attempts: int, lost: EpdError) -> None:
    workers = DecodeWorkersDouble(*[lost] * 9)
    with pytest.raises(StageUnavailable, match=f"{lost.message}; the request can be sent again"):
        conversed(workers, attempts=attempts)
    assert [one.request_id for one in workers.asked] == [f"q.{attempt}" for attempt in range(attempts)]


def test_by_default_the_third_attempt_is_the_last() -> None:
    lost = HandOffFailed("its bytes were wrong")
    assert conversed(DecodeWorkersDouble(lost, lost, None)) == [3]
    with pytest.raises(StageUnavailable):
        conversed(DecodeWorkersDouble(lost, lost, lost, None))


def test_an_attempt_that_got_further_before_it_was_preempted_is_none_in_vain() -> None:
    """Any other loss costs one of the attempts, however far the answer was."""
    sampling = greedy(max_tokens=16)
    preempted, lost = Preempted("no room"), HandOffFailed("its bytes were wrong")
    workers = DecodeWorkersDouble(*[preempted] * 4, None, tokens=1)
    assert conversed(workers, sampling, attempts=2) == [1, 2, 3, 4, 5]
    assert [one.streamed for one in workers.asked] == [[*range(1, turn)] for turn in range(1, 6)]
    workers = DecodeWorkersDouble(*[lost] * 4, None, tokens=1)
    with pytest.raises(StageUnavailable):
        conversed(workers, sampling, attempts=2)
    assert len(workers.asked) == 2


def greedy(**more: Any) -> str:
    from vllm import SamplingParams

    from dynamo_epd.engine.language import encode_sampling

    return encode_sampling(SamplingParams(temperature=0.0, **more))


def test_the_first_token_is_prefills_and_decode_goes_on_behind_it() -> None:
    from dynamo_epd.engine.language import decode_sampling

    workers, prefill = DecodeWorkersDouble(None), PrefillWorkersDouble()
    assert conversed(workers, greedy(max_tokens=16, min_tokens=3), prefill=prefill) == [101, 1]
    (asked,) = workers.asked
    assert (asked.token_ids, asked.streamed, asked.kv) == ([1, 9], [101], KV)
    rest = decode_sampling(asked.sampling)
    assert (rest.max_tokens, rest.min_tokens) == (15, 2)
    assert decode_sampling(prefill.asked[0].sampling or "").max_tokens == 16


def test_decode_is_asked_before_anyone_reads_prefills_token() -> None:
    workers, prefill = DecodeWorkersDouble(None), PrefillWorkersDouble()
    asked: list[int] = []
    conversed(workers, greedy(), prefill=prefill, heard=lambda: asked.append(len(workers.asked)))
    assert asked[0] == 1


def test_an_answer_that_depends_on_where_it_began_is_begun_by_decode() -> None:
    workers, prefill = DecodeWorkersDouble(None), PrefillWorkersDouble()
    assert conversed(workers, greedy(presence_penalty=0.5), prefill=prefill) == [1]
    assert (prefill.asked[0].sampling, workers.asked[0].streamed) == (None, [])


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_answer_that_is_over_with_its_first_token_goes_to_no_decode_worker(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected: list[Any] = []

    async def reject(self: Conversation, request_id: str, kv: Any, asked: int | None = None) -> None:
        rejected.append((request_id, kv, asked))

    monkeypatch.setattr(Conversation, "_reject", reject)
    workers = DecodeWorkersDouble()
    assert conversed(workers, greedy(), prefill=PrefillWorkersDouble(reason)) == [101]
    assert (workers.asked, rejected) == ([], [("q.0", KV, None)]), "and nobody pulls its KV cache"


def test_prefills_token_alone_is_no_progress_of_a_decode_worker_that_preempts() -> None:
    preempted = Preempted("no room")
    workers, prefill = DecodeWorkersDouble(*[preempted] * 9), PrefillWorkersDouble()
    with pytest.raises(StageUnavailable, match="no room"):
        conversed(workers, greedy(), prefill=prefill, attempts=2)
    assert [one.streamed for one in prefill.asked] == [[], [101]], "what was said is said"
    workers = DecodeWorkersDouble(*[preempted] * 3, None, tokens=1)
    assert conversed(workers, greedy(), prefill=PrefillWorkersDouble(), attempts=2) == [101, 1, 102, 2, 103, 3, 104, 4]


def test_the_trace_says_what_an_answer_has_cost_that_is_given_up(here: Collector) -> None:
    lost = HandOffFailed("its bytes were wrong")
    for tokens in (1, 0):
        with pytest.raises(StageUnavailable), tracing.span("request"):
            conversed(DecodeWorkersDouble(lost, lost, tokens=tokens), attempts=2)
    some, none = (span.attributes for span in here.spans)
    assert none == {"error.type": "stage_unavailable"}
    assert some == none | {"gen_ai.usage.input_tokens": PROMPT_TOKENS, "gen_ai.usage.output_tokens": 2}


def test_a_request_that_ended_two_workers_is_given_no_third_whatever_its_attempts() -> None:
    """On a graph: `tests/hardening/test_faults.py`."""
    workers = DecodeWorkersDouble(*[WorkerLost("the DecodeWorker that was asked went away")] * 9)
    with pytest.raises(StageUnavailable, match="the request is given up"):
        conversed(workers, attempts=9)
    assert len(workers.asked) == ENDED_WORKERS == 2
