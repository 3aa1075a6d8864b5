# SPDX-License-Identifier: Apache-2.0
"""``/v1/models/{model}:predict``, KServe's first protocol, for the image model and the embedding model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.embeddings import MAX_CHARACTERS
from dynamo_epd.http.fields import Check, Fields, entries, mapping, only, text
from dynamo_epd.http.images import IMAGES, WantedPicture, wanted_picture

MAX_INSTANCES = 10


def _one_picture(_: str) -> InvalidRequest:
    return InvalidRequest("an instance is one picture, in the reply", param="instances")


INSTANCE = Fields(
    {
        **IMAGES.checks,
        "stream": only(False, _one_picture),
        "n": only(1, _one_picture),
        "partial_images": only(0, _one_picture),
        "response_format": only("b64_json", _one_picture),
    },
    nullable=IMAGES.nullable,
)
"""Of one picture. Its prompt may stand in ``parameters``."""


TEXT_INSTANCE = Fields({"prompt": text(1, MAX_CHARACTERS)}, required=("prompt",))
"""Of a text that is to be embedded."""


def _instances(value: Any, name: str) -> list[dict[str, Any]]:
    found = entries(value, name, 1, MAX_INSTANCES)
    return [{"prompt": one} if isinstance(one, str) else mapping(one, f"{name}[{i}]") for i, one in enumerate(found)]


PREDICT = Fields(
    {
        "instances": Check(
            _instances,
            {
                "type": "array",
                "items": {"anyOf": [text(1, None).schema, INSTANCE.schema, TEXT_INSTANCE.schema]},
                "minItems": 1,
                "maxItems": MAX_INSTANCES,
            },
        ),
        "parameters": Check(mapping.run, INSTANCE.schema | {"description": "of every instance that does not say it"}),
    },
    required=("instances",),
)
"""Of the whole body. Which model it is for decides what an instance may say, so that is checked later."""


def check_predict(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The instances, each with what ``parameters`` says of all; a text is an instance with a ``prompt`` only."""
    clean = PREDICT.check(body)
    return [clean.get("parameters", {}) | instance for instance in clean["instances"]]


def predicted_pictures(instances: list[dict[str, Any]], model: str) -> list[WantedPicture]:
    """One picture an instance. Raises what `check_images` raises."""
    return [wanted_picture(INSTANCE.check(instance | {"model": model})) for instance in instances]


def predicted_texts(instances: list[dict[str, Any]]) -> list[str]:
    """The texts of instances that are to be embedded."""
    return [TEXT_INSTANCE.check(instance)["prompt"] for instance in instances]
