# SPDX-License-Identifier: Apache-2.0
"""What Dynamo's Kubernetes operator tells a pod, and what follows from it for the service that runs there.

From deploy/operator/internal/dynamo/component_common.go, component_worker.go and internal/consts/consts.go of
ai-dynamo/dynamo: the graph's namespace in ``DYN_NAMESPACE``; for workers the generation they belong to in
``DYN_NAMESPACE_WORKER_SUFFIX``, so that during a rolling update old and new ones do not call each other; and which
endpoints the runtime's /health waits for (``generate``).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from dynamo_epd.sdk.config import ConfigError, ServiceSettings

CONFIG = "DYNAMO_GRAPH_CONFIG"
"""The configuration as JSON, where there is no file for it. A name of our own: ``DYN_DEPLOYMENT_CONFIG`` the operator
reads into types of its own, and writes the frontend's port into it (internal/dynamo/graph.go).
"""
DEPLOYMENT = "DYN_PARENT_DGD_K8S_NAME"
"""Set in every pod of the operator's, and nowhere else."""
NAMESPACE = "DYN_NAMESPACE"
WORKER_SUFFIX = "DYN_NAMESPACE_WORKER_SUFFIX"
HEALTH_ENDPOINTS = "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS"
GROUP, VERSIONS = "nvidia.com", ("v1beta1", "v1alpha1")
DEPLOYMENTS, ADAPTERS = "dynamographdeployments", "dynamographdeploymentscalingadapters"
HTTP_PORT, SYSTEM_PORT = 8000, 9090
"""Of pods: where the operator sends clients of the frontend, and where it has a worker's metrics and health."""


def adapter_of(deployment: str, component: str) -> str:
    """The name of the scaling adapter that the operator makes for a component which asks for one. From then on only it
    says how many replicas there are: the operator refuses them in the deployment itself.
    """
    return f"{deployment}-{component.lower()}"


def component_of(service: str) -> str:
    """The name of a service's component: the operator takes no ``_`` in it."""
    return service.replace("_", "-")


def service_of(component: str) -> str:
    """The service of a component's name: no class has a ``-`` in its own."""
    return component.replace("-", "_")


def no_tls(error: Exception, host: str) -> str | None:
    """One line of why there is no TLS with the API server at ``host``; None where ``error``, an ApiException or one of
    urllib3's, is of anything else.
    """
    from urllib3.exceptions import SSLError

    reason = getattr(error, "reason", None)
    # The client's own error has no status then, and always one otherwise. After retries it is urllib3's.
    if getattr(error, "status", None) != 0 and not isinstance(reason, SSLError):
        return None
    said = " ".join(str(reason).split()).removeprefix("SSLError ")
    return f"no TLS with {host}: {said[:500]}"


def configuration(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What `CONFIG` holds; nothing without it. Raises ConfigError for what is no configuration."""
    try:
        found = json.loads(environment.get(CONFIG) or "{}")
    except ValueError as error:
        raise ConfigError(f"{CONFIG}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise ConfigError(f"{CONFIG}: must hold service names, and keys below them")
    return found


def check_nats(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError in a pod that is not told of a NATS server: one of its own would be no use to the others."""
    if DEPLOYMENT in environment and not environment.get("NATS_SERVER"):
        raise ConfigError("the operator gives no NATS_SERVER: install it with NATS, or deploy with --env NATS_SERVER=…")


def placed(
    settings: dict[str, ServiceSettings], environment: Mapping[str, str] = os.environ
) -> dict[str, ServiceSettings]:
    """The settings at the addresses that the operator gives them: its namespace goes before what code and
    configuration say, or two deployments of a graph would be one.
    """
    if DEPLOYMENT not in environment or not environment.get(NAMESPACE):
        return settings
    suffix = environment.get(WORKER_SUFFIX)
    namespace = f"{environment[NAMESPACE]}-{suffix}" if suffix else environment[NAMESPACE]
    return {name: dataclasses.replace(one, namespace=namespace) for name, one in settings.items()}


def outer_namespace(environment: Mapping[str, str] = os.environ) -> str | None:
    """Where a worker of one generation is found by those that belong to none, as the frontend; None without one."""
    if DEPLOYMENT in environment and environment.get(WORKER_SUFFIX):
        return environment.get(NAMESPACE)
    return None


def health_endpoints(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Endpoints without which the runtime calls this process unhealthy."""
    try:
        found = json.loads(environment.get(HEALTH_ENDPOINTS) or "[]")
    except ValueError as error:
        raise ConfigError(f"{HEALTH_ENDPOINTS}: {error}") from error
    return [str(name) for name in found]
