# SPDX-License-Identifier: Apache-2.0
"""The planner's doors: Kubernetes over HTTP with its own client. The supervisor's: acceptance/test_planner_load.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from components.planner import PlannerConfig
from dynamo_epd.planning.doors import DoorClosed, KubernetesDoor, Staffed, SupervisorDoor, Worker, door_of
from dynamo_epd.sdk.operator import component_of
from tests.certificates import Certificates
from tests.kubernetes_server import ADAPTERS, DEPLOYMENTS, GROUP, KubernetesServer


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    with KubernetesServer() as found:
        yield found


def door(server: KubernetesServer, tmp_path: Path, token: str = "planner") -> KubernetesDoor:
    """With the rights that the operator gives a planner."""
    settings = config.new_client_from_config(str(server.kubeconfig(tmp_path / f"{token}.yaml", token)))
    assert isinstance(settings, client.ApiClient)
    return KubernetesDoor(settings, "default", "demo")


def deployed(server: KubernetesServer, **replicas: int) -> None:
    """A deployment with adapters, and a planner that has none."""
    components: list[dict[str, Any]] = [
        {"name": name, "type": "worker", "replicas": count, "scalingAdapter": {}} for name, count in replicas.items()
    ]
    server.put(
        GROUP,
        DEPLOYMENTS,
        {
            "apiVersion": f"{GROUP}/v1beta1",
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": "demo", "namespace": "default"},
            "spec": {"components": [*components, {"name": "Planner", "type": "planner"}]},
        },
    )
    for name, count in replicas.items():
        server.put(GROUP, ADAPTERS, adapter(name, count))


def adapter(component: str, replicas: int, deployment: str = "demo") -> dict[str, Any]:
    return {
        "apiVersion": f"{GROUP}/v1beta1",
        "kind": "DynamoGraphDeploymentScalingAdapter",
        "metadata": {"name": f"{deployment}-{component.lower()}", "namespace": "default"},
        "spec": {"dgdRef": {"name": deployment, "componentName": component}, "replicas": replicas},
    }


def pod(name: str, component: str, *, ready: bool, leaving: bool = False, address: str = "10.0.0.7") -> dict[str, Any]:
    labels = {"nvidia.com/dynamo-graph-deployment-name": "demo", "nvidia.com/dynamo-component": component}
    metadata: dict[str, Any] = {"name": name, "namespace": "default", "labels": labels}
    if leaving:
        metadata["deletionTimestamp"] = "2026-11-21T12:00:00Z"
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "status": {"podIP": address, "conditions": conditions},
    }


def test_workers_are_the_deployments_pods_and_numbers_its_own(server: KubernetesServer, tmp_path: Path) -> None:
    deployed(server, EncodeWorker=2)
    server.put("", "pods", pod("e-1", "EncodeWorker", ready=True))
    server.put("", "pods", pod("e-2", "EncodeWorker", ready=False, address="fd00::8"))
    server.put("", "pods", pod("e-3", "EncodeWorker", ready=True, leaving=True))
    server.put("", "pods", pod("f-1", "Frontend", ready=True))
    found = asyncio.run(door(server, tmp_path).services())
    assert found == {
        "EncodeWorker": Staffed(
            2,
            (
                Worker("e-1", True, "http://10.0.0.7:9090/metrics"),
                Worker("e-2", False, "http://[fd00::8]:9090/metrics"),
                Worker("e-3", False, "http://10.0.0.7:9090/metrics"),
            ),
        )
    }


def test_it_patches_the_adapter_and_nothing_else_of_it(server: KubernetesServer, tmp_path: Path) -> None:
    deployed(server, EncodeWorker=2)

    async def scale() -> dict[str, Staffed]:
        kubernetes = door(server, tmp_path)
        await kubernetes.scale("EncodeWorker", 5, "a test")
        return await kubernetes.services()

    assert asyncio.run(scale())["EncodeWorker"].replicas == 5
    stored = server.objects[GROUP, ADAPTERS, "default", "demo-encodeworker"]
    assert stored["spec"] == {"dgdRef": {"name": "demo", "componentName": "EncodeWorker"}, "replicas": 5}
    assert [path.partition("?")[0] for verb, path, _ in server.requests if verb == "PATCH"] == [
        f"/apis/{GROUP}/v1beta1/namespaces/default/{ADAPTERS}/demo-encodeworker/scale"
    ]


def test_a_stage_is_held_to_what_its_own_name_says(server: KubernetesServer, tmp_path: Path) -> None:
    """The operator takes no `_` in the names of components; in the configuration it stays."""
    component = component_of("My_Stage")
    assert component == "My-Stage"
    deployed(server, **{component: 1})
    server.put("", "pods", pod("m-1", component, ready=True))

    async def found() -> dict[str, Staffed]:
        kubernetes = door(server, tmp_path)
        services = await kubernetes.services()
        for name in services:
            await kubernetes.scale(name, 2, "a test")
        return services

    ((name, staffed),) = asyncio.run(found()).items()
    assert [one.name for one in staffed.workers] == ["m-1"]
    assert PlannerConfig(stages={"My_Stage": {"max": 3}}).limits(name).max == 3
    assert server.objects[GROUP, ADAPTERS, "default", "demo-my-stage"]["spec"]["replicas"] == 2


def test_what_an_adapter_has_accepted_counts_until_the_operator_has_copied_it(
    server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed(server, EncodeWorker=2, DecodeWorker=1)
    server.lag = 3600.0

    def in_deployment(replicas: int) -> None:
        stored = server.deployment("demo")
        stored["spec"]["components"][0]["replicas"] = replicas
        server.touch(stored)

    async def looks() -> list[int]:
        kubernetes, found = door(server, tmp_path), []

        async def look() -> None:
            services = await kubernetes.services()
            assert services["DecodeWorker"].replicas == 1
            found.append(services["EncodeWorker"].replicas)

        await look()
        await kubernetes.scale("EncodeWorker", 5, "a test")
        await look()
        in_deployment(5)
        await look()
        in_deployment(2)  # somebody else's, by the same adapter
        await look()
        await kubernetes.scale("EncodeWorker", 4, "a test")
        await look()
        in_deployment(3)
        await look()
        await kubernetes.scale("EncodeWorker", 6, "a test")
        await look()
        monkeypatch.setattr("dynamo_epd.planning.doors.FOLLOW_SECONDS", 0.0)  # nobody follows any more
        await look()
        return found

    assert asyncio.run(looks()) == [2, 5, 5, 2, 4, 3, 6, 3]


def test_no_rights_no_adapter_and_no_server_are_one_line_each(server: KubernetesServer, tmp_path: Path) -> None:
    deployed(server, EncodeWorker=2)

    async def refused(kubernetes: KubernetesDoor, service: str) -> str:
        await kubernetes.services()
        with pytest.raises(DoorClosed) as closed:
            await kubernetes.scale(service, 5, "a test")
        return str(closed.value)

    assert "Kubernetes: 403" in asyncio.run(refused(door(server, tmp_path, "reader"), "EncodeWorker"))
    assert "Kubernetes: 404" in asyncio.run(refused(door(server, tmp_path), "Frontend"))
    nowhere = client.Configuration()
    nowhere.host, nowhere.retries = "http://127.0.0.1:1", False
    with pytest.raises(DoorClosed, match="cannot be reached"):
        asyncio.run(KubernetesDoor(client.ApiClient(nowhere), "default", "demo").services())


@pytest.mark.parametrize("retries", [None, False])
def test_tls_that_fails_is_said_as_the_commands_say_it(
    server: KubernetesServer, tmp_path: Path, retries: bool | None
) -> None:
    deployed(server, EncodeWorker=2)
    certificates = Certificates(tmp_path, "IP:127.0.0.1")
    server._http.socket = certificates.server.wrap_socket(server._http.socket, server_side=True)
    strange = client.Configuration()
    strange.host, strange.retries = server.url.replace("http:", "https:"), retries
    with pytest.raises(DoorClosed) as closed:
        asyncio.run(KubernetesDoor(client.ApiClient(strange), "default", "demo").services())
    words = rf"Kubernetes: no TLS with {strange.host}: .*certificate verify failed.*"
    assert re.fullmatch(words, str(closed.value)), str(closed.value)


def test_the_door_is_that_of_who_runs_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere")
    assert isinstance(door_of({"DYNAMO_CONTROL": "/nowhere"}), SupervisorDoor)
    with pytest.raises(DoorClosed, match="no access to Kubernetes"):
        door_of({"DYN_PARENT_DGD_K8S_NAME": "demo", "DYNAMO_CONTROL": "/of the pod's own serve"})
    with pytest.raises(DoorClosed, match="neither"):
        door_of({})
    with pytest.raises(DoorClosed, match="the graph does not answer"):
        asyncio.run(SupervisorDoor("/nowhere").services())
