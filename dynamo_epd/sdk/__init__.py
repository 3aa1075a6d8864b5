# SPDX-License-Identifier: Apache-2.0
"""What a graph is made of. Importing this starts nothing and imports nothing heavy."""

from dynamo_epd.sdk.context import dynamo_context, service_config
from dynamo_epd.sdk.dependency import depends
from dynamo_epd.sdk.endpoints import (
    abstract_endpoint,
    api,
    async_on_start,
    endpoint,
    liveness,
    on_drain,
    on_shutdown,
    readiness,
)
from dynamo_epd.sdk.service import DYNAMO_IMAGE, AbstractService, service

# The names of 0.2.1.
dynamo_endpoint = endpoint
dynamo_api = api
async_on_shutdown = on_shutdown

__all__ = [
    "DYNAMO_IMAGE",
    "AbstractService",
    "abstract_endpoint",
    "api",
    "async_on_shutdown",
    "async_on_start",
    "depends",
    "dynamo_api",
    "dynamo_context",
    "dynamo_endpoint",
    "endpoint",
    "liveness",
    "on_drain",
    "on_shutdown",
    "readiness",
    "service",
    "service_config",
]
