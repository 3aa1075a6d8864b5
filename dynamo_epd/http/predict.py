# SPDX-License-Identifier: Apache-2.0
"""``/v1/models/{model}:predict``, KServe's first protocol, for the image model and the embedding model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.http.fields import Check, checked, entries, mapping
from dynamo_epd.http.images import WantedPicture, check_images

MAX_INSTANCES = 10


def _instances(value: Any, name: str) -> list[dict[str, Any]]:
    found = entries(value, name, 1, MAX_INSTANCES)
    return [{"prompt": one} if isinstance(one, str) else mapping(one, f"{name}[{i}]") for i, one in enumerate(found)]


def check_predict(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The instances, each with what ``parameters`` says of all; a text is an instance with a ``prompt`` only."""
    fields: dict[str, Check] = {"instances": _instances, "parameters": mapping}
    clean = checked(body, fields)
    if "instances" not in clean:
        raise InvalidRequest("'instances' is required", param="instances")
    return [clean.get("parameters", {}) | instance for instance in clean["instances"]]


def predicted_pictures(instances: list[dict[str, Any]], model: str) -> list[WantedPicture]:
    """One picture an instance. Raises what `check_images` raises."""
    found = [check_images(instance | {"model": model}) for instance in instances]
    if any(one.stream or one.n > 1 or one.as_url for one in found):
        raise InvalidRequest("an instance is one picture, in the reply", param="instances")
    return [one.picture for one in found]


def predicted_texts(instances: list[dict[str, Any]]) -> list[Any]:
    """The texts of instances that are to be embedded."""
    return [checked(instance, {"prompt": lambda value, _: value}).get("prompt") for instance in instances]
