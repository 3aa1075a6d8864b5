# SPDX-License-Identifier: Apache-2.0
"""Where the planner learns who works, and asks for more or fewer: the supervisor's socket, or Kubernetes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dynamo_epd.sdk.control import SOCKET, ControlError, ask
from dynamo_epd.sdk.operator import (
    ADAPTERS,
    DEPLOYMENT,
    DEPLOYMENTS,
    GROUP,
    SYSTEM_PORT,
    VERSIONS,
    adapter_of,
    component_of,
    no_tls,
    service_of,
)

DEPLOYMENT_NAMESPACE = "DYN_PARENT_DGD_K8S_NAMESPACE"
DEPLOYMENT_LABEL = "nvidia.com/dynamo-graph-deployment-name"
COMPONENT_LABEL = "nvidia.com/dynamo-component"
REQUEST_SECONDS = 5.0
FOLLOW_SECONDS = 60.0
"""In which the operator is believed to be on its way to what an adapter was told."""


class DoorClosed(Exception):
    """The other side refuses, or is not there. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """``metrics``: the address of its metrics, or None where it has none (yet)."""

    name: str
    ready: bool
    metrics: str | None


@dataclasses.dataclass(frozen=True)
class Staffed:
    """One service: the workers that it should have now, and those that there are, draining ones included."""

    replicas: int
    workers: tuple[Worker, ...]


class Door(Protocol):
    """Raises DoorClosed from both."""

    async def services(self) -> dict[str, Staffed]: ...

    async def scale(self, service: str, replicas: int, why: str) -> None: ...


class SupervisorDoor:
    """`dynamo serve` on this machine, by the socket that `dynamo scale` uses."""

    def __init__(self, path: str | Path):
        self._path = path

    async def services(self) -> dict[str, Staffed]:
        try:
            answer = await ask(self._path, do="status")
        except ControlError as error:
            raise DoorClosed(str(error)) from error
        return {
            name: Staffed(
                sum(not one["leaving"] for one in workers),
                tuple(Worker(f"{name}-{one['index']}", one["ready"], one["metrics"]) for one in workers),
            )
            for name, workers in answer["services"].items()
        }

    async def scale(self, service: str, replicas: int, why: str) -> None:
        try:
            await ask(self._path, do="scale", service=service, workers=replicas, why=why)
        except ControlError as error:
            raise DoorClosed(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _Told:
    """An adapter: the number that it has accepted, and what the deployment said then."""

    replicas: int
    instead_of: int
    when: float


class KubernetesDoor:
    """A DynamoGraphDeployment: one DynamoGraphDeploymentScalingAdapter per component that may be scaled.

    The operator copies ``spec.replicas`` of an adapter into the deployment, so that autoscalers do not fight over it.
    That takes it a while, in which a service has the number that its adapter has accepted: who looked at the deployment
    alone would ask for it again and again. Once the deployment says anything else, that counts. Services are named as
    the graph and the configuration do it. Pods are found by the labels that the operator gives.

    It does with what the operator lets its planners do (deploy/helm/charts/platform/components/operator/templates/
    planner.yaml of ai-dynamo/dynamo): get deployments, list pods, patch the scale of adapters.
    """

    def __init__(self, api_client: Any, namespace: str, deployment: str):
        from kubernetes import client

        self._custom = client.CustomObjectsApi(api_client)
        # The client calls a patch that is no list a strategic one, which custom objects do not have.
        patching = client.ApiClient(api_client.configuration, "Content-Type", "application/merge-patch+json")
        self._patches = client.CustomObjectsApi(patching)
        self._core = client.CoreV1Api(api_client)
        self._host = api_client.configuration.host
        self._namespace, self._deployment = namespace, deployment
        self._said: dict[str, int] = {}
        """Service → replicas in the deployment, at the last look."""
        self._told: dict[str, _Told] = {}

    async def services(self) -> dict[str, Staffed]:
        found = await self._call(
            self._custom.get_namespaced_custom_object,
            GROUP,
            VERSIONS[0],
            self._namespace,
            DEPLOYMENTS,
            self._deployment,
        )
        pods = await self._call(
            self._core.list_namespaced_pod,
            self._namespace,
            label_selector=f"{DEPLOYMENT_LABEL}={self._deployment}",
        )
        self._said = {
            service_of(one["name"]): one.get("replicas", 1)
            for one in found["spec"]["components"]
            if one.get("scalingAdapter") is not None
        }
        return {
            name: Staffed(
                self._replicas(name),
                tuple(
                    _worker(pod)
                    for pod in pods.items
                    if (pod.metadata.labels or {}).get(COMPONENT_LABEL) == component_of(name)
                ),
            )
            for name in self._said
        }

    def _replicas(self, service: str) -> int:
        said, told = self._said[service], self._told.get(service)
        if told is not None and said == told.instead_of and time.monotonic() < told.when + FOLLOW_SECONDS:
            return told.replicas
        self._told.pop(service, None)
        return said

    async def scale(self, service: str, replicas: int, why: str) -> None:
        await self._call(
            self._patches.patch_namespaced_custom_object_scale,
            GROUP,
            VERSIONS[0],
            self._namespace,
            ADAPTERS,
            adapter_of(self._deployment, component_of(service)),
            {"spec": {"replicas": replicas}},
        )
        if service in self._said:
            self._told[service] = _Told(replicas, self._said[service], time.monotonic())

    async def _call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return await asyncio.to_thread(function, *arguments, _request_timeout=REQUEST_SECONDS, **named)
        except ApiException as error:
            said = no_tls(error, self._host) or f"{error.status} {error.reason}"
            raise DoorClosed(f"Kubernetes: {said}") from error
        except HTTPError as error:
            said = no_tls(error, self._host) or "its API server cannot be reached"
            raise DoorClosed(f"Kubernetes: {said}") from error


def _worker(pod: Any) -> Worker:
    conditions = {one.type: one.status for one in pod.status.conditions or []}
    staying = pod.metadata.deletion_timestamp is None
    address = pod.status.pod_ip
    host = f"[{address}]" if address and ":" in address else address
    return Worker(
        pod.metadata.name,
        staying and conditions.get("Ready") == "True",
        f"http://{host}:{SYSTEM_PORT}/metrics" if host else None,
    )


def door_of(environment: Mapping[str, str]) -> Door:
    """Kubernetes in a pod of the operator's, else the supervisor. Raises DoorClosed where there is neither."""
    if DEPLOYMENT in environment:
        from kubernetes import client, config

        try:
            config.load_incluster_config()
        except config.ConfigException as error:
            try:
                config.load_kube_config()
            except config.ConfigException:
                raise DoorClosed(f"no access to Kubernetes: {error}") from error
        namespace = environment.get(DEPLOYMENT_NAMESPACE, "default")
        return KubernetesDoor(client.ApiClient(), namespace, environment[DEPLOYMENT])
    if SOCKET in environment:
        return SupervisorDoor(environment[SOCKET])
    raise DoorClosed("neither dynamo serve nor Dynamo's operator runs this planner")
