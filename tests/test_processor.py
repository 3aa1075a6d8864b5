# SPDX-License-Identifier: Apache-2.0
"""What the processor decides by itself; the conducting is tested on running graphs (test_graph_disagg.py)."""

from __future__ import annotations

import json

import pytest

from components.processor import Leased, Processor, continued, prompt_image, resumable, tenant_salt, texts_of
from components.protocol import DecodeRequest, Encoded, Handle, PrefillReply
from dynamo_epd.families import FAMILIES


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
