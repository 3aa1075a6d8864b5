# SPDX-License-Identifier: Apache-2.0
"""Pods without a cluster: the commands of a manifest's components as processes, probed as a kubelet would."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamo_epd.sdk.nats_server import nats_binary
from tests.kubernetes_server import KubernetesServer
from tests.test_worker import eventually
from tests.toys.running import clean_environment, free_port


def main_of(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = one["podTemplate"]["spec"]["containers"][0]
    return found


@contextlib.contextmanager
def nats(log: Path) -> Iterator[str]:
    port = free_port()
    with log.open("w") as file:
        command = [nats_binary(), "-p", str(port), "-a", "127.0.0.1", "-js", "-sd", str(log.parent / "jetstream")]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        eventually(lambda: "Server is ready" in log.read_text(), "nats-server")
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


class Pod:
    """A stand-in for the operator and the kubelet: the command of a manifest's component as a process, with the
    variables that the operator adds to it (component_common.go, component_frontend.go, component_planner.go,
    component_worker.go).
    """

    def __init__(self, stored: dict[str, Any], component: dict[str, Any], kubeconfig: str, nats: str, code: Path):
        self.name = f"{stored['metadata']['name']}-{component['name'].lower()}-0"
        self.main = main_of(component)
        self.ports = {8000: free_port(), 9090: free_port()}
        self.uid = f"uid-of-{self.name}"
        namespace, parent = stored["metadata"]["namespace"], stored["metadata"]["name"]
        added = {
            "DYN_NAMESPACE": f"{namespace}-{parent}",
            "DYN_COMPONENT": component["type"],
            "DYN_PARENT_DGD_K8S_NAME": parent,
            "DYN_PARENT_DGD_K8S_NAMESPACE": namespace,
            "POD_NAME": self.name,
            "POD_NAMESPACE": namespace,
            "POD_UID": self.uid,
            "DYN_DISCOVERY_BACKEND": "kubernetes",
            "NATS_SERVER": nats,
            "KUBECONFIG": kubeconfig,  # in a pod its account
        }
        if component["type"] == "frontend":
            added |= {"DYNAMO_PORT": "8000", "DYN_HTTP_PORT": "8000", "DYN_NAMESPACE_PREFIX": f"{namespace}-{parent}"}
        elif component["type"] == "planner":
            added |= {"DYN_SYSTEM_PORT": "9090", "PLANNER_PROMETHEUS_PORT": "9085"}
        else:
            added |= {
                "DYN_SYSTEM_ENABLED": "true",
                "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]',
                "DYN_SYSTEM_PORT": "9090",
                "DYN_HEALTH_CHECK_ENABLED": "false",
                "DYN_NAMESPACE_WORKER_SUFFIX": "0a1b2c3d",
            }
        own = [*stored["spec"]["env"], *self.main.get("env", [])]
        environment = clean_environment() | added | {one["name"]: one["value"] for one in own}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        # One machine has one port of each number, and that may be another's.
        environment["DYN_SYSTEM_PORT"] = str(self.ports[int(environment["DYN_SYSTEM_PORT"])])
        arguments = [str(self.ports[8000]) if word == "8000" else word for word in self.main["args"]]
        self._log = code / f"{self.name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*self.main["command"], *arguments],
                cwd=code,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def probe(self, kind: str) -> int:
        """HTTP status, or 0 where nothing listens."""
        get = self.main[f"{kind}Probe"]["httpGet"]
        try:
            url = f"{get['scheme'].lower()}://127.0.0.1:{self.ports[get['port']]}{get['path']}"
            with urllib.request.urlopen(url, timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def show(self, cluster: KubernetesServer) -> None:
        """A ready pod's EndpointSlice, as a Service of the operator's makes Kubernetes write it."""
        labels = {"nvidia.com/dynamo-discovery-backend": "kubernetes", "nvidia.com/dynamo-discovery-enabled": "true"}
        target = {"kind": "Pod", "name": self.name, "namespace": "default", "uid": self.uid}
        cluster.put(
            "discovery.k8s.io",
            "endpointslices",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": self.name, "namespace": "default", "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "system", "port": 9090}],
                "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}, "targetRef": target}],
            },
        )

    def stop(self) -> int:
        """As the kubelet: a SIGTERM to the first process."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
