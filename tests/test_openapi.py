# SPDX-License-Identifier: Apache-2.0
"""``/openapi.json`` says what the checks of bodies let pass: all that it names is taken, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.frontend import BODIES
from dynamo_epd.errors import InvalidRequest, UnsupportedParameter
from dynamo_epd.http.body import BodyLimits, check_chat, check_completion
from dynamo_epd.http.embeddings import check_embeddings
from dynamo_epd.http.images import check_images, check_job
from dynamo_epd.http.predict import INSTANCE, check_predict, predicted_pictures
from dynamo_epd.http.validations import check_validations
from tests.document import document
from tests.drawing import objects, values

LARGEST = 64 * 1024
"""Bytes of the document."""
LIMITS = BodyLimits(max_images=64)
"""How many pictures there are at most, over all parts, is no matter of the schema."""
TOOLS = [{"type": "function", "function": {"name": "paint"}}]
WITHOUT_WHICH: dict[str, Any] = {"stream": True, "logprobs": True, "tools": TOOLS}
"""What another field needs."""
HI = {"messages": [{"role": "user", "content": "hi"}]}
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

few = settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def body_with(path: str, name: str, value: Any) -> dict[str, Any]:
    """The least body, the field, and what it needs."""
    needed = SCHEMAS[path].get("dependentRequired", {}).get(name, [])
    return {**CHECKS[path][1], **{other: WITHOUT_WHICH[other] for other in needed}, name: value}


def sensible(name: str, value: Any) -> bool:
    """Of two rules JSON Schema knows nothing: a prompt has more than blanks, and a tool that is chosen exists."""
    if name == "prompt":
        return isinstance(value, list) or bool((value or "").strip())
    return name != "tool_choice" or not isinstance(value, dict)


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
    for operations in whole["paths"].values():
        for operation in operations.values():
            assert operation["operationId"] and "422" not in operation["responses"]
            refusal = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert refusal == {"$ref": "#/components/schemas/Error"}


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


@pytest.mark.parametrize(("path", "name"), [one for one in FIELDS if one[1] not in FREE])
def test_an_unknown_field_below_another_is_refused(path: str, name: str) -> None:
    @few
    @given(values(SCHEMAS[path]["properties"][name]), st.data())
    def checked(value: Any, data: st.DataObject) -> None:
        body = body_with(path, name, copy.deepcopy(value))
        found = list(closed(body[name]))
        if not found or path.endswith(":predict"):  # whose instances are checked when their model is known
            return
        data.draw(st.sampled_from(found))["unheard_of"] = None
        with pytest.raises(InvalidRequest):
            CHECKS[path][0](body)

    checked()


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
