# SPDX-License-Identifier: Apache-2.0
"""``/openapi.json`` says what the checks of bodies let pass: all that it names is taken, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.frontend import BODIES
from dynamo_epd.errors import InvalidRequest, UnsupportedParameter
from dynamo_epd.http.auth import OPEN
from dynamo_epd.http.body import BodyLimits, check_chat, check_completion
from dynamo_epd.http.embeddings import check_embeddings
from dynamo_epd.http.images import check_images, check_job
from dynamo_epd.http.openapi import describe
from dynamo_epd.http.predict import INSTANCE, check_predict, predicted_pictures
from dynamo_epd.http.validations import check_validations
from tests.document import document
from tests.drawing import objects, values

LARGEST = 64 * 1024
"""Bytes of the document."""
LIMITS = BodyLimits(max_images=64)
"""How many pictures there are at most, over all parts, is no matter of the schema."""
TOOLS = [{"type": "function", "function": {"name": "paint"}}]
NEEDED: dict[str, Any] = {"needs 'stream'": True, "needs 'logprobs'": True, "needs 'tools'": TOOLS}
"""By what a field's description says of another one."""
HI = {"messages": [{"role": "user", "content": "hi"}]}
NOTHING = dict.fromkeys(("refusal", "audio", "function_call", "reasoning"))
SAID_BEFORE: dict[str, Any] = {"role": "assistant", "content": "yes", "tool_calls": None, "annotations": [], **NOTHING}
CALLED_BEFORE: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "paint", "arguments": "{}"}}],
    **NOTHING,
}
"""Messages as OpenAI's client gives them back."""
STAR = {"prompt": "a star", "output_format": "webp"}  # a PNG has no compression to choose
CHECKS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "/v1/chat/completions": (lambda body: check_chat(body, LIMITS), HI),
    "/v1/completions": (lambda body: check_completion(body, LIMITS), {"prompt": "hi"}),
    "/v1/embeddings": (check_embeddings, {"input": "hi"}),
    "/v1/images/generations": (check_images, STAR),
    "/v1/images/jobs": (check_job, STAR),
    "/v1/models/{model}:predict": (check_predict, {"instances": ["hi"]}),
    "/v1/validations": (check_validations, STAR),
}
"""Of each path the check of its body, and the least that it takes."""
SCHEMAS = BODIES | {"an instance": INSTANCE.schema}
CHECKS["an instance"] = (lambda body: predicted_pictures([body], "tiny-image"), STAR)
FIELDS = [(path, name) for path, schema in SCHEMAS.items() for name in schema["properties"]]
FREE = ("schema", "parameters", "metadata", "user", "store", "service_tier")
"""Fields in which anything may stand: a JSON schema, an instance of whichever model, what is ignored."""
INSIDE = {
    "image_embeds", "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "cache_salt", "uuid",
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "chat_template_kwargs", "priority", "request_id",
    "vllm_xargs", "tenant", "handle", "lease", "deadline", "pixels", "keep",
}  # fmt: skip

WITH_OBJECTS = [
    (path, name)
    for path, name in FIELDS
    if name not in FREE and not path.endswith(":predict")  # whose instances are checked when their model is known
    if '"object"' in json.dumps(SCHEMAS[path]["properties"][name])
]

few = settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def body_with(path: str, name: str, value: Any) -> dict[str, Any]:
    """The least body, the field, and what it needs."""
    said = SCHEMAS[path]["properties"][name].get("description")
    needed = {said.split("'")[1]: NEEDED[said]} if said in NEEDED else {}
    return {**CHECKS[path][1], **needed, name: value}


def sensible(name: str, value: Any) -> bool:
    """Of two rules JSON Schema knows nothing: a prompt has more than blanks, and a tool that is chosen exists."""
    if name == "prompt":
        return isinstance(value, list) or bool((value or "").strip())
    return name != "tool_choice" or not isinstance(value, dict)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**HI, "stream_options": None}),
    ("/v1/chat/completions", {**HI, "stream": False, "top_logprobs": 0}),
    ("/v1/chat/completions", {**HI, "top_logprobs": None, "logprobs": None, "tools": None, "tool_choice": None}),
    ("/v1/chat/completions", {**HI, "n": 1.0, "max_tokens": 2.0, "seed": None, "stop": [], "audio": None}),
    (
        "/v1/chat/completions",
        {**HI, "tools": TOOLS, "tool_choice": TOOLS[0]},
    ),
    ("/v1/chat/completions", {"messages": [SAID_BEFORE, {"role": "user", "content": "and?"}]}),
    ("/v1/chat/completions", {"messages": [CALLED_BEFORE, {"role": "tool", "tool_call_id": "c", "content": "done"}]}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "echo": False, "suffix": None}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": None, "dimensions": None, "user": "me"}),
    ("/v1/images/generations", {**STAR, "partial_images": 0, "n": 1.0, "style": None, "nvext": {"seed": None}}),
    ("/v1/images/jobs", {**STAR, "partial_images": 0, "stream": False, "response_format": None}),
    ("/v1/models/{model}:predict", {"instances": [STAR | {"n": 1.0, "partial_images": 0}, "a"], "parameters": {}}),
    ("/v1/models/{model}:predict", {"instances": [{"prompt": "x" * 40_000}]}),
    ("/v1/validations", {**STAR, "threshold": 0, "include_embeddings": None}),
]
"""What clients send: nulls, zeros, whole floats, and a reply as history. The document must not refuse it either."""


@pytest.mark.parametrize(("path", "body"), TAKEN)
def test_what_is_taken_passes_the_document(path: str, body: dict[str, Any]) -> None:
    CHECKS[path][0](copy.deepcopy(body))
    jsonschema.Draft202012Validator(SCHEMAS[path]).validate(body)


def test_an_accepted_job_is_202_and_a_picture_no_json() -> None:
    paths = document()["paths"]
    for path in ("/v1/images/jobs", "/text-to-image"):
        assert "202" in paths[path]["post"]["responses"] and "200" not in paths[path]["post"]["responses"]
    assert list(paths["/v1/images/{id}"]["get"]["responses"]["200"]["content"]) == ["image/*"]
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


def test_the_document_wants_a_key_where_the_server_does() -> None:
    assert "security" not in document()
    app = FastAPI()
    for path in ("/live", "/v1/models"):
        app.add_api_route(path, lambda: None)
    describe(app, {}, keys=True)
    whole = app.openapi()
    assert whole["security"] == [{"key": []}] and whole["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert whole["paths"]["/live"]["get"]["security"] == [] and "security" not in whole["paths"]["/v1/models"]["get"]


def test_every_route_that_takes_a_body_says_which() -> None:
    paths = document()["paths"]
    posted = {path: operations["post"] for path, operations in paths.items() if "post" in operations}
    assert BODIES.keys() == {path for path, one in posted.items() if "requestBody" in one}
    assert [path for path in posted if path not in BODIES] == ["/text-to-image"], "whose prompt stands in its query"
    assert posted["/text-to-image"]["parameters"][0]["schema"]["maxLength"] > 0
    for path, schema in BODIES.items():
        assert posted[path]["requestBody"]["content"]["application/json"]["schema"] == schema


def test_the_document_is_small_and_sound() -> None:
    whole = document()
    assert whole["openapi"].startswith("3.1") and whole["info"]["title"]
    assert len(json.dumps(whole)) < LARGEST
    for schema in [*SCHEMAS.values(), *whole["components"]["schemas"].values()]:
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            assert operation["operationId"] and "422" not in operation["responses"]
            refusals = [operation["responses"].get(status) for status in ("4XX", "5XX")]
            if path in OPEN:
                assert refusals == [None, None]
                continue
            for refusal in refusals:
                assert refusal["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


def test_the_document_names_nothing_of_the_inside() -> None:
    names = {name for _, one in objects(document()) for name in one["properties"]}
    assert len(names) > 60
    assert not names & INSIDE


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_right_value_of_every_field_is_taken(path: str, name: str) -> None:
    @few
    @given(values(SCHEMAS[path]["properties"][name]).filter(lambda value: sensible(name, value)))
    def taken(value: Any) -> None:
        body = body_with(path, name, value)
        jsonschema.Draft202012Validator(SCHEMAS[path]).validate(body)
        CHECKS[path][0](body)

    taken()


@pytest.mark.parametrize("path", SCHEMAS)
def test_an_unknown_field_is_refused(path: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        CHECKS[path][0]({**CHECKS[path][1], "unheard_of": None})
    assert caught.value.param == "unheard_of" and caught.value.status == 400


@pytest.mark.parametrize(("path", "name"), WITH_OBJECTS)
def test_an_unknown_field_below_another_is_refused(path: str, name: str) -> None:
    @few
    @given(values(SCHEMAS[path]["properties"][name]).filter(lambda value: any(closed(value))), st.data())
    def checked(value: Any, data: st.DataObject) -> None:
        body = body_with(path, name, copy.deepcopy(value))
        data.draw(st.sampled_from(list(closed(body[name]))))["unheard_of"] = None
        with pytest.raises(InvalidRequest) as caught:
            CHECKS[path][0](body)
        assert "unheard_of" in (caught.value.param or "") or name == "logit_bias"  # whose keys are all token ids

    checked()


def test_objects_below_are_tried_wherever_there_are_any() -> None:
    assert {name for _, name in WITH_OBJECTS} == {
        "logit_bias", "messages", "nvext", "response_format", "stream_options", "tool_choice", "tools"
    }  # fmt: skip


def closed(value: Any) -> Iterator[dict[str, Any]]:
    """Every object below that may have no fields but its own."""
    if isinstance(value, dict):
        yield value
        for name, below in value.items():
            if name not in FREE:
                yield from closed(below)
    elif isinstance(value, list):
        for below in value:
            yield from closed(below)
