# SPDX-License-Identifier: Apache-2.0
"""Pods without a cluster: the commands of a manifest's components as processes, probed as a kubelet would."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dynamo_epd.sdk.nats_server import nats_binary
from tests.kubernetes_server import KubernetesServer
from tests.test_worker import eventually
from tests.toys.running import ROOT, clean_environment, free_port

BASE = ROOT / "deploy" / "kubernetes" / "base"
NATS_CONFIG = BASE / "nats.conf"
MONITOR = next(yaml.safe_load_all((BASE / "monitor.yaml").read_text()))


def main_of(one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = one["podTemplate"]["spec"]["containers"][0]
    return found


@contextlib.contextmanager
def nats(directory: Path, secrets: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server's address. With ``secrets`` it is the one that deployments bring, by its nats.conf, which takes its user
    and password from them."""
    port, log, store = free_port(), directory / "nats.log", str(directory / "jetstream")
    arguments = ["-p", str(port), "-a", "127.0.0.1", "-js", "-sd", store]
    if secrets is not None:
        config = directory / "nats.conf"
        here = {"0.0.0.0:4222": f"127.0.0.1:{port}", "0.0.0.0:8222": f"127.0.0.1:{free_port()}", "/data": store}
        config.write_text(placed(NATS_CONFIG.read_text(), here))
        arguments = ["-c", str(config)]
    with log.open("w") as file:
        environment = os.environ | (secrets or {})
        process = subprocess.Popen([nats_binary(), *arguments], env=environment, stdout=file, stderr=file)
    try:
        eventually(lambda: "Server is ready" in log.read_text(), "nats-server")
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def placed(text: str, places: Mapping[str, str]) -> str:
    """With what lies elsewhere here, all at once: a place may hold another's name. Each must be named in ``text``."""
    missing = [place for place in places if place not in text]
    assert not missing, f"{missing} are not named any more"
    return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)


class Pod:
    """A stand-in for the operator and the kubelet: the command of a manifest's component as a process, with the
    variables that the operator adds to it (component_common.go, component_frontend.go, component_planner.go,
    component_worker.go).

    ``secrets``: what the cluster's secrets hold, by key. ``of_image``: variables that the image has set.
    """

    def __init__(
        self,
        stored: dict[str, Any],
        component: dict[str, Any],
        kubeconfig: str,
        nats: str,
        code: Path,
        secrets: Mapping[str, str] | None = None,
        of_image: Mapping[str, str] | None = None,
    ):
        self._grace = component["podTemplate"]["spec"]["terminationGracePeriodSeconds"]
        self._leaves = False
        self.name = f"{stored['metadata']['name']}-{component['name'].lower()}-0"
        self.main = main_of(component)
        self.ports = {8000: free_port(), 9090: free_port()}
        self.uid = f"uid-of-{self.name}"
        namespace, parent = stored["metadata"]["namespace"], stored["metadata"]["name"]
        self._namespace = namespace
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
        environment = clean_environment() | dict(of_image or {}) | added
        environment |= {one["name"]: _value(one, secrets or {}) for one in own}
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

    def metrics(self) -> str:
        """What the PodMonitor of the base has Prometheus fetch."""
        (endpoint,) = MONITOR["spec"]["podMetricsEndpoints"]
        url = f"http://127.0.0.1:{self.ports[endpoint['portNumber']]}{endpoint['path']}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return str(reply.read().decode())

    def show(self, cluster: KubernetesServer) -> None:
        """A ready pod's EndpointSlice, as a Service of the operator's makes Kubernetes write it."""
        labels = {"nvidia.com/dynamo-discovery-backend": "kubernetes", "nvidia.com/dynamo-discovery-enabled": "true"}
        target = {"kind": "Pod", "name": self.name, "namespace": self._namespace, "uid": self.uid}
        cluster.put(
            "discovery.k8s.io",
            "endpointslices",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": self.name, "namespace": self._namespace, "labels": labels},
                "addressType": "IPv4",
                "ports": [{"name": "system", "port": 9090}],
                "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}, "targetRef": target}],
            },
        )

    def leave(self) -> None:
        """As the kubelet begins: a SIGTERM to the first process, once."""
        if not self._leaves:
            self._leaves = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """As the kubelet: `leave`, and after its grace a SIGKILL."""
        self.leave()
        try:
            return self.process.wait(self._grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _value(variable: dict[str, Any], secrets: Mapping[str, str]) -> str:
    """Raises KeyError for a key that no secret has, where a pod would not start."""
    found: str = variable["value"] if "value" in variable else secrets[variable["valueFrom"]["secretKeyRef"]["key"]]
    return found
