# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI layer over tokens that a test's own function produces: no engine, no weights."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd import tracing
from dynamo_epd.engine.delta import Delta, Reasoning, TokenLogprobs
from dynamo_epd.engine.environment import prepare
from dynamo_epd.errors import EpdError, InternalError, InvalidRequest, ModelNotFound, StageUnavailable
from models.untrained import write
from tests.collector import Collector

HELLO = [72, 69, 76, 76, 79]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("model") / "llava"
    write("llava", Path(directory))
    arguments = {
        "model": str(directory),
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 4},
    }
    before = dict(os.environ)
    prepare(arguments)
    yield arguments
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def front(arguments: dict[str, Any]) -> Any:
    from dynamo_epd.engine.front import OpenAIFront

    return OpenAIFront(arguments, ["tiny", "alias"])


class Stages:
    """Stands where encode, prefill and decode are: says tokens, or fails where it is told to."""

    def __init__(
        self, tokens: list[int], *, fail_at: int | None = None, error: Exception | None = None, end: str = "stop"
    ):
        self.tokens, self.fail_at, self.error, self.end = tokens, fail_at, error, end
        self.prompts: list[Any] = []
        self.left_early = 0

    async def __call__(self, prompt: Any) -> AsyncGenerator[Delta, None]:
        self.prompts.append(prompt)
        try:
            for index, token in enumerate(self.tokens):
                if index == self.fail_at and self.error is not None:
                    raise self.error
                last = index == len(self.tokens) - 1
                yield Delta(
                    [token],
                    finish_reason=self.end if last else None,
                    prompt_tokens=99 if index == 0 else None,
                    logprobs=[TokenLogprobs([token, 1], [-0.25, -1.5], 1)] if "logprobs" in prompt.sampling else None,
                )
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            self.left_early += 1
            raise


def ask(front: Any, stages: Stages, **fields: Any) -> tuple[int, Any]:
    """(status, body) or (status, list of events)."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}

    async def main() -> tuple[int, Any]:
        answer = await front.chat(body, stages)
        if answer.events is None:
            return answer.status, json.loads(answer.body)
        return answer.status, [event.removeprefix("data: ").strip() async for event in answer.events]

    return asyncio.run(main())


def test_images_stay_references_in_prompt_order_with_one_placeholder_each(front: Any):
    stages = Stages(HELLO, end="length")
    content = [
        {"type": "image_url", "image_url": {"url": "image:1"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "image:0"}},
    ]
    ask(front, stages, messages=[{"role": "user", "content": content}])
    (prompt,) = stages.prompts
    assert prompt.images == ["image:1", "image:0"]
    assert prompt.token_ids.count(259) == 2, "<image> is token 259, not yet expanded"


def test_usage_counts_what_the_stages_say_the_prompt_was(front: Any):
    _, body = ask(front, Stages(HELLO, end="length"))
    assert body["usage"] == {
        "prompt_tokens": 99,
        "completion_tokens": 5,
        "total_tokens": 104,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_stream_has_a_role_then_text_then_usage_then_done(front: Any):
    status, events = ask(front, Stages(HELLO, end="length"), stream=True, stream_options={"include_usage": True})
    assert status == 200
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    _, whole = ask(front, Stages(HELLO, end="length"))
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["prompt_tokens"] == 99


def test_n_answers_are_n_prompts_with_seeds_of_their_own(front: Any):
    stages = Stages(HELLO, end="length")
    _, body = ask(front, stages, n=3, seed=5)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(json.loads(prompt.sampling)["seed"] for prompt in stages.prompts) == [5, 6, 7]
    assert len({prompt.request_id for prompt in stages.prompts}) == 3


def test_several_greedy_answers_are_several_times_the_likeliest_token(front: Any):
    stages = Stages(HELLO, end="length")
    _, body = ask(front, stages, n=2, temperature=0, top_p=0.5)
    assert len(body["choices"]) == 2
    for prompt in stages.prompts:
        sampling = json.loads(prompt.sampling)
        assert (sampling["top_k"], sampling["top_p"]) == (1, 1.0)


def test_a_stop_string_ends_the_answer_and_the_stages(front: Any):
    stages = Stages([*HELLO, *HELLO, *HELLO], end="length")
    _, whole = ask(front, Stages(HELLO, end="length"))
    text = whole["choices"][0]["message"]["content"]
    _, body = ask(front, stages, stop=[text[2:4]])
    assert body["choices"][0]["message"]["content"] == text[:2]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert stages.left_early == 1, "the worker is told to stop"
    assert json.loads(stages.prompts[0].sampling)["stop"] == [], "stop strings are matched here, on text"


def test_what_a_step_said_after_a_stop_string_is_not_counted(front: Any):
    class Merged(Stages):
        """Several steps in one delta, as a worker sends them that is asked by many."""

        async def __call__(self, prompt: Any) -> AsyncGenerator[Delta, None]:
            logprobs = [TokenLogprobs([token, 1], [-0.25, -1.5], 1) for token in self.tokens]
            yield Delta(self.tokens[:1], prompt_tokens=99, logprobs=logprobs[:1])
            yield Delta(self.tokens[1:], finish_reason="length", logprobs=logprobs[1:])

    _, whole = ask(front, Stages(HELLO, end="length"))
    stop = whole["choices"][0]["message"]["content"][2:4]
    fields = {"stop": [stop], "logprobs": True, "top_logprobs": 2}
    _, stepwise = ask(front, Stages(HELLO, end="length"), **fields)
    _, merged = ask(front, Merged(HELLO), **fields)
    assert merged["usage"] == stepwise["usage"]
    assert merged["choices"] == stepwise["choices"]
    assert merged["usage"]["completion_tokens"] < len(HELLO)


def test_logprobs_come_through_where_the_sampled_token_is_and_is_not_the_likeliest(front: Any):
    _, body = ask(front, Stages(HELLO, end="length"), logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [-0.25] * 5
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_keeps_its_class(front: Any, stream: bool):
    stages = Stages(HELLO, fail_at=0, error=StageUnavailable("no encode worker is left"))
    with pytest.raises(StageUnavailable, match="no encode worker is left"):
        ask(front, stages, stream=stream)


def test_a_failure_in_mid_stream_is_raised_and_never_followed_by_done(front: Any):
    class Slow(Stages):
        async def __call__(self, prompt: Any) -> AsyncGenerator[Delta, None]:
            async for delta in super().__call__(prompt):
                yield delta
                await asyncio.sleep(0.05)  # so that events are read one by one

    stages = Slow(HELLO, fail_at=3, error=StageUnavailable("gone"))
    events = []

    async def main() -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        answer = await front.chat(body, stages)
        async for event in answer.events:
            events.append(event)

    with pytest.raises(StageUnavailable, match="gone"):
        asyncio.run(main())
    assert len(events) >= 2
    assert not any("[DONE]" in event or '"error"' in event for event in events)


def test_a_defect_shows_nothing_of_itself(front: Any):
    with pytest.raises(InternalError) as caught:
        ask(front, Stages(HELLO, fail_at=1, error=RuntimeError("secret of the house")))
    assert "secret" not in caught.value.message


def test_an_answer_that_just_ends_is_an_error(front: Any):
    class Short(Stages):
        async def __call__(self, prompt: Any) -> AsyncGenerator[Delta, None]:
            yield Delta([72], prompt_tokens=3)

    with pytest.raises(InternalError):
        ask(front, Short([]))


def test_a_client_that_leaves_closes_the_stages(front: Any):
    stages = Stages(HELLO * 50, end="length")

    async def main() -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2}
        answer = await front.chat(body, stages)
        await anext(answer.events)
        await answer.events.aclose()
        assert stages.left_early == 2
        assert front._engine.output_processor.get_num_unfinished_requests() == 0

    asyncio.run(main())


def test_an_answer_that_is_given_up_is_no_refusal(front: Any):
    """vLLM makes an answer of it: 400, the client has left."""
    stages = Stages(HELLO * 50, end="length")

    async def main() -> None:
        asking = asyncio.create_task(
            front.chat({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}, stages)
        )
        while not stages.prompts:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert stages.left_early == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "nobody"}, ModelNotFound, "model"),
        ({"temperature": -1}, InvalidRequest, "temperature"),
        ({"max_tokens": 10**9}, InvalidRequest, "max_tokens"),
        ({"messages": "no list"}, InvalidRequest, "messages"),
        ({"logit_bias": {"99999": 1}}, InvalidRequest, "logit_bias"),
    ],
)
def test_what_vllm_refuses_is_refused_before_any_stage_is_asked(
    front: Any, fields: dict[str, Any], error: type[EpdError], param: str
):
    stages = Stages(HELLO)
    with pytest.raises(error) as caught:
        ask(front, stages, **fields)
    assert param in (caught.value.param or "")
    assert stages.prompts == []


def tool(name: str, kind: str) -> dict[str, Any]:
    """As pydantic's models with a nested class become tools."""
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": kind}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("parser", "refuses"), [("llama4_pythonic", True), ("hermes", False)])
def test_tools_that_define_one_name_in_two_ways_are_refused_where_that_is_one_grammar(
    arguments: dict[str, Any], parser: str, refuses: bool, stream: bool
) -> None:
    from dynamo_epd.engine.front import OpenAIFront

    front = OpenAIFront(arguments, ["tiny"], tool_parser=parser)
    for other in ("string", "integer"):
        stages = Stages(HELLO, end="length")
        fields = {"tools": [tool("f", "string"), tool("g", other)], "tool_choice": "required", "stream": stream}
        if refuses and other == "integer":
            with pytest.raises(InvalidRequest, match=r"'\$defs'") as caught:
                ask(front, stages, **fields)
            assert (caught.value.status, caught.value.param, stages.prompts) == (400, "tools", [])
        else:
            assert ask(front, stages, **fields)[0] == 200


@pytest.mark.parametrize("defect", [ValueError, TypeError, OverflowError])
def test_a_defect_beside_the_stages_is_no_refusal(
    front: Any, monkeypatch: pytest.MonkeyPatch, defect: type[Exception]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise defect("secret of the house")

    monkeypatch.setattr(front._engine.input_processor, "process_inputs", broken)
    with pytest.raises(Exception, match="secret of the house") as caught:
        ask(front, Stages(HELLO))
    assert not isinstance(caught.value, EpdError), "the worker logs it, and says InternalError to others"


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [999_999_937]},
        {"max_tokens": 999_999_937},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zq7mark"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "zq7mark("}},
            }
        },
        {"messages": [{"role": "user", "content": "zq7mark" * 5000}]},
    ],
    ids=["a token", "a number", "a type", "a pattern", "a text"],
)
def test_a_refusal_of_vllms_does_not_repeat_what_the_client_sent(front: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(front, Stages(HELLO), **fields)
    assert "zq7mark" not in caught.value.message and "value=" not in caught.value.message


def test_a_template_says_itself_what_it_does_not_take(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front._chat.online_renderer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    turn = {"role": "user", "content": "hi"}
    with pytest.raises(InvalidRequest, match=r"^roles must alternate$"):
        ask(front, Stages(HELLO), messages=[turn, turn])


def test_a_json_schema_travels_as_a_grammar(front: Any):
    stages = Stages(HELLO, end="length")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    ask(front, stages, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    sampling = json.loads(stages.prompts[0].sampling)
    assert (
        json.loads(sampling["structured_outputs"]["json"]) == schema
        if isinstance(sampling["structured_outputs"]["json"], str)
        else sampling["structured_outputs"]["json"] == schema
    )


def test_completions_take_many_prompts(front: Any):
    stages = Stages(HELLO, end="length")

    async def main() -> Any:
        return await front.complete({"model": "alias", "prompt": ["a", "b"], "max_tokens": 5}, stages)

    body = json.loads(asyncio.run(main()).body)
    assert len(body["choices"]) == 2
    assert len(stages.prompts) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_many_prompts_that_fails_fails_them_all_by_its_own_class(front: Any, stream: bool):
    class OneFails(Stages):
        async def __call__(self, prompt: Any) -> AsyncGenerator[Delta, None]:
            self.prompts.append(prompt)
            fails = len(self.prompts) == 2
            yield Delta(HELLO, prompt_tokens=99)
            if fails:
                await asyncio.sleep(0.1)
                raise StageUnavailable("gone")
            await asyncio.sleep(5)

    stages = OneFails([])

    async def read(body: dict[str, Any]) -> None:
        answer = await front.complete(body, stages)
        async for _ in answer.events:
            """Until it fails."""

    async def main() -> None:
        body = {"model": "alias", "prompt": ["a", "b"], "max_tokens": 100, "stream": stream}
        with pytest.raises(StageUnavailable, match="gone"):
            await read(body)
        async with asyncio.timeout(5):  # the other one is being given up
            while front._engine.output_processor.get_num_unfinished_requests():
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_what_a_parser_of_reasoning_goes_by_reaches_it_and_the_stages(front: Any):
    """The prompt's last ids here, and there what the chat template was given."""
    from vllm import SamplingParams

    from dynamo_epd.engine import front as module

    stages = Stages(HELLO, end="length")

    async def main() -> list[int]:
        module._current.set(module._Run(stages))
        prompt = {"type": "token", "prompt_token_ids": [72, 69, 76]}
        outputs = front._engine.generate(
            prompt,
            SamplingParams(max_tokens=5),
            "r",
            reasoning_ended=False,
            reasoning_parser_kwargs={"chat_template_kwargs": {"thinking": True}},
        )
        return [output async for output in outputs][-1].prompt_token_ids

    seen = asyncio.run(main())
    assert len(seen) == 99
    assert seen[-3:] == [72, 69, 76]
    assert stages.prompts[0].reasoning == Reasoning(False, {"thinking": True})


def test_a_placeholder_among_token_ids_is_refused(front: Any):
    with pytest.raises(InvalidRequest):
        front.refuse_token_ids(("<image>",), [[1, 2], [3, 259]])
    front.refuse_token_ids(("<image>",), [1, 2, 3])
    front.refuse_token_ids(("<image>",), "text")


def test_sampling_parameters_survive_their_journey(front: Any):
    from vllm import SamplingParams

    from dynamo_epd.engine.language import decode_sampling, encode_sampling

    params = SamplingParams(n=3, temperature=0.5, top_k=4, seed=9, stop=["x"], logit_bias={5: 1.5}, stop_token_ids=[7])
    there = decode_sampling(encode_sampling(params))
    assert (there.n, there.temperature, there.top_k, there.seed, there.stop) == (1, 0.5, 4, 9, [])
    assert there.logit_bias == {5: 1.5}
    assert there.stop_token_ids == [7]
    assert there.detokenize is False
    with pytest.raises(InvalidRequest):
        decode_sampling('{"temperature": "warm"}')


def told_and_said(
    front: Any, here: Collector, way: str, body: dict[str, Any], stages: Stages, read: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the trace is told of a reply, and the reply: its body or its events. ``read``: so many events at most."""

    async def main() -> list[dict[str, Any]]:
        with tracing.span("request"):
            answer = await getattr(front, way)({"model": "alias", **body}, stages)
            if answer.events is None:
                return [json.loads(answer.body)]
            said = []
            async with aclosing(answer.events) as events:
                async for event in events:
                    said.append(event)
                    if len(said) == read:
                        break
            return [json.loads(event.removeprefix("data: ")) for event in said if "[DONE]" not in event]

    said = asyncio.run(main())
    (span,) = here.spans
    return span.attributes, said


@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("way", "fields"),
    [
        ("chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("chat", {"messages": [{"role": "user", "content": "hi"}], "n": 3}),
        ("chat", {"messages": [{"role": "user", "content": "hi"}], "stop": ["L"]}),
        ("complete", {"prompt": ["hi", "you"], "n": 2, "max_tokens": 5}),
    ],
    ids=["chat", "several answers", "stop", "several prompts"],
)
def test_the_trace_says_what_the_reply_says(
    front: Any, here: Collector, way: str, fields: dict[str, Any], stream: dict[str, Any]
) -> None:
    told, said = told_and_said(front, here, way, {**fields, **stream}, Stages(HELLO, end="length"))
    assert (told["gen_ai.response.id"], told["gen_ai.response.model"]) == (said[0]["id"], "tiny")
    ends = {one["index"]: one["finish_reason"] for reply in said for one in reply["choices"] if one["finish_reason"]}
    assert told["gen_ai.response.finish_reasons"] == [ends[index] for index in sorted(ends)]
    assert len(ends) == fields.get("n", 1) * len(fields.get("prompt", [""]))
    asked = (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"])
    if used := said[-1].get("usage"):
        assert asked == (used["prompt_tokens"], used["completion_tokens"])
    else:  # nobody asked for it in the stream; it is known all the same
        used = whole(front, way, fields)["usage"]
        assert asked == (used["prompt_tokens"], used["completion_tokens"])


def whole(front: Any, way: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The body of the same without a stream."""

    async def main() -> Any:
        answer = await getattr(front, way)({"model": "alias", **fields}, Stages(HELLO, end="length"))
        return json.loads(answer.body)

    return asyncio.run(main())


def test_of_a_stream_that_is_left_the_trace_says_what_there_was(front: Any, here: Collector) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    told, said = told_and_said(front, here, "chat", body, Stages(HELLO, end="length"), read=2)
    assert told["gen_ai.response.id"] == said[0]["id"]
    assert "gen_ai.response.finish_reasons" not in told
    assert 0 < told["gen_ai.usage.output_tokens"] <= len(HELLO)


def test_of_a_refusal_the_trace_says_no_reply(front: Any, here: Collector) -> None:
    async def main() -> None:
        with tracing.span("request"), pytest.raises(ModelNotFound):
            await front.chat({"model": "none", "messages": [{"role": "user", "content": "hi"}]}, Stages(HELLO))

    asyncio.run(main())
    (span,) = here.spans
    assert span.attributes == {}
