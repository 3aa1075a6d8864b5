# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 - `desk` is a fixture
"""`dynamo deploy` and `dynamo deployment` against an API server, with the real client, kubectl and runtime."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo_epd.sdk.deployment import builds, commands
from dynamo_epd.sdk.deployment.manifest import LAST_APPLIED, ORDER
from dynamo_epd.sdk.deployment.merging import change, three_way
from dynamo_epd.sdk.deployment.status import state
from dynamo_epd.sdk.operator import SYSTEM_PORT
from tests import kubectl
from tests.certificates import Certificates
from tests.deploying import Desk, desk  # noqa: F401
from tests.kubernetes_server import ADAPTERS, DEPLOYMENTS, KubernetesServer, Refused, make_ready, merged
from tests.pods import Pod, main_of, nats
from tests.test_worker import eventually
from tests.toys.running import ROOT, clean_environment


@pytest.fixture
def cluster(desk: Desk) -> Iterator[KubernetesServer]:
    with KubernetesServer() as server:
        desk.patch.setenv("KUBECONFIG", str(server.kubeconfig(desk.directory / "kubeconfig")))
        desk.patch.setattr(commands, "POLL_SECONDS", 0.05)
        yield server


def deploy(desk: Desk, *arguments: str) -> str:
    tag = desk.build()
    assert desk.run("deploy", tag, "-n", "corner", *arguments) == 0, desk.noted
    return tag


def component(cluster: KubernetesServer, name: str, deployment: str = "corner") -> dict[str, Any]:
    stored = cluster.deployment(deployment)["spec"]["components"]
    found: dict[str, Any] = next(one for one in stored if one["name"] == name)
    return found


def test_the_life_of_a_deployment(desk: Desk, cluster: KubernetesServer) -> None:
    tag = deploy(desk, "--Store.shelves=5")
    assert desk.said.splitlines()[0] == f"Created corner of {tag} in namespace default."
    assert "state:     ready" in desk.said
    assert desk.run("deployment", "list") == 0
    head, row = (line.split() for line in desk.said.splitlines())
    assert (head, row[:3]) == (["NAME", "BUILD", "STATE", "AGE"], ["corner", tag, "ready"])
    assert desk.run("deployment", "get", "corner") == 0
    assert "Store (worker): 1 of 1 ready" in desk.said
    assert "url:       http://corner-door.default.svc:8000 inside the cluster" in desk.said
    assert desk.run("deployment", "get", "corner", "-o", "json") == 0
    assert yaml.safe_load(desk.said)["metadata"]["uid"] == cluster.deployment("corner")["metadata"]["uid"]
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=4") == 0
    assert desk.said.startswith("Updated corner in namespace default.\n")
    assert "Store (worker): 4 of 4 ready" in desk.said
    assert component(cluster, "Store")["replicas"] == 4
    assert '"shelves":5' in cluster.deployment("corner")["spec"]["env"][0]["value"]
    assert desk.run("deployment", "delete", "corner") == 0
    assert desk.said == "Deleted corner from namespace default.\n"
    assert cluster.objects == {}
    assert desk.run("deployment", "list", "-o", "yaml") == 0
    assert yaml.safe_load(desk.said) == []


def test_deploy_and_deployment_create_are_the_same(desk: Desk, cluster: KubernetesServer) -> None:
    tag = deploy(desk, "--no-wait")
    assert desk.run("deployment", "create", tag, "-n", "other", "--no-wait", "-t", "kubernetes") == 0
    one, other = cluster.deployment("corner"), cluster.deployment("other")
    assert one["spec"] == other["spec"]


def test_an_update_keeps_what_others_changed(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk, "--env", "A=1", "--env-from-secret", "KEY=key")
    stored = cluster.deployment("corner")
    component(cluster, "Store")["replicas"] = 9  # as the operator does when an adapter was told so
    main_of(component(cluster, "Door"))["image"] = "example/fixed:1.0.1"
    main_of(component(cluster, "Door"))["env"] = [{"name": "DEBUG", "value": "1"}]
    component(cluster, "Till")["podTemplate"]["metadata"] = {"annotations": {"theirs": "yes"}}
    stored["spec"]["components"].append(
        {
            "name": "Extra",
            "type": "worker",
            "podTemplate": {"spec": {"containers": [{"name": "main", "image": "x:1.0.0"}]}},
        }
    )
    stored["metadata"]["labels"]["theirs"] = "yes"
    stored["spec"]["priorityClassName"] = "high"
    cluster.touch(stored)
    assert desk.run("deployment", "update", "corner", "--Store.shelves=8", "--env", "B=2") == 0, desk.noted
    assert component(cluster, "Store")["replicas"] == 9
    assert main_of(component(cluster, "Door"))["image"] == "example/fixed:1.0.1"
    assert main_of(component(cluster, "Door"))["env"] == [{"name": "DEBUG", "value": "1"}]
    assert component(cluster, "Till")["podTemplate"]["metadata"]["annotations"] == {"theirs": "yes"}
    assert component(cluster, "Extra")["type"] == "worker"
    changed = cluster.deployment("corner")
    assert changed["metadata"]["labels"]["theirs"] == "yes"
    assert changed["spec"]["priorityClassName"] == "high"
    env = {one["name"]: one for one in changed["spec"]["env"]}
    assert '"shelves":8' in env["DYNAMO_GRAPH_CONFIG"]["value"]
    assert (env["A"]["value"], env["B"]["value"]) == ("1", "2")
    assert env["KEY"]["valueFrom"]["secretKeyRef"]["key"] == "key"
    patched = [kind for verb, _, kind in cluster.requests if verb == "PATCH"]
    assert patched == ["application/merge-patch+json"]


def test_an_update_that_another_gets_ahead_of_is_made_again(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    ahead = 2

    def another(verb: str, _: str) -> None:
        nonlocal ahead
        if verb == "PATCH" and ahead:
            ahead -= 1
            stored = cluster.deployment("corner")
            component(cluster, "Store")["replicas"] = component(cluster, "Store").get("replicas", 1) + 5
            cluster.touch(stored)

    cluster.before = another
    assert desk.run("deployment", "update", "corner", "--Store.shelves=8") == 0
    assert component(cluster, "Store")["replicas"] == 11
    assert '"shelves":8' in cluster.deployment("corner")["spec"]["env"][0]["value"]
    ahead = 100
    assert desk.run("deployment", "update", "corner", "--Store.shelves=9") == 1
    assert "the object has been modified" in desk.noted


def test_an_update_without_a_change_sends_nothing(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk, "--Store.shelves=5")
    assert desk.run("deployment", "update", "corner", "--Store.shelves=5") == 0
    assert desk.said == "corner is as it should be.\n"
    assert not [verb for verb, _, _ in cluster.requests if verb == "PATCH"]


def test_an_update_to_another_build(desk: Desk, cluster: KubernetesServer) -> None:
    before = deploy(desk, "--Store.shelves=5")
    with (desk.shop / "shop.py").open("a") as file:
        file.write("# newer\n")
    after = desk.build()
    assert desk.run("deployment", "update", "corner", after) == 0
    assert main_of(component(cluster, "Store"))["image"] == after != before
    assert '"shelves":5' in cluster.deployment("corner")["spec"]["env"][0]["value"]
    desk.patch.setenv("DYNAMO_IMAGE", "example/all:3")
    assert desk.run("deployment", "update", "corner") == 0
    desk.patch.delenv("DYNAMO_IMAGE")
    assert desk.run("deployment", "update", "corner", "--Store.shelves=6") == 0
    assert main_of(component(cluster, "Store"))["image"] == "example/all:3"
    assert main_of(component(cluster, "Till"))["image"] == "example/till:1.2.3"
    (desk.directory / "new.yaml").write_text("Store: {gate: x}\n")
    assert desk.run("deployment", "update", "corner", "-f", str(desk.directory / "new.yaml")) == 0
    assert cluster.deployment("corner")["spec"]["env"][0]["value"] == '{"Store":{"gate":"x"}}'


def test_v1alpha1_can_be_updated_too(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk, "--api-version", "v1alpha1")
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=3") == 0
    stored = cluster.deployment("corner")
    assert stored["apiVersion"] == "nvidia.com/v1alpha1"
    assert stored["spec"]["services"]["Store"]["replicas"] == 3


def test_the_planner_is_switched_on_by_the_seeds_own_words(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    assert component(cluster, "Planner")["type"] == "planner"
    assert component(cluster, "Planner")["replicas"] == 0, "the operator takes no component later on"
    assert desk.run("deployment", "update", "corner", "--Planner.no-operation=false") == 0, desk.noted
    assert "replicas" not in component(cluster, "Planner"), "one is what the operator takes by itself"
    assert desk.run("deployment", "update", "corner", "--Planner.no-operation=true") == 0
    assert component(cluster, "Planner")["replicas"] == 0


def test_replicas_are_changed_where_the_operator_has_them(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk, "--Store.ServiceArgs.workers=2")
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=4") == 0, desk.noted
    scaled = [path for verb, path, _ in cluster.requests if verb == "PATCH" and path.endswith("/scale")]
    assert [path.rpartition("/v1beta1/")[2] for path in scaled] == [
        "namespaces/default/dynamographdeploymentscalingadapters/corner-store/scale"
    ]
    component(cluster, "Store")["replicas"] = 7  # somebody's autoscaler
    assert desk.run("deployment", "update", "corner", "--Store.shelves=9") == 0, desk.noted
    assert component(cluster, "Store")["replicas"] == 7, "which stay where the number was not asked for anew"
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=1") == 0, desk.noted
    assert component(cluster, "Store")["replicas"] == 1
    # What the double refuses as the operator's webhook does, or none of this says anything.
    stored = copy.deepcopy(cluster.deployment("corner"))
    component_of_copy = next(one for one in stored["spec"]["components"] if one["name"] == "Store")
    component_of_copy["replicas"] = 3
    path = "/apis/nvidia.com/v1beta1/namespaces/default/dynamographdeployments/corner"
    with pytest.raises(Refused, match="cannot be modified directly"):
        cluster.answer("PUT", path, "admin", "application/json", json.dumps(stored).encode())


def test_an_adapter_that_is_not_there_is_said(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    for place in [place for place in cluster.objects if place[1] == ADAPTERS]:
        del cluster.objects[place]
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=4") == 1
    assert desk.noted.endswith("error: the operator has not made the scaling adapter 'corner-store' yet\n")


def test_an_update_that_would_change_the_services_is_refused(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    stored = cluster.deployment("corner")
    gone = component(cluster, "Till")
    stored["spec"]["components"].remove(gone)
    last = json.loads(stored["metadata"]["annotations"][LAST_APPLIED])
    last["spec"]["components"] = [one for one in last["spec"]["components"] if one["name"] != "Till"]
    stored["metadata"]["annotations"][LAST_APPLIED] = json.dumps(last)  # as of a build without it
    assert desk.run("deployment", "update", "corner") == 1
    assert "this adds Till; a deployment keeps its services: `dynamo deployment delete corner`" in desk.noted


def test_what_a_dry_run_said_and_kubectl_applied_can_be_updated(desk: Desk, cluster: KubernetesServer) -> None:
    tag = desk.build()
    assert desk.run("deploy", tag, "-n", "corner", "--dry-run") == 0
    path = "/apis/nvidia.com/v1beta1/namespaces/default/dynamographdeployments"
    made = yaml.safe_load(desk.said)
    main_of(made["spec"]["components"][0])["volumeMounts"] = [{"name": "kustomize", "mountPath": "/theirs"}]
    cluster.answer("POST", path, "admin", "application/json", json.dumps(made).encode())
    assert desk.run("deployment", "update", "corner", "--Store.shelves=9") == 0, desk.noted
    assert main_of(cluster.deployment("corner")["spec"]["components"][0])["volumeMounts"][0]["name"] == "kustomize"


def test_the_namespace_is_said_or_the_environments_or_the_contexts(desk: Desk, cluster: KubernetesServer) -> None:
    cluster.namespaces |= {"said", "context"}
    desk.patch.setenv("KUBECONFIG", str(cluster.kubeconfig(desk.directory / "other", namespace="context")))
    tag = deploy(desk)
    desk.patch.setenv("KUBE_NS", "dynamo-cloud")
    assert desk.run("deploy", tag, "-n", "corner") == 0
    assert desk.run("deploy", tag, "-n", "corner", "--namespace", "said") == 0
    assert sorted(key[2] for key in cluster.objects if key[1] == DEPLOYMENTS) == ["context", "dynamo-cloud", "said"]
    assert all(stored["metadata"]["namespace"] == key[2] for key, stored in cluster.objects.items())


def test_waiting(desk: Desk, cluster: KubernetesServer) -> None:
    asked = 0

    def slowly(deployment: dict[str, Any]) -> None:
        make_ready(deployment)
        deployment["status"]["conditions"][0] |= {"status": "False", "message": "pods are pending"}
        deployment["status"]["components"]["Store"]["readyReplicas"] = 0

    def later(verb: str, _: str) -> None:
        nonlocal asked
        asked += verb == "GET"
        if asked == 4:
            make_ready(cluster.deployment("corner"))

    cluster.operator, cluster.before = slowly, later
    tag = deploy(desk)
    assert "  pods are pending (Store 0/1)\n" in desk.noted
    assert "state:     ready" in desk.said
    assert desk.run("deploy", tag, "-n", "late", "--timeout", "0.2") == 1
    assert "error: late is not ready after 0.2 s: pods are pending (Store 0/1)" in desk.noted

    def failing(deployment: dict[str, Any]) -> None:
        slowly(deployment)
        deployment["status"]["state"] = "failed"

    cluster.operator = failing
    assert desk.run("deploy", tag, "-n", "broken") == 1
    assert "error: broken failed: pods are pending" in desk.noted
    cluster.operator = lambda deployment: None
    assert desk.run("deploy", tag, "-n", "unseen", "--timeout", "0.1") == 1
    assert "the operator has not seen it yet" in desk.noted


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Refused(503, "ServiceUnavailable", "etcdserver: leader changed"), "cannot answer now: 503 etcdserver: leader"),
        (Refused(429, "TooManyRequests", "too many requests"), "cannot answer now: 429 too many requests"),
        (ConnectionResetError(), "no cluster answers at http://127.0.0.1:"),
    ],
    ids=["503", "429", "lost"],
)
def test_waiting_outlasts_an_api_server_that_has_trouble(
    desk: Desk, cluster: KubernetesServer, trouble: Exception, words: str
) -> None:
    asked, troubled = 0, range(2, 5)

    def away(verb: str, path: str) -> None:
        nonlocal asked
        asked += verb == "GET" and path.endswith("/corner")
        if asked in troubled:
            raise trouble
        if asked == troubled.stop:
            make_ready(cluster.deployment("corner"))

    cluster.operator, cluster.before = lambda deployment: None, away
    tag = deploy(desk)
    waited = [line for line in desk.noted.splitlines() if line.startswith("  ")]
    assert len(waited) == 2, desk.noted
    assert "has not seen it yet" in waited[0] and words in waited[1]
    assert "state:     ready" in desk.said
    # But not for ever, and not for what will be answered the same again.
    desk.patch.setattr(commands, "SILENCE_SECONDS", 0.2)
    asked, troubled = 0, range(2, 10**6)
    assert desk.run("deployment", "update", "corner", "--Store.shelves=7") == 1
    assert words in desk.noted.splitlines()[-1] and desk.noted.splitlines()[-1].startswith("error: ")
    cluster.before = lambda verb, path: None
    assert desk.run("deployment", "delete", "corner") == 0
    asked, trouble = 0, Refused(403, "Forbidden", "your token has expired")
    cluster.before = away
    assert desk.run("deploy", tag, "-n", "corner") == 1
    assert asked == 2
    assert desk.noted.endswith("error: no rights: your token has expired\n")


def test_delete_waits_for_those_who_clear_up(desk: Desk, cluster: KubernetesServer) -> None:
    tag = deploy(desk)
    place = ("nvidia.com", DEPLOYMENTS, "default", "corner")

    def held() -> None:
        cluster.deployment("corner")["metadata"]["finalizers"] = ["example/clears-up"]

    held()
    assert desk.run("deployment", "delete", "corner", "--no-wait") == 0
    assert (desk.said, desk.noted) == ("Deleting corner from namespace default.\n", "")
    assert cluster.deployment("corner")["metadata"]["deletionTimestamp"]
    assert desk.run("deployment", "delete", "corner", "--timeout", "0.2") == 1
    assert desk.said == ""
    assert desk.noted.endswith("error: corner is not gone after 0.2 s: waiting for example/clears-up\n")
    looked = 0

    def later(verb: str, path: str) -> None:
        nonlocal looked
        looked += verb == "GET" and path.endswith("/corner")
        if looked == 3:
            cluster.objects.pop(place, None)

    cluster.before = later
    assert desk.run("deployment", "delete", "corner") == 0
    assert (desk.said, desk.noted) == ("Deleted corner from namespace default.\n", "  waiting for example/clears-up\n")
    assert looked == 3
    assert desk.run("deploy", tag, "-n", "corner") == 0, desk.noted
    held()
    looked = 0

    def anew(verb: str, path: str) -> None:
        nonlocal looked
        looked += verb == "GET" and path.endswith("/corner")
        if looked == 2:
            other = cluster.objects.pop(place)
            cluster.put(*place[:2], {**other, "metadata": {"name": "corner", "namespace": "default"}})

    cluster.before = anew
    assert desk.run("deployment", "delete", "corner") == 0, "this one is another"


def test_scaling_is_waited_for_although_the_status_is_of_before(desk: Desk, cluster: KubernetesServer) -> None:
    """The operator follows an adapter in its own time: the third time that anybody looks."""
    deploy(desk)
    follow, told, looked = cluster._follow, list[Any](), 0

    def look(verb: str, _: str) -> None:
        nonlocal looked
        looked += bool(told) and verb == "GET"
        if looked == 3 and told:
            with cluster._changed:
                follow(*told.pop())

    desk.patch.setattr(cluster, "_follow", lambda *adapter: told.append(adapter))
    cluster.before = look
    assert desk.run("deployment", "update", "corner", "--Store.ServiceArgs.workers=4") == 0, desk.noted
    assert looked == 3
    assert "  scaling (Store 1/4)\n" in desk.noted
    assert "Store (worker): 4 of 4 ready" in desk.said


def test_a_deployment_is_ready_with_the_replicas_that_were_asked_for(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    live = copy.deepcopy(cluster.deployment("corner"))
    store = next(one for one in live["spec"]["components"] if one["name"] == "Store")
    assert state(live) == state(live, {"Store": 1}) == "ready"
    store["replicas"] = 2
    assert state(live, {"Store": 2}) == "scaling (Store 1/2)"
    live["status"]["components"]["Store"]["readyReplicas"] = 2
    assert state(live, {"Store": 2}) == "ready"
    assert state(live, {"Store": 1}) == "scaling (Store 2/1)", "of those that leave some are still there"


def test_a_variable_comes_from_one_place(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk, "--env", "HF_TOKEN=hf_plain", "--env", "A=1")

    def stored() -> dict[str, Any]:
        return {one["name"]: one for one in cluster.deployment("corner")["spec"]["env"]}

    assert desk.run("deployment", "update", "corner", "--env-from-secret", "HF_TOKEN=token") == 0, desk.noted
    reference = {"secretKeyRef": {"name": "dynamo-env-secrets", "key": "token"}}
    assert stored()["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": reference}
    assert "hf_plain" not in json.dumps(cluster.deployment("corner"))
    assert desk.run("deployment", "update", "corner", "--env", "HF_TOKEN=again") == 0, desk.noted
    assert stored()["HF_TOKEN"] == {"name": "HF_TOKEN", "value": "again"}
    assert desk.run("deployment", "update", "corner", "--env", "B=2") == 0, desk.noted
    assert (stored()["HF_TOKEN"]["value"], stored()["A"]["value"], stored()["B"]["value"]) == ("again", "1", "2")


def test_an_ingress_shows_where_it_answers(desk: Desk, cluster: KubernetesServer) -> None:
    deploy(desk)
    backend = {"service": {"name": "corner-door", "port": {"number": 8000}}}
    rule = {"host": "shop.example", "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    cluster.put(
        "networking.k8s.io",
        "ingresses",
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": "shop", "namespace": "default"},
            "spec": {"rules": [rule], "tls": [{"hosts": ["shop.example"]}]},
        },
    )
    assert desk.run("deployment", "get", "corner") == 0
    assert "url:       https://shop.example\n" in desk.said


def test_a_route_of_a_gateway_shows_where_it_answers(desk: Desk, cluster: KubernetesServer) -> None:
    """The overlay's own Gateway and routes; then one with a port of its own, and one that may not be read."""
    deploy(desk)
    text = (ROOT / "deploy" / "kubernetes" / "components" / "gateway" / "gateway.yaml").read_text()
    group = "gateway.networking.k8s.io"
    for one in yaml.safe_load_all(text.replace("epd-frontend", "corner-door")):
        one["metadata"]["namespace"] = "default"
        cluster.put(group, f"{one['kind'].lower()}s", one)

    def urls() -> list[str]:
        assert desk.run("deployment", "get", "corner") == 0
        return re.findall(r"url: +(.*)", desk.said)

    assert urls() == ["https://epd.example.org"]
    gateway, route = (cluster.objects[group, kind, "default", "epd"] for kind in ("gateways", "httproutes"))
    gateway["spec"]["listeners"].append({"name": "plain", "protocol": "HTTP", "port": 8080})
    assert urls() == ["https://epd.example.org"], "the route names the listener"
    route["spec"]["parentRefs"] = [{"name": "epd"}]
    route["spec"]["rules"][0]["matches"][0]["path"]["value"] = "/graph/"
    assert urls() == ["https://epd.example.org/graph", "http://epd.example.org:8080/graph"]
    route["spec"]["parentRefs"] = [{"name": "epd", "namespace": "elsewhere"}, {"name": "mesh", "kind": "Service"}]
    assert urls() == ["http://corner-door.default.svc:8000 inside the cluster; from outside after"]


def test_tls_that_fails_is_said(desk: Desk, cluster: KubernetesServer) -> None:
    certificates = Certificates(desk.directory, "IP:127.0.0.1")
    file, url = Path(os.environ["KUBECONFIG"]), cluster.url.replace("http:", "https:")
    config = yaml.safe_load(file.read_text())

    def listed(**trust: str) -> int:
        config["clusters"][0]["cluster"] = {"server": url} | trust
        file.write_text(yaml.safe_dump(config))
        return desk.run("deployment", "list")

    assert listed() == 1, "without TLS on the other side"
    assert re.fullmatch(rf"error: no TLS with {url}: \[SSL.*\n", desk.noted), desk.noted
    cluster._http.socket = certificates.server.wrap_socket(cluster._http.socket, server_side=True)
    assert listed() == 1
    assert re.fullmatch(rf"error: no TLS with {url}: .*certificate verify failed.*\n", desk.noted), desk.noted
    assert (listed(**{"certificate-authority": str(certificates.root)}), desk.noted) == (0, "")


def test_what_goes_wrong_is_one_line_and_a_status(desk: Desk, cluster: KubernetesServer) -> None:
    tag = deploy(desk)
    reader = str(cluster.kubeconfig(desk.directory / "reader", token="reader"))
    stranger = str(cluster.kubeconfig(desk.directory / "stranger", token="nobody"))
    broken = desk.directory / "broken"
    broken.write_text("{")
    unread = desk.directory / "unread.yaml"
    unread.write_text("Store: {shelves: 4\nTill: {}\n")
    half = builds.store() / "door" / "0a1b2c3d" / "build.json"
    half.parent.mkdir(parents=True)
    half.write_text('{"graph": "sh')
    (desk.shop / "typo.py").write_text("class Door(:\n")
    packed = ["--working-dir", str(desk.shop)]
    theirs = cluster.deployment("corner") | {"metadata": {"name": "theirs", "namespace": "default"}}
    cluster.put("nvidia.com", "dynamographdeployments", theirs)
    for name, order in (("newer", '{"build": "b", "image": "i", "configuration": {}, "more": 1}'), ("older", "{}")):
        last = json.loads(cluster.deployment("corner")["metadata"]["annotations"][LAST_APPLIED])
        last["metadata"] |= {"name": name, "annotations": {ORDER: order}}
        annotations = {LAST_APPLIED: json.dumps(last)}
        other = cluster.deployment("corner") | {"metadata": {**last["metadata"], "annotations": annotations}}
        cluster.put("nvidia.com", "dynamographdeployments", other)
    here = os.environ["KUBECONFIG"]
    for kubeconfig, arguments, status, words in (
        (here, ["deploy", tag, "-n", "corner"], 1, "'corner' is taken in namespace default"),
        (here, ["deploy", "door:00000000", "-n", "x"], 2, "no build 'door:00000000'"),
        (here, ["deploy", tag, "-n", "x", "--Store.shelfs=1"], 2, "unknown key of Store 'shelfs'"),
        (here, ["deploy", tag, "-n", "x", "--namespace", "nowhere"], 1, "no namespace 'nowhere' in this cluster"),
        (here, ["deployment", "get", "nobody"], 1, "no deployment 'nobody' in namespace default"),
        (here, ["deployment", "delete", "nobody"], 1, "no deployment 'nobody' in namespace default"),
        (here, ["deployment", "update", "nobody"], 1, "no deployment 'nobody' in namespace default"),
        (here, ["deployment", "update", "theirs"], 1, "'theirs' was not made by `dynamo deploy`"),
        (here, ["deployment", "update", "newer"], 1, "'newer' was made by another version of this command"),
        (here, ["deployment", "update", "older"], 1, "'older' was made by another version of this command"),
        (here, ["deployment", "update", "corner", "--Store.shelfs=1"], 2, "unknown key of Store 'shelfs'"),
        (here, ["deployment", "get", "corner", "--Store.shelves=1"], 2, "takes no configuration"),
        (here, ["deploy", tag, "-n", "x", "-f", str(unread)], 2, "unread.yaml:2: while parsing a flow mapping, "),
        (here, ["deploy", tag, "-n", "x", "--Store.gate={"], 2, "--Store.gate: '{' is not a value: while parsing"),
        (here, ["build", "shop:Door", *packed, "-o", f"{unread}/below"], 1, "unread.yaml/below: Not a directory"),
        (here, ["deploy", "door:0a1b2c3d", "-n", "x"], 1, "build.json: Unterminated string"),
        (here, ["build", "typo:Door", *packed], 2, "typo.py:1: invalid syntax"),
        (here, ["deploy"], 2, "the following arguments are required: tag; see `dynamo deploy --help`"),
        (here, ["deploy", tag, "-t", "docker"], 2, "argument -t/--target: invalid choice: 'docker'"),
        (here, ["deploy", tag, "--timeout", "x"], 2, "argument --timeout: invalid float value: 'x'"),
        (
            reader,
            ["deploy", tag, "-n", "x"],
            1,
            'no rights: dynamographdeployments.nvidia.com is forbidden: User "reader"',
        ),
        (reader, ["deployment", "update", "corner", "--Store.shelves=1"], 1, "no rights: "),
        (reader, ["deployment", "delete", "corner"], 1, "no rights: "),
        (stranger, ["deployment", "list"], 1, "does not know you: Unauthorized"),
        (str(broken), ["deployment", "list"], 1, "no cluster: "),
        (str(desk.directory / "none"), ["deploy", tag, "-n", "x"], 1, "no cluster: "),
    ):
        desk.patch.setenv("KUBECONFIG", kubeconfig)
        assert desk.run(*arguments) == status, arguments
        errors = [line for line in desk.noted.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1, desk.noted
        assert errors[0].startswith("error: ")
        assert words in errors[0]
        assert "Traceback" not in desk.said + desk.noted
    assert {key[3] for key in cluster.objects if key[1] == DEPLOYMENTS} == {"corner", "theirs", "newer", "older"}


def test_a_state_directory_that_takes_nothing_is_one_line(desk: Desk) -> None:
    (desk.directory / "file").write_text("")
    desk.patch.setenv("XDG_STATE_HOME", str(desk.directory / "file"))
    for command in (["build", "shop:Door", "--working-dir", str(desk.shop)], ["get", "door:0a1b2c3d"], ["scale", "x"]):
        assert desk.run(*command) == 1, command
        assert desk.noted == f"error: {desk.directory}/file/dynamo: Not a directory\n"


def test_a_cluster_that_is_away_or_lacks_the_operator(desk: Desk) -> None:
    tag = desk.build()
    with KubernetesServer(knows_dynamo=False) as server:
        desk.patch.setenv("KUBECONFIG", str(server.kubeconfig(desk.directory / "kubeconfig")))
        for command in (["deploy", tag], ["deployment", "list"], ["deployment", "get", "x"]):
            assert desk.run(*command) == 1
            assert "knows no DynamoGraphDeployment: Dynamo's operator is not installed there" in desk.noted
    assert desk.run("deployment", "list") == 1
    assert desk.noted == f"error: no cluster answers at {server.url}\n"


def test_the_api_store_is_gone_and_that_is_said(desk: Desk, cluster: KubernetesServer) -> None:
    desk.patch.setenv("DYNAMO_CLOUD", "http://localhost:8080")
    deploy(desk)
    assert "note: http://localhost:8080: Dynamo has no api-store any more" in desk.noted
    assert desk.run("deployment", "list", "-e", "http://elsewhere") == 0
    assert desk.noted.startswith("note: http://elsewhere: ")
    assert component(cluster, "Door")["type"] == "frontend"


def test_the_double_serves_commands_that_are_typed(desk: Desk) -> None:
    printed = desk.directory / "printed"
    with printed.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "tests.kubernetes_server"], cwd=ROOT, stdout=file)
    try:
        eventually(lambda: printed.read_text().endswith("\n"), "it serves", 60)
        name, _, path = printed.read_text().strip().removeprefix("export ").partition("=")
        desk.patch.setenv(name, path)
        assert (desk.run("deployment", "list"), desk.said) == (0, "NAME  BUILD  STATE  AGE\n")
        assert desk.run("deploy", desk.build(), "-n", "corner") == 0, desk.noted
    finally:
        process.terminate()
        process.wait(30)


SEEDS = Path(__file__).with_name("seeds")
UPSTREAM = ROOT.parent / "shared" / "seeds"
NOT_TYPED = re.compile(r"#(?! (?:export |dynamo |[A-Z_]+=))|$")
IMAGE = "registry.example/dynamo-base:1.0"


def lines_of(text: str) -> list[str]:
    """The commands of a shell's text, those that are commented out with them, without what is said about them."""
    return [re.sub(r"\s+# .*", "", line) for line in text.splitlines() if not NOT_TYPED.match(line)]


def kind_of(line: str) -> str:
    """Lines of one kind are typed one in the place of another."""
    found = re.match(r"(?:# )?(?:export )?(\w+=|\w+ \w+|.+)", line)
    assert found is not None
    return found[1]


def as_typed(file: str, *wanted: str) -> list[str]:
    """The lines of a seed: of each kind the one that has one of these words, else the first. What is for everybody to
    fill in is filled in, and nothing else is changed."""
    lines = lines_of((SEEDS / file).read_text())
    chosen = {kind_of(line): line for line in reversed(lines)}
    chosen |= {kind_of(line): line for line in lines if any(word in line for word in wanted)}
    assert all(any(word in line for line in chosen.values()) for word in wanted)
    filled = {"<your-registry>/<your-image-name>:<your-tag>": IMAGE}
    return [
        re.sub("<.*>", lambda found: filled[found[0]], line.removeprefix("# "))
        for line in lines
        if line in chosen.values()
    ]


def test_the_seeds_are_upstreams() -> None:
    if not UPSTREAM.is_dir():
        pytest.skip("the seeds are not beside this repository")
    texts = [text for file in UPSTREAM.iterdir() if "dynamo deploy " in (text := file.read_text())]
    blocks = [lines_of(block) for text in texts for block in re.findall(r"(?ms)^```bash\n(.*?)^```", text)]
    assert lines_of((SEEDS / "deploy.sh").read_text()) in blocks
    forward = lines_of((SEEDS / "forward.sh").read_text())
    assert forward in [block[: len(forward)] for block in blocks]  # what follows asks the graph


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, with what is changed here and not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    clone = tmp_path_factory.mktemp("fresh") / "clone"
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], check=True, timeout=120)
    changed = subprocess.run([*git, "diff", "--binary", "HEAD"], check=True, capture_output=True, timeout=60).stdout
    if changed:
        subprocess.run(["git", "-C", str(clone), "apply"], input=changed, check=True, timeout=60)
    return clone


def typed(commands: list[str], where: Path, checkout: Path) -> str:
    """What a shell prints that is given these lines. Its `dynamo` is the checkout's: the environment's own looks where
    it was installed from."""
    environment = clean_environment() | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    command = ["bash", "-ec", "\n".join(commands)]
    ran = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


FURTHER_COMMANDS = [
    "dynamo deployment get ${DEPLOYMENT_NAME}",
    "dynamo deployment list",
    "dynamo deployment update $DEPLOYMENT_NAME --EncodeWorker.ServiceArgs.workers=3",
    "dynamo deployment delete $DEPLOYMENT_NAME",
]


@pytest.mark.parametrize("wanted", [(), ("agg-qwen", "https:"), ("agg-phi3v",), ("disagg",)], ids=" ".join)
def test_the_seeds_commands_run_verbatim(
    desk: Desk, cluster: KubernetesServer, checkout: Path, wanted: tuple[str, ...]
) -> None:
    (desk.directory / "examples").mkdir()
    (desk.directory / "examples" / "multimodal").symlink_to(checkout)
    graph = "disagg" if "disagg" in wanted else "agg"
    name = f"multimodal-{graph}"
    lines = as_typed("deploy.sh", *wanted)
    with_planner = f"{lines[-1]} --Planner.no-operation=false"
    said = typed([*lines, *FURTHER_COMMANDS, with_planner], desk.directory, checkout)
    plain, deleted, planned = said.partition(f"\nDeleted {name} from namespace dynamo-cloud.\n")
    assert deleted
    created = re.match(rf"Created {name} of (frontend:[0-9a-f]{{8}}) in namespace dynamo-cloud\.\n", plain)
    assert created is not None, said
    desk.patch.setattr(builds, "library_files", desk.library_files)
    assert created[1] == desk.build(graph=f"graphs.{graph}:Frontend", where=ROOT), "nothing is only here"
    assert planned.startswith(created[0])
    assert plain.count(f"http://{name}-frontend.dynamo-cloud.svc:8000") == 3
    assert re.search(rf"(?m)^{name} +{created[1]} +ready ", plain)
    assert "EncodeWorker (worker): 3 of 3 ready" in plain
    assert (plain.count("Planner (planner): 0 of 0 ready"), planned.count("Planner (planner): 1 of 1 ready")) == (3, 1)
    stored = cluster.deployment(name, "dynamo-cloud")["spec"]["components"]
    assert {main_of(one)["image"] for one in stored} == {IMAGE}


def test_the_seeds_commands_find_the_frontends_pod(desk: Desk, cluster: KubernetesServer, checkout: Path) -> None:
    """What they do with it, `kubectl port-forward`, is not here: the double has no node to forward to."""
    kubectl.needed()
    desk.patch.setenv("HOME", str(desk.directory))  # kubectl's cache of what the server knows
    for pod in ("multimodal-agg-frontend-0", "multimodal-agg-frontend-1", "multimodal-agg-processor-0", "other-0"):
        metadata = {"name": pod, "namespace": "dynamo-cloud"}
        cluster.put("", "pods", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
    find, forward = as_typed("forward.sh")
    assert forward.startswith("kubectl port-forward pod/$FRONTEND_POD 8000:8000 ")
    exports = [line for line in as_typed("deploy.sh") if re.match("export (KUBE_NS|DEPLOYMENT_NAME)=", line)]
    said = typed([*exports, find, "echo $FRONTEND_POD"], desk.directory, checkout)
    assert said == "multimodal-agg-frontend-1\n"


def test_kubectl_sees_and_applies_deployments(desk: Desk, cluster: KubernetesServer) -> None:
    desk.patch.setenv("HOME", str(desk.directory))  # its cache of what the server knows
    tag = deploy(desk)
    listed = kubectl.run("get", "dgd", "-o", "name")
    assert listed.stdout.split() == ["dynamographdeployment.nvidia.com/corner"], listed.stderr
    assert desk.run("deploy", tag, "-n", "second", "--dry-run") == 0
    wrong = kubectl.run("apply", "-f", "-", text=desk.said.replace("scalingAdapter", "scalingAdaptor"))
    assert wrong.returncode != 0
    assert 'unknown field "spec.components[0].scalingAdaptor"' in wrong.stderr
    applied = kubectl.run("apply", "-f", "-", text=desk.said)
    assert applied.returncode == 0, applied.stderr
    assert cluster.deployment("second")["spec"] == cluster.deployment("corner")["spec"]


def test_merging_three_ways() -> None:
    last = {"a": 1, "b": 1, "gone": 1, "list": [{"name": "x", "v": 1}, {"name": "y", "v": 1}], "plain": [1]}
    live = {
        "a": 2,
        "b": 2,
        "gone": 3,
        "list": [{"name": "y", "v": 5}, {"name": "z"}, {"name": "x", "v": 1}],
        "plain": [2],
    }
    wanted = {"a": 1, "b": 3, "new": 1, "list": [{"name": "x", "v": 2}, {"name": "y", "v": 1}], "plain": [1]}
    found = three_way(last, wanted, live)
    assert found == {
        "a": 2,
        "b": 3,
        "list": [{"name": "y", "v": 5}, {"name": "z"}, {"name": "x", "v": 2}],
        "plain": [2],
        "new": 1,
    }
    assert merged(live, change(live, found)) == found
    dropped = three_way(last, wanted | {"list": [{"name": "x", "v": 1}]}, live)
    assert dropped["list"] == [{"name": "z"}, {"name": "x", "v": 1}]
    ours, theirs = {"limits": {"gpu": 1}}, {"limits": {"gpu": 1, "cpu": 2}, "claims": 1}
    assert three_way({"r": ours}, {}, {"r": theirs}) == {"r": {"limits": {"cpu": 2}, "claims": 1}}
    assert three_way({"r": ours}, {}, {"r": ours}) == {}
    assert change(live, live) == {}
    assert live["gone"] == 3


STARTED = "(?m)^process_start_time_seconds "
"""By which the alert DynamoContainerDied knows one process from the next."""


def test_the_manifests_command_starts_its_service_and_answers_on_its_probes(
    desk: Desk, cluster: KubernetesServer
) -> None:
    """With the operator's variables and its discovery: the runtime itself talks to the API server."""
    gate = desk.directory / "gate"
    build = builds.find(deploy(desk, f"--Store.gate={gate}"))
    stored = cluster.deployment("corner")
    with nats(desk.directory) as server:
        kubeconfig = str(cluster.kubeconfig(desk.directory / "kubeconfig"))
        door, store = (
            Pod(stored, component(cluster, name), kubeconfig, server, build.code) for name in ("Door", "Store")
        )
        try:
            # The runtime answers all of them alike: with what the startup probe waits for.
            eventually(lambda: store.probe("startup") == 503, "the store is on its way", 120)
            assert store.probe("readiness") == 503
            gate.touch()
            eventually(lambda: store.probe("startup") == 200, "the store is up", 60)
            assert store.probe("liveness") == store.probe("readiness") == 200
            store.show(cluster)
            eventually(lambda: door.probe("readiness") == 200, "the door is ready", 120)
            assert door.probe("liveness") == 200
            eventually(lambda: buy(door) == {"goods": ["one lamp"]}, "the door finds the store", 60)
            assert all(re.search(STARTED, pod.metrics()) for pod in (door, store)), "the frontend's are there too"
            found = cluster.objects["nvidia.com", "dynamoworkermetadatas", "default", store.name]["spec"]["data"]
            assert sorted(path.rpartition("/")[0] for path in found["endpoints"]) == [
                "default-corner-0a1b2c3d/store/fetch",
                "default-corner-0a1b2c3d/store/generate",
                "default-corner/store/fetch",
                "default-corner/store/generate",
            ]
        finally:
            statuses = [pod.stop() for pod in (door, store)]
            print(door.output, store.output)
    assert statuses == [0, 0]


def test_a_pod_that_is_removed_finishes_what_it_has(desk: Desk, cluster: KubernetesServer) -> None:
    """Both at once, as in a rollout, and for as long as the graph gives a request: the image would have them end in a
    second."""
    line = desk.directory / "line"
    build = builds.find(deploy(desk, f"--Store.line={line}", "--Door.patience=90"))
    stored, of_image = cluster.deployment("corner"), {"DYNAMO_DRAIN_SECONDS": "1"}
    with nats(desk.directory) as server, ThreadPoolExecutor(1) as customers:
        kubeconfig = str(cluster.kubeconfig(desk.directory / "kubeconfig"))
        door, store = pods = [
            Pod(stored, component(cluster, name), kubeconfig, server, build.code, of_image=of_image)
            for name in ("Door", "Store")
        ]
        try:
            eventually(lambda: store.probe("startup") == 200, "the store is up", 120)
            store.show(cluster)
            eventually(lambda: buy(door) == {"goods": ["one lamp"]}, "the door finds the store", 120)
            line.mkdir()
            bought = customers.submit(buy, door)
            eventually(lambda: (line / "lamp").exists(), "somebody is in the store", 60)
            for pod in pods:
                pod.leave()
            time.sleep(3.0)
            assert not bought.done() and [pod.process.poll() for pod in pods] == [None, None]
            shutil.rmtree(line)
            assert bought.result(60) == {"goods": ["one lamp"]}
        finally:
            shutil.rmtree(line, ignore_errors=True)
            statuses = [pod.stop() for pod in pods]
            print(door.output, store.output)
    assert statuses == [0, 0]


def buy(door: Pod) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{door.ports[8000]}/buy", b'{"what": "lamp"}', {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return yaml.safe_load(reply.read())
    except OSError as error:
        return error


class Busy:
    """A double of a worker's metrics: every second 20 requests come to it, each of which takes it 0.4 s, and one in
    eight ends. From `rest` on none comes any more, and all have ended."""

    METRICS = ("queue_depth", "queue_seconds_count", "queue_seconds_sum", "run_seconds_count", "run_seconds_sum")

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._came: float | None = None
        busy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                came = busy._so_far() if busy._came is None else busy._came
                ended = came / 8 if busy._came is None else came
                values = zip(Busy.METRICS, (came - ended, ended, came, ended, 0.4 * ended), strict=True)
                self.send_response(200)
                self.end_headers()
                self.wfile.write("".join(f"epd_stage_{name} {value}\n" for name, value in values).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.address = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.1"
        """Every pod has an address of its own, and one port of this number."""
        self._http = ThreadingHTTPServer((self.address, SYSTEM_PORT), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _so_far(self) -> float:
        return 20 * (time.monotonic() - self._begun)

    def rest(self) -> None:
        self._came = self._so_far()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def test_a_planner_in_a_pod_scales_by_the_adapters(desk: Desk, cluster: KubernetesServer) -> None:
    """Up and down, with the operator's variables and the rights that it gives planners; of the workers' metrics it has
    a double. The operator takes longer than the planner from one look to the next: each number is asked for once."""
    desk.patch.setattr(builds, "library_files", desk.library_files)
    config = str(ROOT / "configs" / "tiny-disagg.yaml")
    tag = desk.build(graph="graphs.disagg:Frontend", where=ROOT)
    planned = ["--Planner.interval=0.2", "--Planner.stages.EncodeWorker={max: 3, window: 2, cool-down: 2}"]
    arguments = ["-n", "corner", "-f", config, "--Planner.no-operation=false", *planned, "--no-wait"]
    assert desk.run("deploy", tag, *arguments) == 0, desk.noted
    cluster.lag = 1.5
    stored, busy = cluster.deployment("corner"), Busy()
    labels = {"nvidia.com/dynamo-graph-deployment-name": "corner", "nvidia.com/dynamo-component": "EncodeWorker"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "corner-encodeworker-0", "namespace": "default", "labels": labels},
        "status": {"podIP": busy.address, "conditions": [{"type": "Ready", "status": "True"}]},
    }
    kubeconfig = str(cluster.kubeconfig(desk.directory / "planner", "planner"))
    with nats(desk.directory) as server:
        planner = Pod(stored, component(cluster, "Planner"), kubeconfig, server, builds.find(tag).code)
        try:
            eventually(lambda: planner.probe("readiness") == 200, "the planner is ready", 120)
            assert planner.probe("liveness") == planner.probe("startup") == 200
            cluster.put("", "pods", pod)
            eventually(lambda: component(cluster, "EncodeWorker").get("replicas") == 3, "it asks for more", 60)
            busy.rest()
            eventually(lambda: component(cluster, "EncodeWorker")["replicas"] == 1, "it asks for fewer", 60)
            counted = decisions(planner)
        finally:
            status = planner.stop()
            print(planner.output)
            busy.close()
    assert status == 0
    others = [one for one in cluster.deployment("corner")["spec"]["components"] if one["name"] != "EncodeWorker"]
    assert not any("replicas" in one for one in others)
    told = [path.rpartition("/v1beta1/")[2] for verb, path, _ in cluster.requests if verb == "PATCH"]
    assert set(told) == {"namespaces/default/dynamographdeploymentscalingadapters/corner-encodeworker/scale"}
    adapter = cluster.objects["nvidia.com", ADAPTERS, "default", "corner-encodeworker"]
    assert len(told) == adapter["metadata"]["generation"] - 1, "each has told it another number than before"
    assert set(counted) == {"grow", "shrink"} and sum(counted.values()) == len(told)


def decisions(planner: Pod) -> dict[str, float]:
    """That it has counted, by direction."""
    counted = re.findall(
        r'(?m)^epd_planner_decisions_total\{.*direction="(\w+)".*stage="EncodeWorker".*\} (\S+)$', planner.metrics()
    )
    return {direction: float(value) for direction, value in counted}


def test_a_pod_without_nats_says_so(desk: Desk, cluster: KubernetesServer) -> None:
    build = builds.find(deploy(desk))
    stored = cluster.deployment("corner")
    pod = Pod(stored, component(cluster, "Store"), os.environ["KUBECONFIG"], "", build.code)
    assert pod.process.wait(120) == 2
    assert pod.output.startswith("error: the operator gives no NATS_SERVER")
