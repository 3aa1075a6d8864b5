# SPDX-License-Identifier: Apache-2.0
"""What a public body may say: an allow list of OpenAI's fields and of vLLM's harmless sampling extras.

Anything else is refused by name, whatever its value, because vLLM's request classes accept fields that pick addresses
to dial, cache keys, templates or tensors. A field of OpenAI's own that is not served may be null, since clients send
whole structures; otherwise it is refused too. What comes out is a new body that shares no container of messages with
the one that came in, holds only known keys, and keeps every picture in one shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dynamo_epd.errors import InvalidJson, InvalidRequest, UnsupportedParameter
from dynamo_epd.http.fields import (
    Check,
    Fields,
    boolean,
    choice,
    entries,
    integer,
    list_of,
    mapping,
    number,
    object_of,
    one_of,
    only,
    tagged,
    text,
    unsupported,
)
from dynamo_epd.http.json_schema import check_schema
from dynamo_epd.http.strict_json import parse_json

MAX_TOKENS = 2**31
MAX_TEXT = 256
"""Characters of a name, an id or a stop string."""


@dataclass(frozen=True)
class BodyLimits:
    """How much of what one body may hold."""

    max_images: int = 8
    max_messages: int = 1024
    max_n: int = 16
    """Answers to one body, over all of its prompts: admission counts a body once."""
    max_prompts: int = 16
    max_stop: int = 16
    max_logit_bias: int = 1024
    max_tools: int = 128
    max_tools_bytes: int = 512 * 1024
    """Of all tools together, as JSON; each one's schema has a bound of its own too."""
    max_top_logprobs: int = 20


@dataclass(frozen=True)
class ImageRef:
    """One picture of a body. ``part`` is the content part inside the body; ``param`` is its name in error messages."""

    part: dict[str, Any]
    param: str

    @property
    def url(self) -> str:
        return str(self.part["image_url"]["url"])

    def replace(self, url: str) -> None:
        """Put another reference in place of the client's URL."""
        self.part["image_url"]["url"] = url


@dataclass(frozen=True)
class ChatBody:
    """A chat body that passed. ``images`` are in order of appearance and lie inside ``body``."""

    body: dict[str, Any]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True)
class CompletionBody:
    """A completion body that passed."""

    body: dict[str, Any]


# Fields of OpenAI's API that are not served: null says nothing, anything else is refused.
_NULLABLE = frozenset(
    {
        "audio", "best_of", "function_call", "functions", "modalities", "moderation", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "suffix",
        "verbosity", "web_search_options",
    }
)  # fmt: skip
_NULLABLE_IN_MESSAGE = frozenset(
    {
        "annotations", "audio", "content", "function_call", "name", "reasoning", "refusal", "tool_call_id",
        "tool_calls",
    }
)  # fmt: skip
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@cache
def chat_fields(limits: BodyLimits) -> Fields:
    """Of a chat completion body."""
    own = {
        "messages": _messages(limits),
        "max_completion_tokens": integer(1, MAX_TOKENS),
        "logprobs": boolean,
        "top_logprobs": integer(0, limits.max_top_logprobs),
        "response_format": _RESPONSE_FORMAT,
        "tools": _tools(limits),
        "tool_choice": _TOOL_CHOICE,
        "parallel_tool_calls": boolean,
    }
    needs = {"stream_options": "stream", "top_logprobs": "logprobs", "tool_choice": "tools"}
    return Fields(_sampling(limits) | own, required=("messages",), nullable=_NULLABLE, needs=needs)


@cache
def completion_fields(limits: BodyLimits) -> Fields:
    """Of a completion body; ``prompt`` is a text, a list of token ids, or a list of either."""
    own = {
        "prompt": _prompt(limits),
        "logprobs": integer(0, limits.max_top_logprobs),
        "echo": only(False),
    }
    needs = {"stream_options": "stream"}
    return Fields(_sampling(limits) | own, required=("prompt",), nullable=_NULLABLE, needs=needs)


def check_chat(body: Mapping[str, Any], limits: BodyLimits) -> ChatBody:
    """A chat completion body, checked and cleaned. Nothing is fetched.

    Raises `UnsupportedParameter` for a field that is not honoured and `InvalidRequest` for a value out of bounds, both
    with ``param``.
    """
    clean = chat_fields(limits).check(body)
    _check_named_tool(clean)
    images = [
        ImageRef(part, f"messages[{i}].content[{j}]")
        for i, message in enumerate(clean["messages"])
        for j, part in enumerate(_as_list(message.get("content")))
        if part["type"] == "image_url"
    ]
    return ChatBody(clean, tuple(images))


def check_completion(body: Mapping[str, Any], limits: BodyLimits) -> CompletionBody:
    """A completion body, checked and cleaned. Raises what `check_chat` raises."""
    clean = completion_fields(limits).check(body)
    clean.pop("echo", None)
    prompt = clean["prompt"]
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    if prompts * clean.get("n", 1) > limits.max_n:
        raise InvalidRequest(f"'n' answers to each prompt are more than {limits.max_n} together", param="n")
    return CompletionBody(clean)


def _sampling(limits: BodyLimits) -> dict[str, Check]:
    """Fields that both kinds of body share, with OpenAI's ranges where it has the field and vLLM's elsewhere."""
    stop = text(1, MAX_TEXT)
    return {
        "model": text(1, MAX_TEXT),
        "stream": boolean,
        "stream_options": _STREAM_OPTIONS,
        "max_tokens": integer(1, MAX_TOKENS),
        "n": integer(1, limits.max_n),
        "temperature": number(0, 2),
        "top_p": number(0, 1, above=True),
        "frequency_penalty": number(-2, 2),
        "presence_penalty": number(-2, 2),
        "seed": integer(-(2**63), 2**63 - 1),
        "stop": choice("a text or a list of texts", {str: stop, list: list_of(stop, 0, limits.max_stop)}),
        "logit_bias": _logit_bias(limits),
        # vLLM's, which benchmarks and clients of plain `vllm serve` send.
        "top_k": integer(-1, MAX_TOKENS),
        "min_p": number(0, 1),
        "repetition_penalty": number(0.1, 10),  # by less, logits are divided into infinities, and no token is left
        "min_tokens": integer(0, MAX_TOKENS),
        "ignore_eos": boolean,
        "stop_token_ids": list_of(integer(0, MAX_TOKENS - 1), 0, 128),
        "include_stop_str_in_output": boolean,
        "skip_special_tokens": boolean,
    }


def _function_name(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _FUNCTION_NAME.fullmatch(value):
        raise InvalidRequest(f"'{name}' must have 1 to 64 letters, digits, underscores or dashes", param=name)
    return value


_NAME = Check(_function_name, {"type": "string", "pattern": f"^{_FUNCTION_NAME.pattern}$"})


# --- messages


def _served(value: Any, name: str) -> dict[str, Any]:
    kind = mapping(value, name).get("type")
    if isinstance(kind, str) and kind not in ("text", "image_url"):
        raise UnsupportedParameter(f"'{name}' has a type that is not supported: text and image_url are", param=name)
    return dict(_KNOWN_PART(value, name))


# The detail is taken and dropped: resolution is the model's own here, as in a plain `vllm serve`.
_ADDRESS = text(1, None).then(lambda url, _: {"url": url})
_ADDRESS_WITH_DETAIL = object_of({"url": text(1, None), "detail": one_of("auto", "low", "high")}, required=("url",))
_IMAGE_URL = choice(
    "a text or an object",
    {str: _ADDRESS, dict: _ADDRESS_WITH_DETAIL.then(lambda clean, _: {"url": clean["url"]})},
)
_KNOWN_PART = tagged(
    "type",
    {
        "text": object_of({"type": one_of("text"), "text": text(0, None)}, required=("type", "text")),
        "image_url": object_of({"type": one_of("image_url"), "image_url": _IMAGE_URL}, required=("type", "image_url")),
    },
)
_PART = Check(_served, _KNOWN_PART.schema)
_CONTENT = choice("a text or a list of parts", {str: text(0, None), list: list_of(_PART, 1, 4096)})


def _arguments(value: str, name: str) -> str:
    if value:
        try:  # templates get them parsed, by a parser without bounds
            parse_json(value.encode())
        except InvalidJson as error:
            raise InvalidRequest(f"'{name}' must be a JSON object within bounds", param=name) from error
    return value


_ARGUMENTS = Check(text(0, None).then(_arguments).run, {"type": "string", "contentMediaType": "application/json"})
_CALLED = object_of({"name": _NAME, "arguments": _ARGUMENTS}, required=("name",))
_TOOL_CALL = object_of(
    {
        "id": text(1, MAX_TEXT),
        "type": one_of("function"),
        "function": _CALLED.then(lambda clean, _: {"arguments": "", **clean}),
    },
    required=("id", "function"),
).then(lambda clean, _: {"type": "function", **clean})


def _no_annotations(value: Any, name: str) -> None:
    if value != []:
        raise unsupported(name)


_NO_ANNOTATIONS = Check(_no_annotations, {"type": "array", "maxItems": 0})


def _message(*roles: str, required: tuple[str, ...], **own: Check) -> Check:
    checks = {
        "role": one_of(*roles),
        "content": _CONTENT,
        "name": text(1, MAX_TEXT),
        "annotations": _NO_ANNOTATIONS,
        **own,
    }
    # What a reply carries with nothing in it comes back as history.
    message = object_of(checks, ("role", *required), _NULLABLE_IN_MESSAGE)
    return message.then(lambda clean, _: {key: item for key, item in clean.items() if key != "annotations"})


_SAID = _message("assistant", required=("content",), tool_calls=list_of(_TOOL_CALL, 0, 128), reasoning=text(0, None))
_CALLING = _message(
    "assistant", required=("tool_calls",), tool_calls=list_of(_TOOL_CALL, 1, 128), reasoning=text(0, None)
)
_ASSISTANT = Check(
    lambda value, name: (_CALLING if value.get("tool_calls") else _SAID)(value, name),
    {"anyOf": [_SAID.schema, _CALLING.schema]},
)
_PLAIN_ROLES = ("system", "developer", "user", "function")
_PLAIN = _message(*_PLAIN_ROLES, required=("content",))
_MESSAGE = tagged(
    "role",
    {
        **dict.fromkeys(_PLAIN_ROLES, _PLAIN),
        "assistant": _ASSISTANT,
        "tool": _message("tool", required=("content", "tool_call_id"), tool_call_id=text(1, MAX_TEXT)),
    },
)


def _messages(limits: BodyLimits) -> Check:
    every = list_of(_MESSAGE, 1, limits.max_messages)

    def check(value: Any, name: str) -> list[dict[str, Any]]:
        messages = entries(value, name, 1, limits.max_messages)
        # Counted before anything else is looked at, so that too many pictures cost nothing.
        parts = (part for message in messages if isinstance(message, dict) for part in _as_list(message.get("content")))
        if sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts) > limits.max_images:
            raise InvalidRequest(
                f"'{name}' holds more than {limits.max_images} images", param=name, code="too_many_images"
            )
        return list(every(messages, name))

    return Check(check, every.schema)


def _prompt(limits: BodyLimits) -> Check:
    token = integer(0, MAX_TOKENS - 1)
    tokens = list_of(token, 1, None)

    def check(value: Any, name: str) -> Any:
        if isinstance(value, str):
            return value
        prompts = entries(value, name, 1, None)
        if all(isinstance(item, int) for item in prompts):
            return tokens(prompts, name)
        if len(prompts) > limits.max_prompts:
            raise InvalidRequest(f"'{name}' holds more than {limits.max_prompts} prompts", param=name)
        if all(isinstance(item, str) for item in prompts):
            return prompts
        return [tokens(item, f"{name}[{i}]") for i, item in enumerate(prompts)]

    several = [list_of(each, 1, limits.max_prompts).schema for each in (text(0, None), tokens)]
    return Check(check, {"anyOf": [text(0, None).schema, tokens.schema, *several]})


# --- fields with a structure


_STREAM_OPTIONS = object_of(
    {"include_usage": boolean, "continuous_usage_stats": boolean, "include_obfuscation": only(False)}
).then(lambda clean, _: {key: item for key, item in clean.items() if key != "include_obfuscation"})


def _logit_bias(limits: BodyLimits) -> Check:
    token_id, bias = r"[0-9]{1,9}", number(-100, 100)

    def check(value: Any, name: str) -> dict[str, float]:
        biases = mapping(value, name)
        if len(biases) > limits.max_logit_bias:
            raise InvalidRequest(f"'{name}' has more than {limits.max_logit_bias} entries", param=name)
        for token in biases:
            if not re.fullmatch(token_id, token):
                raise InvalidRequest(f"a key of '{name}' is not a token id", param=name)
        return {token: bias(one, name) for token, one in biases.items()}

    names = {"propertyNames": {"pattern": f"^{token_id}$"}, "additionalProperties": bias.schema}
    return Check(check, {"type": "object", "maxProperties": limits.max_logit_bias, **names})


_JSON_SCHEMA = Check(check_schema, {"type": "object", "description": "a JSON schema"})
_NAMED_SCHEMA = object_of(
    {"name": _NAME, "description": text(0, None), "schema": _JSON_SCHEMA, "strict": boolean},
    required=("name", "schema"),
)
# An object with further keys is how vLLM would be handed a regular expression or a structural tag.
_PLAIN_FORMAT = object_of({"type": one_of("text", "json_object"), "json_schema": only(None)}, required=("type",))
_RESPONSE_FORMAT = tagged(
    "type",
    {
        "text": _PLAIN_FORMAT,
        "json_object": _PLAIN_FORMAT,
        "json_schema": object_of(
            {"type": one_of("json_schema"), "json_schema": _NAMED_SCHEMA}, required=("type", "json_schema")
        ),
    },
)

_FUNCTION = object_of(
    {"name": _NAME, "description": text(0, None), "parameters": _JSON_SCHEMA, "strict": boolean}, required=("name",)
)
_TOOL = object_of({"type": one_of("function"), "function": _FUNCTION}, required=("type", "function"))
_CHOSEN = object_of(
    {"type": one_of("function"), "function": object_of({"name": _NAME}, required=("name",))},
    required=("type", "function"),
)
_TOOL_CHOICE = choice("a text or an object", {str: one_of("none", "auto", "required"), dict: _CHOSEN})


def _tools(limits: BodyLimits) -> Check:
    every = list_of(_TOOL, 1, limits.max_tools)

    def check(value: Any, name: str) -> list[dict[str, Any]]:
        tools = entries(value, name, 1, limits.max_tools)
        if len(json.dumps(tools)) > limits.max_tools_bytes:
            raise InvalidRequest(f"'{name}' is longer than {limits.max_tools_bytes} bytes", param=name)
        return list(every(tools, name))

    return Check(check, every.schema)


def _check_named_tool(clean: Mapping[str, Any]) -> None:
    wanted = clean.get("tool_choice")
    if isinstance(wanted, dict):
        named = wanted["function"]["name"]
        if named not in (tool["function"]["name"] for tool in clean["tools"]):
            raise InvalidRequest("'tool_choice' names none of 'tools'", param="tool_choice")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
