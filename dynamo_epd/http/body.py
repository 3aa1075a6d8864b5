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
from typing import Any

from dynamo_epd.errors import InvalidJson, InvalidRequest, UnsupportedParameter
from dynamo_epd.http.fields import (
    Check,
    boolean,
    checked,
    entries,
    integer,
    known,
    list_of,
    mapping,
    number,
    one_of,
    only,
    shown,
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
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_NULLABLE_IN_MESSAGE = frozenset(
    {
        "annotations", "audio", "content", "function_call", "name", "reasoning", "refusal", "tool_call_id",
        "tool_calls",
    }
)  # fmt: skip
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_chat(body: Mapping[str, Any], limits: BodyLimits) -> ChatBody:
    """A chat completion body, checked and cleaned. Nothing is fetched.

    Raises `UnsupportedParameter` for a field that is not honoured and `InvalidRequest` for a value out of bounds, both
    with ``param``.
    """
    images: list[ImageRef] = []
    own: dict[str, Check] = {
        "messages": lambda value, name: _messages(value, name, limits, images),
        "max_completion_tokens": integer(1, MAX_TOKENS),
        "logprobs": boolean,
        "top_logprobs": integer(0, limits.max_top_logprobs),
        "response_format": _response_format,
        "tools": lambda value, name: _tools(value, name, limits),
        "tool_choice": _tool_choice,
        "parallel_tool_calls": boolean,
    }
    clean = _fields(body, _sampling(limits) | own)
    if "messages" not in clean:
        raise InvalidRequest("'messages' is required", param="messages")
    if clean.get("top_logprobs") and not clean.get("logprobs"):
        raise InvalidRequest("'top_logprobs' needs 'logprobs'", param="top_logprobs")
    if "tool_choice" in clean and "tools" not in clean:
        raise InvalidRequest("'tool_choice' needs 'tools'", param="tool_choice")
    _check_named_tool(clean)
    return ChatBody(clean, tuple(images))


def check_completion(body: Mapping[str, Any], limits: BodyLimits) -> CompletionBody:
    """A completion body, checked and cleaned; ``prompt`` is a text, a list of token ids, or a list of either."""
    own: dict[str, Check] = {
        "prompt": lambda value, name: _prompt(value, name, limits),
        "logprobs": integer(0, limits.max_top_logprobs),
        "echo": only(False),
    }
    clean = _fields(body, _sampling(limits) | own)
    if "prompt" not in clean:
        raise InvalidRequest("'prompt' is required", param="prompt")
    prompt = clean["prompt"]
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    if prompts * clean.get("n", 1) > limits.max_n:
        raise InvalidRequest(f"'n' answers to each prompt are more than {limits.max_n} together", param="n")
    return CompletionBody(clean)


def _sampling(limits: BodyLimits) -> dict[str, Check]:
    """Fields that both kinds of body share, with OpenAI's ranges where it has the field and vLLM's elsewhere."""
    return {
        "model": text(1, MAX_TEXT),
        "stream": boolean,
        "stream_options": _stream_options,
        "max_tokens": integer(1, MAX_TOKENS),
        "n": integer(1, limits.max_n),
        "temperature": number(0, 2),
        "top_p": number(0, 1, above=True),
        "frequency_penalty": number(-2, 2),
        "presence_penalty": number(-2, 2),
        "seed": integer(-(2**63), 2**63 - 1),
        "stop": lambda value, name: _stop(value, name, limits),
        "logit_bias": lambda value, name: _logit_bias(value, name, limits),
        # vLLM's, which benchmarks and clients of plain `vllm serve` send.
        "top_k": integer(-1, MAX_TOKENS),
        "min_p": number(0, 1),
        "repetition_penalty": number(0, 10, above=True),
        "min_tokens": integer(0, MAX_TOKENS),
        "ignore_eos": boolean,
        "stop_token_ids": list_of(integer(0, MAX_TOKENS - 1), 0, 128),
        "include_stop_str_in_output": boolean,
        "skip_special_tokens": boolean,
    }


def _fields(body: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    clean = checked(body, checks, _NULLABLE)
    clean.pop("echo", None)
    if "stream_options" in clean and not clean.get("stream"):
        raise InvalidRequest("'stream_options' needs 'stream'", param="stream_options")
    return clean


# --- messages


def _messages(value: Any, name: str, limits: BodyLimits, images: list[ImageRef]) -> list[dict[str, Any]]:
    messages = entries(value, name, 1, limits.max_messages)
    # Counted before anything else is looked at, so that too many pictures cost nothing.
    parts = (part for message in messages if isinstance(message, dict) for part in _as_list(message.get("content")))
    if sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts) > limits.max_images:
        raise InvalidRequest(f"'{name}' holds more than {limits.max_images} images", param=name, code="too_many_images")
    return [_message(message, f"{name}[{i}]", images) for i, message in enumerate(messages)]


def _message(value: Any, name: str, images: list[ImageRef]) -> dict[str, Any]:
    message = mapping(value, name)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"'{name}.role' must be one of {', '.join(sorted(_ROLES))}", param=f"{name}.role")
    own: dict[str, Check] = {"content": lambda item, param: _content(item, param, images), "name": text(1, MAX_TEXT)}
    if role == "tool":
        own["tool_call_id"] = text(1, MAX_TEXT)
    if role == "assistant":
        own |= {"tool_calls": list_of(_tool_call, 0, 128), "reasoning": text(0, None)}
    clean: dict[str, Any] = {"role": role}
    for key, item in message.items():
        # What a reply carries with nothing in it comes back as history.
        if key == "role" or (key in _NULLABLE_IN_MESSAGE and item is None) or (key == "annotations" and item == []):
            continue
        if key not in own:
            raise unsupported(f"{name}.{shown(key)}")
        clean[key] = own[key](item, f"{name}.{key}")
    if role == "tool" and "tool_call_id" not in clean:
        raise InvalidRequest(f"'{name}.tool_call_id' is required", param=f"{name}.tool_call_id")
    if "content" not in clean and not clean.get("tool_calls"):
        raise InvalidRequest(f"'{name}.content' is required", param=f"{name}.content")
    return clean


def _content(value: Any, name: str, images: list[ImageRef]) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"'{name}' must be a text or a list of parts", param=name)
    return [_part(part, f"{name}[{j}]", images) for j, part in enumerate(entries(value, name, 1, 4096))]


def _part(value: Any, name: str, images: list[ImageRef]) -> dict[str, Any]:
    part = mapping(value, name)
    kind = part.get("type")
    if kind not in ("text", "image_url"):
        if not isinstance(kind, str):
            raise InvalidRequest(f"'{name}.type' is required", param=f"{name}.type")
        raise UnsupportedParameter(f"'{name}' has a type that is not supported: text and image_url are", param=name)
    for key in part:
        if key not in ("type", kind):
            raise unsupported(f"{name}.{shown(key)}")
    if kind == "text":
        return {"type": "text", "text": text(0, None)(part.get("text"), f"{name}.text")}
    param = f"{name}.image_url"
    image = part.get("image_url")
    if isinstance(image, dict):
        for key in image:
            if key not in ("url", "detail"):
                raise unsupported(f"{param}.{shown(key)}")
        # Taken and dropped: resolution is the model's own here, as in a plain `vllm serve`.
        if image.get("detail") not in (None, "auto", "low", "high"):
            raise InvalidRequest(f"'{param}.detail' must be auto, low or high", param=f"{param}.detail")
        image, param = image.get("url"), f"{param}.url"
    clean = {"type": "image_url", "image_url": {"url": text(1, None)(image, param)}}
    images.append(ImageRef(clean, name))
    return clean


def _tool_call(value: Any, name: str) -> dict[str, Any]:
    call = known(value, name, "id", "type", "function")
    one_of(call.get("type", "function"), f"{name}.type", "function")
    function = known(call.get("function"), f"{name}.function", "name", "arguments")
    arguments = text(0, None)(function.get("arguments", ""), f"{name}.function.arguments")
    if arguments:
        try:  # templates get them parsed, by a parser without bounds
            parse_json(arguments.encode())
        except InvalidJson as error:
            param = f"{name}.function.arguments"
            raise InvalidRequest(f"'{param}' must be a JSON object within bounds", param=param) from error
    return {
        "id": text(1, MAX_TEXT)(call.get("id"), f"{name}.id"),
        "type": "function",
        "function": {"name": _function_name(function.get("name"), f"{name}.function.name"), "arguments": arguments},
    }


def _prompt(value: Any, name: str, limits: BodyLimits) -> Any:
    if isinstance(value, str):
        return value
    prompts = entries(value, name, 1, None)
    token = integer(0, MAX_TOKENS - 1)
    if all(isinstance(item, int) for item in prompts):
        return [token(item, f"{name}[{i}]") for i, item in enumerate(prompts)]
    if len(prompts) > limits.max_prompts:
        raise InvalidRequest(f"'{name}' holds more than {limits.max_prompts} prompts", param=name)
    if all(isinstance(item, str) for item in prompts):
        return prompts
    return [list_of(token, 1, None)(item, f"{name}[{i}]") for i, item in enumerate(prompts)]


# --- fields with a structure


def _stream_options(value: Any, name: str) -> dict[str, Any]:
    options = known(value, name, "include_usage", "continuous_usage_stats", "include_obfuscation")
    if options.get("include_obfuscation"):
        raise unsupported(f"{name}.include_obfuscation")
    return {
        key: boolean(options[key], f"{name}.{key}")
        for key in ("include_usage", "continuous_usage_stats")
        if options.get(key) is not None
    }


def _stop(value: Any, name: str, limits: BodyLimits) -> str | list[str]:
    one = text(1, MAX_TEXT)
    result: str | list[str] = (
        one(value, name) if isinstance(value, str) else list_of(one, 0, limits.max_stop)(value, name)
    )
    return result


def _logit_bias(value: Any, name: str, limits: BodyLimits) -> dict[str, float]:
    biases = mapping(value, name)
    if len(biases) > limits.max_logit_bias:
        raise InvalidRequest(f"'{name}' has more than {limits.max_logit_bias} entries", param=name)
    for token in biases:
        if not re.fullmatch(r"[0-9]{1,9}", token):
            raise InvalidRequest(f"a key of '{name}' is not a token id", param=name)
    return {token: number(-100, 100)(bias, name) for token, bias in biases.items()}


def _response_format(value: Any, name: str) -> dict[str, Any]:
    # An object with further keys is how vLLM would be handed a regular expression or a structural tag.
    wanted = known(value, name, "type", "json_schema")
    kind = one_of(wanted.get("type"), f"{name}.type", "text", "json_object", "json_schema")
    if kind != "json_schema":
        if wanted.get("json_schema") is not None:
            raise unsupported(f"{name}.json_schema")
        return {"type": kind}
    param = f"{name}.json_schema"
    given = known(wanted.get("json_schema"), param, "name", "description", "schema", "strict")
    clean: dict[str, Any] = {
        "name": _function_name(given.get("name"), f"{param}.name"),
        "schema": check_schema(given.get("schema"), f"{param}.schema"),
    }
    if given.get("description") is not None:
        clean["description"] = text(0, None)(given["description"], f"{param}.description")
    if given.get("strict") is not None:
        clean["strict"] = boolean(given["strict"], f"{param}.strict")
    return {"type": kind, "json_schema": clean}


def _tools(value: Any, name: str, limits: BodyLimits) -> list[dict[str, Any]]:
    tools = entries(value, name, 1, limits.max_tools)
    if len(json.dumps(tools)) > limits.max_tools_bytes:
        raise InvalidRequest(f"'{name}' is longer than {limits.max_tools_bytes} bytes", param=name)
    return [_tool(tool, f"{name}[{i}]") for i, tool in enumerate(tools)]


def _tool(value: Any, name: str) -> dict[str, Any]:
    tool = known(value, name, "type", "function")
    one_of(tool.get("type"), f"{name}.type", "function")
    param = f"{name}.function"
    given = known(tool.get("function"), param, "name", "description", "parameters", "strict")
    function: dict[str, Any] = {"name": _function_name(given.get("name"), f"{param}.name")}
    if given.get("description") is not None:
        function["description"] = text(0, None)(given["description"], f"{param}.description")
    if given.get("parameters") is not None:
        function["parameters"] = check_schema(given["parameters"], f"{param}.parameters")
    if given.get("strict") is not None:
        function["strict"] = boolean(given["strict"], f"{param}.strict")
    return {"type": "function", "function": function}


def _tool_choice(value: Any, name: str) -> str | dict[str, Any]:
    if isinstance(value, str):
        return one_of(value, name, "none", "auto", "required")
    choice = known(value, name, "type", "function")
    one_of(choice.get("type"), f"{name}.type", "function")
    function = known(choice.get("function"), f"{name}.function", "name")
    chosen = _function_name(function.get("name"), f"{name}.function.name")
    return {"type": "function", "function": {"name": chosen}}


def _check_named_tool(clean: Mapping[str, Any]) -> None:
    choice = clean.get("tool_choice")
    if isinstance(choice, dict):
        named = choice["function"]["name"]
        if named not in (tool["function"]["name"] for tool in clean["tools"]):
            raise InvalidRequest("'tool_choice' names none of 'tools'", param="tool_choice")


def _function_name(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _FUNCTION_NAME.fullmatch(value):
        raise InvalidRequest(f"'{name}' must have 1 to 64 letters, digits, underscores or dashes", param=name)
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
