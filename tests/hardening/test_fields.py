# SPDX-License-Identifier: Apache-2.0
"""Rows of HARDENING.md about what stands in a body: fields that only the inside may set, numbers, texts, schemas."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.hardening.edge import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    EVERY,
    IMAGES,
    JOBS,
    MARK,
    PICTURES,
    PREDICT,
    PREDICT_TEXT,
    TEXT,
    VALIDATIONS,
    Door,
    Entry,
    answered_or_refused,
    refused,
)
from tests.questions import data_url, picture, user

pytestmark = pytest.mark.usefixtures("unharmed")


def name_of(entry: Entry) -> str:
    return entry.name


INSIDE: dict[str, Any] = {
    "image_embeds": f"{MARK}",
    "prompt_embeds": f"{MARK}",
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 0},
    "ec_transfer_params": {"remote_host": "127.0.0.1", "remote_port": 0},
    "cache_salt": MARK,
    "mm_processor_kwargs": {"max_pixels": 10**12},
    "media_io_kwargs": {"image": {"mode": MARK}},
    "chat_template": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "chat_template_kwargs": {"chat_template": MARK},
    "priority": -(10**9),
    "request_id": MARK,
    "vllm_xargs": {"a": MARK},
    "guided_regex": "(a+)+$",
    "structured_outputs": {"regex": "(a+)+$"},
    "guided_decoding_backend": MARK,
    "logits_processors": ["os.system"],
    "documents": [{"text": MARK}],
    "allowed_local_media_path": "/",
    "trust_remote_code": True,
    "tenant": MARK,
    "deadline": 0,
    "keep": f"../../{MARK}",
    "__class__": MARK,
}


@pytest.mark.usefixtures("neighbour")
class TestFieldsOfTheInside:
    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize("field", INSIDE)
    def test_a_public_body_may_not_set_it(self, door: Door, entry: Entry, field: str) -> None:
        value = INSIDE[field]
        if isinstance(value, dict) and "remote_port" in value:
            value = value | {"remote_port": door.canary.port}
        refused(door.post(entry, entry.with_(**{field: value})), 400, "unsupported_parameter", field)

    @pytest.mark.parametrize("entry", [CHAT, COMPLETIONS], ids=name_of)
    @pytest.mark.parametrize("field", ["kv_transfer_params", "cache_salt", "prompt_embeds", "priority"])
    def test_not_even_as_null_or_in_a_stream(self, door: Door, entry: Entry, field: str) -> None:
        refused(door.post(entry, entry.with_(**{field: None})), 400, "unsupported_parameter", field)
        refused(door.post(entry, entry.with_(**{field: 1}, stream=True)), 400, "unsupported_parameter", field)

    @pytest.mark.parametrize("field", ["uuid", "image_embeds", "min_pixels", "cache_control", "io"])
    @pytest.mark.parametrize("where", ["part", "image_url"])
    def test_nor_a_part_of_a_message(self, door: Door, field: str, where: str) -> None:
        """``uuid`` would be a cache key of the client's choice: another's picture under it."""
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
        (part if where == "part" else part["image_url"])[field] = MARK
        name = "messages[0].content[0]" + ("" if where == "part" else ".image_url")
        body = CHAT.with_(messages=[{"role": "user", "content": [part]}])
        refused(door.post(CHAT, body), 400, "unsupported_parameter", f"{name}.{field}")

    @pytest.mark.parametrize(
        "kind", ["image_embeds", "image_pil", "video_url", "audio_url", "input_audio", "file", "refusal", "thinking"]
    )
    def test_nor_may_a_part_be_of_another_kind(self, door: Door, kind: str) -> None:
        body = CHAT.with_(messages=[{"role": "user", "content": [{"type": kind, kind: MARK}]}])
        refused(door.post(CHAT, body), 400, "unsupported_parameter")

    @pytest.mark.parametrize("field", ["cache_salt", "prompt_embeds", "tool_calls", "images", "token_ids"])
    def test_nor_may_a_message_have_it(self, door: Door, field: str) -> None:
        body = CHAT.with_(messages=[{"role": "user", "content": "?", field: [MARK]}])
        refused(door.post(CHAT, body), 400, "unsupported_parameter", f"messages[0].{field}")

    @pytest.mark.parametrize("entry", PICTURES, ids=name_of)
    @pytest.mark.parametrize("field", ["latents", "model_path", "scheduler", "tenant", "keep", "prompt_embeds"])
    def test_nor_an_extension_of_a_picture(self, door: Door, entry: Entry, field: str) -> None:
        refused(door.post(entry, entry.with_(nvext={field: MARK})), 400, "unsupported_parameter", f"nvext.{field}")

    @pytest.mark.parametrize("entry", [PREDICT, PREDICT_TEXT], ids=name_of)
    @pytest.mark.parametrize("field", ["latents", "prompt_embeds", "cache_salt", "request_id", "image_url"])
    @pytest.mark.parametrize("where", ["instance", "parameters"])
    def test_nor_an_instance(self, door: Door, entry: Entry, field: str, where: str) -> None:
        body: dict[str, Any]
        if where == "instance":
            body = {"instances": [{"prompt": "a star", field: MARK}]}
        else:
            body = {"instances": ["a star"], "parameters": {field: MARK}}
        refused(door.post(entry, body), 400, "unsupported_parameter", field)

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    def test_a_name_of_the_clients_own_is_not_echoed_at_length(self, door: Door, entry: Entry) -> None:
        name = "<script>alert(1)</script>" + "x" * 100_000
        reply = door.post(entry, entry.with_(**{name: 1}))
        refused(reply, 400, "unsupported_parameter")
        assert b"<" not in reply.body


HUGE = 10**12
NUMBERS: list[Any] = [
    *(
        (entry, field, value)
        for entry in TEXT
        for field, value in [
            ("n", 10**9), ("n", 0), ("n", -1), ("n", 1.5), ("n", True), ("n", "1"),
            ("max_tokens", HUGE), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**63), ("max_tokens", [4]),
            ("temperature", 10**300), ("temperature", -1), ("temperature", "0"), ("temperature", {}),
            ("top_p", 0), ("top_p", 1.1), ("top_k", HUGE), ("top_k", -2), ("min_p", -0.1),
            ("frequency_penalty", 3), ("presence_penalty", -3), ("repetition_penalty", 0),
            ("seed", 2**64), ("seed", 0.5), ("min_tokens", HUGE), ("logprobs", HUGE), ("logprobs", -5),
            ("stop", ["x"] * 10**5), ("stop", ["x" * 10**5]), ("stop", [""]), ("stop", 7), ("stop", {"x": 1}),
            ("stop_token_ids", list(range(10**5))), ("stop_token_ids", [-1]), ("stop_token_ids", [2**40]),
            ("logit_bias", {str(token): 1 for token in range(10**5)}), ("logit_bias", {"x": 1}),
            ("logit_bias", {"1": 10**9}), ("logit_bias", {"-1": 1}), ("logit_bias", [1]),
            ("stream", "yes"), ("stream_options", {"include_usage": True}), ("best_of", 10**9),
        ]
    ),
    (CHAT, "max_completion_tokens", HUGE), (CHAT, "top_logprobs", 10**6), (CHAT, "messages", []),
    (CHAT, "messages", [{"role": "user", "content": "x"}] * 2000), (CHAT, "messages", [7]),
    (CHAT, "messages", [{"role": "root", "content": "x"}]), (CHAT, "messages", {"role": "user"}),
    (CHAT, "messages", [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]),
    (CHAT, "messages", [{"role": "user", "content": 7}]), (CHAT, "messages", [{"role": "user"}]),
    (CHAT, "messages", [{"role": "user", "content": "x" * 10**6}]),
    (COMPLETIONS, "prompt", "x" * 10**6), (COMPLETIONS, "prompt", []), (COMPLETIONS, "prompt", [[]]),
    (COMPLETIONS, "prompt", ["x"] * 10**5), (COMPLETIONS, "prompt", [10**9]), (COMPLETIONS, "prompt", [-1]),
    (COMPLETIONS, "prompt", [1] * 10**5), (COMPLETIONS, "prompt", ["x", 1]), (COMPLETIONS, "prompt", None),
    (COMPLETIONS, "prompt", {"prompt_embeds": "x"}), (COMPLETIONS, "prompt", [["x"]]),
    (COMPLETIONS, "echo", True), (COMPLETIONS, "suffix", "x"), (COMPLETIONS, "prompt", [300_000]),
    (EMBEDDINGS, "input", ""), (EMBEDDINGS, "input", []), (EMBEDDINGS, "input", ["x"] * 10**5),
    (EMBEDDINGS, "input", [""]), (EMBEDDINGS, "input", None), (EMBEDDINGS, "input", {}), (EMBEDDINGS, "input", 7),
    (EMBEDDINGS, "input", [1, 2]), (EMBEDDINGS, "input", [[1, 2]]), (EMBEDDINGS, "input", "x" * 2_000_000),
    (EMBEDDINGS, "input", "x " * 10_000), (EMBEDDINGS, "input", [None]), (EMBEDDINGS, "input", ["x", "x " * 10_000]),
    (EMBEDDINGS, "input", " " * 60_000 + "x"), (EMBEDDINGS, "input", ["x"] * 2000 + [" " * 60_000 + "x"]),
    (EMBEDDINGS, "encoding_format", "pickle"), (EMBEDDINGS, "dimensions", 10**9),
    *(
        (entry, field, value)
        for entry in PICTURES
        for field, value in [
            ("prompt", ""), ("prompt", " \n\t"), ("prompt", "x" * 10**6), ("prompt", None), ("prompt", ["x"]),
            ("size", "99999x99999"), ("size", "-1x5"), ("size", "0x64"), ("size", "64x0"), ("size", "64"),
            ("size", "64x64x64"), ("size", "64\u00d764"), ("size", "\uff16\uff14x64"), ("size", "9999x9999"),
            ("size", "1e3x64"), ("size", "64x64 "), ("size", " 64x64"), ("size", 64), ("size", [64, 64]),
            ("size", "x" * 10**5), ("size", f"../{MARK}"), ("quality", MARK), ("quality", "x" * 10**5),
            ("n", 11), ("n", 0), ("n", -1), ("n", 10**9), ("n", "2"), ("n", 1.5),
            ("num_inference_steps", 10**6), ("num_inference_steps", 101), ("num_inference_steps", 0),
            ("num_inference_steps", -5), ("guidance_scale", 10**9), ("guidance_scale", -1), ("seed", -1),
            ("seed", 2**63), ("seed", "x"), ("negative_prompt", "x" * 10**6), ("output_format", "svg"),
            ("output_format", "../x"), ("output_compression", 101), ("response_format", "file"), ("lora", "x" * 10**5),
            ("nvext", []), ("nvext", {"num_inference_steps": 10**6}), ("nvext", {"seed": 1.5}), ("stream", "yes"),
        ]
    ),
    (IMAGES, "partial_images", 4), (IMAGES, "partial_images", -1), (IMAGES, "background", "transparent"),
    (VALIDATIONS, "threshold", 2), (VALIDATIONS, "threshold", "x"), (VALIDATIONS, "include_embeddings", 1),
    (JOBS, "stream", True), (JOBS, "response_format", "b64_json"),
    (PREDICT, "instances", []), (PREDICT, "instances", ["x"] * 11), (PREDICT, "instances", {}),
    (PREDICT, "instances", [7]), (PREDICT, "instances", None), (PREDICT, "instances", [{"prompt": ""}]),
    (PREDICT, "instances", [{"prompt": "x", "n": 2}]), (PREDICT, "instances", [{"prompt": "x", "stream": True}]),
    (PREDICT, "instances", [{"prompt": "x", "size": "99999x99999"}]), (PREDICT, "parameters", []),
    (PREDICT, "parameters", {"size": "99999x99999"}), (PREDICT, "instances", [["x"]]),
    (PREDICT_TEXT, "instances", [""]), (PREDICT_TEXT, "instances", ["x"] * 11), (PREDICT_TEXT, "instances", [{}]),
    (PREDICT_TEXT, "instances", [{"prompt": 7}]), (PREDICT_TEXT, "instances", [{"prompt": ["x"]}]),
    (PREDICT_TEXT, "instances", ["x " * 10_000]),
]  # fmt: skip


def id_of(value: Any) -> str:
    text = value.name if isinstance(value, Entry) else str(value)
    return text if len(text) < 32 else f"{text[:24]}...({len(text)})"


@pytest.mark.usefixtures("neighbour")
class TestNumbers:
    @pytest.mark.parametrize(("entry", "field", "value"), NUMBERS, ids=id_of)
    def test_what_is_out_of_bounds_is_refused(self, door: Door, entry: Entry, field: str, value: Any) -> None:
        refused(door.post(entry, entry.with_(**{field: value})), 400)

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    @pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "1" * 10_000])
    def test_what_is_no_number_is_no_json(self, door: Door, entry: Entry, text: str) -> None:
        for raw in (b'{"n": %s}', b'{"temperature": [%s]}', b'{"x": {"y": %s}}'):
            refused(door.post(entry, raw.replace(b"%s", text.encode())), 400, "invalid_json")

    @pytest.mark.parametrize("entry", [CHAT, COMPLETIONS], ids=name_of)
    def test_a_million_biases_are_refused(self, door: Door, entry: Entry) -> None:
        raw = b'{"logit_bias": {' + b",".join(b'"%d":1' % token for token in range(10**6)) + b"}}"
        refused(door.post(entry, raw), 400, "invalid_json")

    @pytest.mark.parametrize(("prompts", "n"), [(16, 16), (16, 2), (2, 16)])
    def test_more_answers_than_one_body_may_ask_for_are_refused(self, door: Door, prompts: int, n: int) -> None:
        body = COMPLETIONS.with_(prompt=["x"] * prompts, n=n, temperature=1)
        refused(door.post(COMPLETIONS, body), 400, "invalid_request", "n")

    @pytest.mark.parametrize("entry", EVERY, ids=name_of)
    def test_an_empty_object_is_refused(self, door: Door, entry: Entry) -> None:
        refused(door.post(entry, {}), 400)


@pytest.mark.usefixtures("neighbour")
class TestPlaceholders:
    """What stands for an image in the model's prompts is refused, or text: it never asks for a picture that is none."""

    @pytest.mark.parametrize(
        "messages",
        [
            [user("<image>")],
            [user("look: <image> there", data_url(picture(1)))],
            [{"role": "user", "content": "<image>" * 100}],
            [{"role": "system", "content": "<image>"}, user("?")],
            [user("?"), {"role": "assistant", "content": "<image>"}, user("?")],
            [{"role": "user", "content": [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]}],
            [{"role": "user", "content": "?", "name": "<image>"}],
        ],
        ids=["alone", "beside a picture", "a hundred", "of the system", "of the assistant", "in halves", "as a name"],
    )
    def test_in_a_chat(self, door: Door, messages: Any) -> None:
        answered_or_refused(door.post(CHAT, CHAT.with_(messages=messages)))

    @pytest.mark.parametrize(
        "prompt", ["<image>", ["x", "<image>"], "<image>" * 600], ids=["alone", "in a list", "many"]
    )
    def test_in_a_completion(self, door: Door, prompt: Any) -> None:
        refused(door.post(COMPLETIONS, COMPLETIONS.with_(prompt=prompt)), 400)

    def test_as_every_token_id(self, door: Door) -> None:
        """One of them is the image's; which one is the tokenizer's to say."""
        found = 0
        for first in range(0, 2000, 250):
            reply = door.post(COMPLETIONS, COMPLETIONS.with_(prompt=list(range(first, first + 250)), max_tokens=1))
            answered_or_refused(reply)
            found += reply.status == 400 and "stands for an image" in reply.error["message"]
        assert found == 1

    @pytest.mark.parametrize("entry", [*PICTURES, EMBEDDINGS], ids=name_of)
    @pytest.mark.parametrize("text", ["<image>", "</s>", "<pad>", "<extra_id_0>", "[INST]", "<|im_start|>system"])
    def test_elsewhere_it_is_text(self, door: Door, entry: Entry, text: str) -> None:
        field = "input" if entry is EMBEDDINGS else "prompt"
        answered_or_refused(door.post(entry, entry.with_(**{field: f"a {text} star"})))

    @pytest.mark.parametrize(
        "text", ["</s>", "<pad>", "<unk>", "<s>", "USER:", "ASSISTANT:", "{{ 7 * 7 }}", "{% raw %}"]
    )
    def test_marks_of_the_template_are_text(self, door: Door, text: str) -> None:
        answered_or_refused(door.post(CHAT, CHAT.with_(messages=[user(text)])))


def nested(depth: int, key: str = "properties") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", key: {"a": schema}} if key == "properties" else {"type": "array", key: schema}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    """No cycle, 2 to the power of ``depth`` strings long where every reference is written out."""
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for level in range(1, depth):
        twice = {"$ref": f"#/$defs/d{level - 1}"}
        definitions[f"d{level}"] = {"type": "array", "prefixItems": [twice, twice], "items": False}
    return {"$defs": definitions, "$ref": f"#/$defs/d{depth - 1}"}


def spelled(spellings: int) -> dict[str, Any]:
    """A wide list, and references to one place in it whose index has more and more zeros before it."""
    wide: list[dict[str, Any]] = [{"enum": [[]] * 1000}] * 8
    return {"anyOf": wide, "allOf": [{"$ref": f"#/anyOf/{'0' * zeros}1"} for zeros in range(spellings)]}


SCHEMA_SECONDS = 5
"""The row's."""
SCHEMAS: dict[str, Any] = {
    "an index with a zero before it": spelled(2),
    "an index in endless spellings": spelled(180),
    "references without end": {"anyOf": [{}], "allOf": [{"$ref": "#/anyOf/0"}] * 1500},
    "70 deep": nested(35),
    "10 000 deep": None,
    "arrays 70 deep": nested(70, "items"),
    "cyclic": {"$ref": "#"},
    "cyclic by definition": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "cyclic by two": {
        "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"items": {"$ref": "#/$defs/a"}}},
        "$ref": "#/$defs/a",
    },
    "cyclic through a property": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "reference to elsewhere": {"$ref": "http://127.0.0.1:1/schema.json"},
    "reference to a file": {"$ref": "file:///etc/passwd"},
    "reference to nothing": {"$ref": "#/$defs/none"},
    "dynamic reference": {"$dynamicRef": "#x"},
    "dots repeated in a group": {"type": "string", "pattern": "^(.*a){20}$"},
    "plus in plus": {"type": "string", "pattern": "^(a+)+$"},
    "alternatives repeated": {"type": "string", "pattern": "^(a|aa)*$"},
    "star in star": {"type": "string", "pattern": "((x*)*)*y"},
    "counted in counted": {"type": "string", "pattern": "((a{1,99}){1,99}){1,99}"},
    "a count too high": {"type": "string", "pattern": "a{100000}"},
    "look-ahead": {"type": "string", "pattern": "^(?=.*x).*$"},
    "back-reference": {"type": "string", "pattern": r"^(a)\1$"},
    "named back-reference": {"type": "string", "pattern": r"^(?P<x>a)(?P=x)$"},
    "a pattern of 10 KB": {"type": "string", "pattern": "a?" * 5000},
    "a pattern as a key": {"type": "object", "patternProperties": {"^(a+)+$": {}}},
    "items without end": {"type": "array", "minItems": 10**9},
    "a long string": {"type": "string", "maxLength": 10**9},
    "properties without end": {"type": "object", "maxProperties": 10**9},
    "a number above every number": {"type": "integer", "maximum": 10**300},
    "a number of 65 bits in a list": {"enum": [1, [2**64]]},
    "a key of ours with such a number": {"type": "object", "properties": {}, "x-own": {"y": -(2**70)}},
    "80 KB": {"enum": ["x" * 80_000]},
    "no object": [1],
    "a text": "x",
    "nothing": None,
}


@pytest.mark.usefixtures("neighbour")
class TestSchemas:
    @pytest.mark.parametrize("name", SCHEMAS)
    @pytest.mark.parametrize("way", ["response_format", "tools"])
    def test_a_schema_that_would_explode_is_refused(self, door: Door, name: str, way: str) -> None:
        body: Any = with_schema(way, SCHEMAS[name])
        if name == "10 000 deep":
            raw = str(body).replace("'", '"').replace("None", '{"a":' * 10_000 + "1" + "}" * 10_000)
            body = raw.replace("True", "true").encode()
        if name == "nothing" and way == "tools":
            return  # a tool without parameters is one
        reply = door.post(CHAT, body)
        refused(reply, 400)
        assert reply.seconds < SCHEMA_SECONDS

    @pytest.mark.parametrize("depth", [5, 12, 30])
    def test_one_that_grows_by_references_is_refused_or_answered_in_time(self, door: Door, depth: int) -> None:
        began = time.monotonic()
        answered_or_refused(door.post(CHAT, with_schema("response_format", doubling(depth))))
        assert time.monotonic() - began < SCHEMA_SECONDS

    @pytest.mark.parametrize(
        "schema",
        [
            nested(60, "items"),
            {"enum": [str(value) for value in range(4000)]},
            {"anyOf": [{"type": "string", "maxLength": 4096}] * 50},
            {"type": "array", "maxItems": 4096, "items": {"type": "array", "maxItems": 4096}},
            {"type": "string", "pattern": "^" + "[a-z]{64}" * 20 + "$"},
            {"type": "string", "pattern": "[\\s\\S]{64}[\\w\\W]{64}x"},
            {"type": "object", "properties": {str(index): {"type": "integer"} for index in range(1000)}},
            {"type": "integer", "minimum": -(10**18), "maximum": 10**18},
            {"type": "string", "format": "date-time"},
            {"type": "string", "pattern": "("},
            {"type": "string", "pattern": "[z-a]"},
            {"type": "unknown"},
            {"type": []},
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
            {"not": {}},
            {"const": None},
        ],
        ids=lambda schema: str(schema)[:40],
    )
    def test_what_is_large_or_makes_no_sense_is_refused_or_answered_in_time(self, door: Door, schema: Any) -> None:
        began = time.monotonic()
        answered_or_refused(door.post(CHAT, with_schema("response_format", schema)))
        assert time.monotonic() - began < SCHEMA_SECONDS

    def test_many_tools_of_large_schemas_are_refused(self, door: Door) -> None:
        tool = with_schema("tools", {"enum": ["x" * 60_000]})["tools"][0]
        reply = door.post(CHAT, CHAT.with_(tools=[tool] * 128))
        refused(reply, 400, "invalid_request", "tools")
        assert reply.seconds < SCHEMA_SECONDS


def with_schema(way: str, schema: Any) -> dict[str, Any]:
    if way == "response_format":
        return CHAT.with_(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        )
    tool = {"type": "function", "function": {"name": "x", "parameters": schema, "strict": True}}
    return CHAT.with_(tools=[tool], tool_choice="auto")
