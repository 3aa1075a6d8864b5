# SPDX-License-Identifier: Apache-2.0
"""What a service may ask about the process it runs in."""

from __future__ import annotations

import contextvars
from typing import Any, TypeVar

Config = TypeVar("Config")

dynamo_context: dict[str, Any] = {}
"""In a worker: ``runtime``, ``namespace``, ``component``, ``service_name``, ``worker_index``, ``max_payload`` (bytes
that NATS takes in one message), ``graph``, ``config``, ``stopping`` (an asyncio.Event, set when the worker begins to
drain); (namespace, component) by service in ``addresses`` and, where owners of arenas are found from any generation of
workers, in ``owner_addresses``; and, as clients see it, ``instance_id``. Empty elsewhere."""

request_context: contextvars.ContextVar[Any] = contextvars.ContextVar("request_context", default=None)
"""The runtime's Context of the call being served: what this endpoint calls on continues its trace."""


def service_config(kind: type[Config]) -> Config:
    """The config of the service that runs in this process; outside a worker ``kind`` with its defaults."""
    if "config" not in dynamo_context:
        return kind()
    config = dynamo_context["config"]
    if not isinstance(config, kind):
        raise TypeError(
            f"{dynamo_context['service_name']} is configured by {type(config).__name__}, not {kind.__name__}"
        )
    return config
