# SPDX-License-Identifier: Apache-2.0
"""HARDENING's rows on fields and values of a public body."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dynamo_epd.errors import EpdError, InvalidRequest, UnsupportedParameter
from dynamo_epd.http.body import BodyLimits, check_chat, check_completion

LIMITS = BodyLimits()
PICTURE = "data:image/png;base64,AAAA"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", **fields}


def asking(*parts: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(parts)}])


def image(url: Any = PICTURE, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def refused(body: dict[str, Any], check: Any = check_chat) -> EpdError:
    with pytest.raises(InvalidRequest) as caught:
        check(body, LIMITS)
    assert caught.value.status == 400
    return caught.value


HONOURED: dict[str, Any] = {
    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "n": 2, "temperature": 0.5,
    "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -3, "stop": ["a", "b"], "frequency_penalty": -2.0,
    "presence_penalty": 2.0, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [7],
    "logit_bias": {"5": -100.0}, "include_stop_str_in_output": True, "skip_special_tokens": False,
}  # fmt: skip


def test_honoured_fields_pass_unchanged() -> None:
    more = {
        "max_completion_tokens": 7,
        "logprobs": True,
        "top_logprobs": 20,
        "response_format": {"type": "json_object"},
    }
    body = chat(**HONOURED, **more)
    assert check_chat(body, LIMITS).body == body
    body = completion(**HONOURED, logprobs=3)
    assert check_completion(body, LIMITS).body == body


def test_every_honoured_field_is_one_that_vllm_reads() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from dynamo_epd.http import body

    sampling = body._sampling(LIMITS).keys()
    assert sampling <= ChatCompletionRequest.model_fields.keys()
    assert sampling <= CompletionRequest.model_fields.keys()
    ChatCompletionRequest.model_validate(check_chat(chat(**HONOURED), LIMITS).body)
    CompletionRequest.model_validate(check_completion(completion(**HONOURED), LIMITS).body)


def test_every_other_field_of_vllm_is_refused_by_name() -> None:
    """The next release of vLLM may add a field; the allow list must still be one."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    served = HONOURED.keys() | {"model", "user", "messages", "prompt"}
    own = {"max_completion_tokens", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice"}
    for fields, base, check, honoured in (
        (ChatCompletionRequest.model_fields, chat, check_chat, served | own | {"parallel_tool_calls"}),
        (CompletionRequest.model_fields, completion, check_completion, served | {"logprobs", "echo"}),
    ):
        others = fields.keys() - honoured
        assert len(others) > 20
        for name in others:
            error = refused(base(**{name: 1}), check)
            assert isinstance(error, UnsupportedParameter) and error.param == name


def test_ignored_fields_are_accepted_and_dropped() -> None:
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert check_chat(chat(**ignored), LIMITS).body == chat()
    assert check_completion(completion(**ignored), LIMITS).body == completion()


REFUSED = [
    "image_embeds", "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "cache_salt", "uuid",
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "chat_template_kwargs", "priority", "request_id",
    "vllm_xargs", "structured_outputs", "guided_regex", "guided_json", "echo", "documents", "add_generation_prompt",
    "continue_final_message", "allowed_token_ids", "bad_words", "prompt_logprobs", "use_beam_search", "nvext",
    "truncate_prompt_tokens", "return_token_ids", "session_id", "logits_processors", "lora_request", "__proto__", "",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("value", [{"do_remote_prefill": True, "remote_host": "10.0.0.1"}, None, False], ids=str)
def test_a_field_that_is_not_public_is_refused_whatever_its_value(name: str, value: Any) -> None:
    error = refused(chat(**{name: value}))
    assert error.code == "unsupported_parameter" and error.param == name
    assert "10.0.0.1" not in error.message


@pytest.mark.parametrize("name", ["cache_salt", "kv_transfer_params", "prompt_embeds", "response_format", "messages"])
def test_completions_refuse_the_same(name: str) -> None:
    assert refused(completion(**{name: "x"}), check_completion).param == name


OPENAI_ONLY = [
    "audio", "modalities", "prediction", "web_search_options", "functions", "function_call", "reasoning_effort",
    "verbosity", "prompt_cache_key", "safety_identifier", "suffix", "best_of",
]  # fmt: skip


@pytest.mark.parametrize("name", OPENAI_ONLY)
def test_a_field_of_openai_that_is_not_served_may_only_be_null(name: str) -> None:
    error = refused(chat(**{name: ["audio"]}))
    assert error.code == "unsupported_parameter" and error.param == name
    assert check_chat(chat(**{name: None}), LIMITS).body == chat()


OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    ("n", 10**9), ("n", 0), ("n", 17), ("n", True), ("n", "2"), ("n", 1.5), ("max_tokens", 10**12), ("max_tokens", 0),
    ("max_tokens", -1), ("max_completion_tokens", 2**31 + 1), ("temperature", float("nan")),
    ("temperature", float("inf")), ("temperature", -0.1), ("temperature", 2.1), ("temperature", "0"), ("top_p", 0),
    ("top_p", 1.1), ("top_k", -2), ("top_k", 0.5), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -3),
    ("repetition_penalty", 0), ("repetition_penalty", 5e-324), ("repetition_penalty", 11), ("seed", 2**63),
    ("seed", "a"), ("min_tokens", -1),
    ("stop", ["x"] * 10**5), ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", ""), ("stop", [1]), ("stop", 5),
    ("logit_bias", {str(i): 0 for i in range(10**6)}), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": None}), ("logit_bias", {"-1": 1}), ("logit_bias", [1]), ("logit_bias", {"\u0661": 1}),
    ("top_logprobs", 21), ("top_logprobs", -1), ("logprobs", 1), ("stream", "true"), ("stream", 1),
    ("stop_token_ids", [-1]), ("stop_token_ids", list(range(129))), ("ignore_eos", 1), ("model", 5), ("model", ""),
    ("model", "m" * 257), ("stream_options", {"x": 1}), ("stream_options", []), ("response_format", "json"),
    ("response_format", {"type": "structural_tag", "format": {}}), ("response_format", {"type": "regex"}),
    ("response_format", {"type": "text", "regex": "(a+)+$"}), ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_object", "json_schema": {}}),
    ("tools", []), ("tools", [{"type": "function", "function": {"name": "f"}}] * 129), ("tools", [{"type": "web"}]),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]), ("tools", {}), ("tool_choice", "auto"),
    ("parallel_tool_calls", "yes"), ("messages", []), ("messages", "hi"), ("messages", None), ("messages", [5]),
    ("messages", [{"role": "user", "content": "x"}] * 1025), ("messages", [{"role": "root", "content": "x"}]),
    ("messages", [{"role": ["user"], "content": "x"}]), ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user"}]), ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": "user", "content": []}]), ("messages", [{"role": "tool", "content": "x"}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS, ids=lambda item: str(item)[:40])
def test_a_value_out_of_bounds_is_refused_with_its_name(name: str, value: Any) -> None:
    error = refused(chat(**{name: value}))
    assert error.param is not None and error.param.startswith(name)
    assert len(error.message) < 300


def test_values_at_their_bounds_pass() -> None:
    for fields in (
        {"n": 16}, {"max_tokens": 2**31}, {"temperature": 0}, {"temperature": 2}, {"top_p": 1},
        {"stop": ["x" * 256] * 16}, {"logit_bias": {str(i): 100 for i in range(1024)}}, {"seed": 2**63 - 1},
        {"top_k": -1}, {"max_tokens": 5.0},
        {"messages": [{"role": "user", "content": "x"}] * 1024},
    ):  # fmt: skip
        assert check_chat(chat(**fields), LIMITS).body.keys() >= fields.keys()


def test_null_means_not_given() -> None:
    assert check_chat(chat(max_tokens=None, stop=None, tools=None, seed=None), LIMITS).body == chat()


def test_stream_options_need_a_stream() -> None:
    assert refused(chat(stream_options={"include_usage": True})).param == "stream_options"


def test_top_logprobs_need_logprobs() -> None:
    assert refused(chat(top_logprobs=3)).param == "top_logprobs"


# --- content parts


def test_images_come_out_in_order_of_appearance_and_can_be_replaced() -> None:
    body = chat(
        messages=[
            {"role": "system", "content": "look"},
            {
                "role": "user",
                "content": [
                    image("https://a.example/1"),
                    {"type": "text", "text": "?"},
                    image("https://a.example/2", detail="low"),
                ],
            },
            {"role": "assistant", "content": "fine"},
            {"role": "user", "content": [{"type": "image_url", "image_url": "https://a.example/3"}]},
        ]
    )
    checked = check_chat(body, LIMITS)
    assert [ref.url for ref in checked.images] == [f"https://a.example/{i}" for i in (1, 2, 3)]
    assert [ref.param for ref in checked.images] == [
        "messages[1].content[0]",
        "messages[1].content[2]",
        "messages[3].content[0]",
    ]
    for i, ref in enumerate(checked.images):
        ref.replace(f"ref:{i}")
    assert checked.body["messages"][1]["content"] == [
        {"type": "image_url", "image_url": {"url": "ref:0"}},
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": "ref:1"}},
    ]
    assert checked.body["messages"][3]["content"] == [{"type": "image_url", "image_url": {"url": "ref:2"}}]
    assert body["messages"][1]["content"][0]["image_url"]["url"] == "https://a.example/1"  # the client's is untouched


def test_the_same_picture_twice_is_two_images() -> None:
    one = image()
    first, second = check_chat(asking(one, one), LIMITS).images
    first.replace("a")
    assert second.url == PICTURE


def test_more_images_than_allowed_are_refused() -> None:
    assert len(check_chat(asking(*[image()] * 8), LIMITS).images) == 8
    error = refused(asking(*[image()] * 9))
    assert error.code == "too_many_images"
    spread = [{"role": "user", "content": [image()] * 3}] * 3
    assert refused(chat(messages=spread)).code == "too_many_images"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "https://a.example/"}},
        {"type": "video_url", "video_url": {"url": "https://a.example/"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "image_pil", "image_pil": "x"},
        {"type": "input_image", "image_url": "https://a.example/"},
        {"type": "input_text", "text": "x"},
        {"type": "refusal", "refusal": "x"},
        {"type": "thinking", "thinking": "x"},
    ],
    ids=lambda part: part["type"],
)
def test_another_type_of_part_is_refused_with_its_place(part: dict[str, Any]) -> None:
    error = refused(asking({"type": "text", "text": "x"}, part))
    assert error.code == "unsupported_parameter" and error.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({**image(), "uuid": "cache-key"}, "messages[0].content[0].uuid"),
        ({**image(), "uuid": None}, "messages[0].content[0].uuid"),
        ({**image(), "image_embeds": "AAAA"}, "messages[0].content[0].image_embeds"),
        ({**image(), "text": "x"}, "messages[0].content[0].text"),
        ({"type": "text", "text": "x", "cache_control": {}}, "messages[0].content[0].cache_control"),
        (image(uuid="k"), "messages[0].content[0].image_url.uuid"),
        (image(detail="huge"), "messages[0].content[0].image_url.detail"),
        (image(""), "messages[0].content[0].image_url.url"),
        (image(None), "messages[0].content[0].image_url.url"),
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": None}, "messages[0].content[0].image_url"),
        ({"type": "text"}, "messages[0].content[0].text"),
        ({"type": "text", "text": 5}, "messages[0].content[0].text"),
        ({"text": "x"}, "messages[0].content[0].type"),
        ({"image_url": {"url": PICTURE}}, "messages[0].content[0].type"),
        ({"type": ["text"], "text": "x"}, "messages[0].content[0].type"),
        ("text", "messages[0].content[0]"),
    ],
)
def test_a_part_with_more_or_less_than_it_has_is_refused(part: Any, param: str) -> None:
    assert refused(asking(part)).param == param


@pytest.mark.parametrize("key", ["uuid", "prefix", "tools", "weight", "tool_call_id", "tool_calls"])
def test_an_unknown_key_of_a_message_is_refused(key: str) -> None:
    error = refused(chat(messages=[{"role": "user", "content": "x", key: "y"}]))
    assert error.code == "unsupported_parameter" and error.param == f"messages[0].{key}"


def test_a_key_of_the_clients_is_shown_short_and_plain() -> None:
    error = refused(chat(**{"<script>\n" + "k" * 5000: 1}))
    assert error.param is not None and len(error.param) <= 64 and "<" not in error.param and "\n" not in error.param


def test_a_turn_with_tools_passes_as_history() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "go", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    checked = check_chat(chat(messages=messages), LIMITS).body["messages"]
    assert checked[2] == {"role": "assistant", "tool_calls": [call]}
    assert checked[0] == messages[0] and checked[1] == messages[1] and checked[3] == messages[3]


@pytest.mark.parametrize("arguments", ["[" * 100_000, "{", "5", '{"a":1,"a":2}', 7])
def test_arguments_of_a_past_call_are_an_object_within_bounds(arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    error = refused(chat(messages=[{"role": "assistant", "tool_calls": [call]}]))
    assert error.param == "messages[0].tool_calls[0].function.arguments"


# --- tools and formats


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}


def test_a_schema_passes() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    body = chat(response_format=schema_format(schema))
    assert check_chat(body, LIMITS).body == body


def test_a_schema_is_checked_wherever_it_stands() -> None:
    cyclic = {"$ref": "#"}
    assert refused(chat(response_format=schema_format(cyclic))).param == "response_format.json_schema.schema"
    tool = {"type": "function", "function": {"name": "f", "parameters": cyclic}}
    assert refused(chat(tools=[tool])).param == "tools[0].function.parameters"


def test_all_tools_together_are_bounded() -> None:
    def tools(count: int) -> list[dict[str, Any]]:
        schema = {"type": "object", "description": "x" * 60_000}
        return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]

    assert len(check_chat(chat(tools=tools(8)), LIMITS).body["tools"]) == 8
    assert refused(chat(tools=tools(9))).param == "tools"


def test_tool_choice_names_one_of_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    for choice in ("none", "auto", "required", {"type": "function", "function": {"name": "f"}}):
        body = chat(tools=tools, tool_choice=choice)
        assert check_chat(body, LIMITS).body == body
    other = {"type": "function", "function": {"name": "g"}}
    assert refused(chat(tools=tools, tool_choice=other)).param == "tool_choice"
    assert refused(chat(tools=tools, tool_choice="any")).param == "tool_choice"


# --- completions


@pytest.mark.parametrize("prompt", ["hi", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_every_form_of_a_prompt_passes(prompt: Any) -> None:
    assert check_completion(completion(prompt=prompt), LIMITS).body["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt", [None, [], 5, {}, [[]], ["a", 1], [1, "a"], [-1], [True], [[1], "a"], ["a"] * 17, [2**31]]
)
def test_another_prompt_is_refused(prompt: Any) -> None:
    error = refused(completion(prompt=prompt), check_completion)
    assert error.param is not None and error.param.startswith("prompt")


def test_echo_is_served_only_as_false() -> None:
    assert check_completion(completion(echo=False), LIMITS).body == completion()
    assert refused(completion(echo=True), check_completion).code == "unsupported_parameter"


def test_the_edge_loads_nothing_heavy() -> None:
    modules = "dynamo_epd.http.body, dynamo_epd.http.limits, dynamo_epd.http.errors"
    modules += ", dynamo_epd.images.fetch, dynamo_epd.images.decode"
    program = f"import sys, {modules}; print(sorted({{'torch', 'vllm', 'nixl', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("prompt", "n"),
    [(["a"] * 16, 1), (["a"] * 4, 4), ("a", 16), ([1] * 100, 16), ([[1, 2]] * 5, 3), (["a"] * 16, None)],
)
def test_prompts_times_answers_within_the_bound_are_taken(prompt: Any, n: int | None) -> None:
    assert check_completion(completion(prompt=prompt, n=n), LIMITS).body["prompt"] == prompt


@pytest.mark.parametrize(("prompt", "n"), [(["a"] * 16, 16), (["a"] * 2, 9), ([[1, 2]] * 6, 3)])
def test_prompts_times_answers_above_the_bound_are_refused(prompt: Any, n: int) -> None:
    assert refused(completion(prompt=prompt, n=n), check_completion).param == "n"
