# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client against the disaggregated graph: what it sends is taken, what it gets it can read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.picture_server import PictureServer
from tests.questions import MODEL, data_url, picture, user
from tests.serving import Graph, at_rest

COLOURS = {"enum": ["red", "green", "blue"]}
SCHEMA = {
    "type": "object",
    "properties": {"colour": COLOURS, "bright": {"type": "boolean"}},
    "required": ["colour", "bright"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(disagg: Graph) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{disagg.url}/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def request(seed: int = 200_000, **fields: Any) -> dict[str, Any]:
    messages = [user("What is in this image?", data_url(picture(seed)))]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, **fields}


def test_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**request())
    assert reply.model == MODEL
    (choice,) = reply.choices
    assert choice.finish_reason in ("length", "stop")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_what_a_whole_reply_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**request())
    chunks = list(client.chat.completions.create(**request(), stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**request())
    *chunks, last = client.chat.completions.create(**request(), stream=True, stream_options={"include_usage": True})
    assert chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_picture_by_http_is_that_of_a_data_url(client: openai.OpenAI) -> None:
    with PictureServer() as server:
        by_http = request(messages=[user("What is in this image?", server.put("a.png", picture(200_000)))])
        said = client.chat.completions.create(**by_http)
        assert server.asked == ["a.png"]
    assert said.choices[0].message.content == client.chat.completions.create(**request()).choices[0].message.content


def test_several_answers(client: openai.OpenAI, disagg: Graph) -> None:
    """vLLM refuses several greedy answers; with one token to choose from, sampling is greedy too."""
    one = client.chat.completions.create(**request())
    greedy = request(temperature=1.0, extra_body={"top_k": 1})
    three = client.chat.completions.create(**greedy, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert {choice.message.content for choice in three.choices} == {one.choices[0].message.content}
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    said = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**greedy, n=2, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(said.values()) == {one.choices[0].message.content}
    sampled = client.chat.completions.create(**request(temperature=1.0), n=4, seed=3)
    assert len({choice.message.content for choice in sampled.choices}) == 4
    at_rest(disagg, 5)


def test_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**request(), logprobs=True, top_logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert reply.usage is not None
    assert len(logprobs.content) == reply.usage.completion_tokens
    for position in logprobs.content:
        assert len(position.top_logprobs) == 3
        assert position.logprob == max(one.logprob for one in position.top_logprobs)  # greedy


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    # Long enough: a random model's answer of 24 tokens may hold no letter at all.
    text = client.chat.completions.create(**request(max_tokens=96)).choices[0].message.content or ""
    stop = next(letter for letter in text[3:] if letter.isascii() and letter.isprintable())
    reply = client.chat.completions.create(**request(max_tokens=96), stop=[stop])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content == text[: text.index(stop)]


def test_a_seed_repeats_a_sample(client: openai.OpenAI) -> None:
    def text(seed: int) -> str | None:
        return client.chat.completions.create(**request(temperature=1.0), seed=seed).choices[0].message.content

    assert text(5) == text(5)
    assert len({text(seed) for seed in range(5)}) > 1


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "look", "schema": SCHEMA, "strict": True}}
    for seed in (200_000, 200_001):
        reply = client.chat.completions.create(**request(seed, max_tokens=300), response_format=schema)
        assert reply.choices[0].finish_reason == "stop", reply
        found = json.loads(reply.choices[0].message.content or "")
        assert found["colour"] in COLOURS["enum"]
        assert isinstance(found["bright"], bool)


def test_completions(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=1)
    assert one.choices[0].logprobs is not None
    assert len(one.choices[0].logprobs.tokens or []) == 8
    both = client.completions.create(model=MODEL, prompt=["Once upon a time", "Then"], max_tokens=8, temperature=0)
    assert both.choices[0].text == one.choices[0].text
    assert both.choices[1].text != one.choices[0].text
    chunks = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_ignored_fields_are_no_error(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        **request(), user="me", metadata={"a": "b"}, store=False, service_tier="auto"
    )
    assert reply.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"model": "../x"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "invalid_request"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_request"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_request"),
        ({"n": 10**9}, openai.BadRequestError, "invalid_request"),
        ({"extra_body": {"cache_salt": "x"}}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"priority": 1}}, openai.BadRequestError, "unsupported_parameter"),
        ({"messages": [user("?", "data:image/png;base64,!!!")]}, openai.BadRequestError, None),
        ({"messages": [user("?", data_url(b"GIF89a no picture"))]}, openai.BadRequestError, "invalid_image"),
        ({"messages": [user("?", data_url(b"<svg/>", "svg+xml"))]}, openai.APIStatusError, "unsupported_media_type"),
        ({"messages": [user("?", "http://169.254.169.254/x")]}, openai.BadRequestError, "url_not_allowed"),
        ({"messages": [user("?", *[data_url(picture(1))] * 9)]}, openai.BadRequestError, "too_many_images"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_exception_of_its_class(
    client: openai.OpenAI, stream: bool, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**request(**fields), stream=stream)
    assert refused.value.type == "invalid_request_error"
    assert code is None or refused.value.code == code
    assert len(refused.value.response.content) < 2048
    assert refused.value.message
