# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes, as `kubectl kustomize` makes it: schemas, restricted pods, who reaches whom, the graph itself."""

from __future__ import annotations

import asyncio
import copy
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
import yaml

from dynamo_epd.http.auth import Keys, signing_key
from dynamo_epd.sdk.config import Document, resolve, split_overrides
from dynamo_epd.sdk.deployment.manifest import DRAIN, KILL_SECONDS, LEAVING_SECONDS, MARGIN_SECONDS
from dynamo_epd.sdk.graph import load_graph
from tests import kubectl
from tests.kubernetes_server import KubernetesServer
from tests.manifests import (
    DEPLOY,
    GRAPH,
    KINDS,
    OTHERS,
    OVERLAYS,
    SECRETS,
    Object,
    check,
    kustomized,
    of_kind,
    pod_specs,
    unrestricted,
)
from tests.pods import nats as nats_server
from tests.toys.running import ROOT

TAG = re.compile(r"frontend:[0-9a-f]{8}")
NOT_PUBLIC = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
    "ff00::/8",
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "2002::/16",
    "2001::/32",
)
BIN = ROOT / ".venv" / "bin"
RULES = ROOT / "deploy" / "observability" / "prometheus" / "rules"
DASHBOARDS = ROOT / "deploy" / "observability" / "grafana" / "dashboards"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    work = tmp_path_factory.mktemp("deploy")
    return {place: kustomized(place, work) for place in (*OVERLAYS, *OTHERS)}


@pytest.mark.parametrize("place", [*OVERLAYS, *OTHERS])
def test_every_object_passes_its_schema(made: dict[str, list[Object]], place: str) -> None:
    for one in made[place]:
        check(one)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "dynamo-epd"


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        ("NetworkPolicy", ("spec", "podSelektor"), {}, "'podSelektor' was unexpected"),
        ("PodDisruptionBudget", ("spec", "selector"), [], "is not of type 'object'"),
        ("StatefulSet", ("spec", "replicas"), "1", "is not of type 'integer'"),
        ("StatefulSet", ("spec", "selector"), None, "selector is empty"),
        ("StatefulSet", ("apiVersion",), "apps/v2", "no schema|find schema"),
        ("Deployment", ("spec", "template", "spec", "containers"), None, "containers is empty"),
        (
            "Deployment",
            ("spec", "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "1 GB",
            "no quan",
        ),
        ("Ingress", ("spec", "tls", 0, "hosts"), "one", "is not of type 'array'"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "portNumber"), "9090", "is not of type 'integer'"),
        ("PodMonitor", ("spec", "endpoints"), [], r"spec\.endpoints"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "for"), "soon", "does not match"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "severity"), "high", r"rules\[0\]\.severity"),
        ("PodMonitor", ("sepc",), {}, "'sepc'"),
        ("PodMonitor", ("metadata", "anotations"), {}, r"metadata\.anotations"),
        ("DynamoGraphDeployment", ("spec", "components", 0, "podTemplate", "spec", "volumez"), [], "volumez"),
        ("DynamoGraphDeployment", ("sepc",), {}, 'unknown field "sepc"'),
        ("DynamoGraphDeployment", ("metadata", "anotations"), {}, r'unknown field "metadata\.anotations"'),
        ("DynamoGraphDeployment", ("metadata", "annotations"), {"shelves": 4}, "4 is not of type 'string'"),
    ],
)
def test_the_check_refuses(made: dict[str, list[Object]], kind: str, path: Any, value: Any, words: str) -> None:
    one = copy.deepcopy(next(iter(of_kind(made["overlays/cpu"], kind).values())))
    inner: Any = one
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=words):
        check(one)


def test_every_excerpt_is_used(made: dict[str, list[Object]]) -> None:
    kinds = {f"{one['apiVersion']} {one['kind']}" for objects in made.values() for one in objects}
    assert KINDS.keys() <= kinds


@pytest.mark.parametrize("place", [*OVERLAYS, *OTHERS])
def test_every_pod_is_restricted(made: dict[str, list[Object]], place: str) -> None:
    pods = [pod for one in made[place] for pod in pod_specs(one)]
    assert len(pods) == (10 if place in OVERLAYS else 1)
    for name, spec, _ in pods:
        assert not unrestricted(spec), name
        for key in ("runAsNonRoot", "seccompProfile"):
            weaker = copy.deepcopy(spec)
            del weaker["securityContext"][key]
            assert unrestricted(weaker)
        for key in ("allowPrivilegeEscalation", "capabilities"):
            weaker = copy.deepcopy(spec)
            del weaker["containers"][0]["securityContext"][key]
            assert unrestricted(weaker)
        assert unrestricted({**spec, "volumes": [{"name": "host", "hostPath": {"path": "/"}}]})
    if place in OVERLAYS:
        labels = of_kind(made[place], "Namespace")["dynamo-epd"]["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_graph_is_what_the_command_renders(device: str, tmp_path: Path) -> None:
    """All but the tag: that changes with every line of the library."""
    file = tmp_path / "graph.yaml"
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "DYNAMO": str(BIN / "dynamo")}
    for name in ("DYNAMO_IMAGE", "DYNAMO_REGISTRY", "KUBE_NS", "DYNAMO_CLOUD"):
        environment.pop(name, None)
    ran = subprocess.run(
        ["deploy/kubernetes/render", device, str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    rendered, held = (
        yaml.safe_load(TAG.sub("frontend:TAG", path.read_text()))
        for path in (file, DEPLOY / "overlays" / device / "graph.yaml")
    )
    assert rendered == held, f"run deploy/kubernetes/render {device}"


@pytest.mark.parametrize("place", OVERLAYS)
def test_the_graph_gets_what_it_names(made: dict[str, list[Object]], place: str) -> None:
    objects = made[place]
    graph = of_kind(objects, GRAPH)["epd"]
    secrets = {name: set(one["data"]) for name, one in of_kind(objects, "Secret").items()}
    for one in graph["spec"]["env"]:
        if "valueFrom" in one:
            reference = one["valueFrom"]["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]]
    assert secrets["graph-keys"] == {"keys.yaml", "signing.key"}
    told = {one["name"]: one.get("value") for one in graph["spec"]["env"]}
    assert told["NATS_SERVER"] == "nats://nats:4222" and "nats" in of_kind(objects, "Service")
    assert '"keys-file":"/etc/graph/keys.yaml"' in str(told["DYNAMO_GRAPH_CONFIG"])
    claims = of_kind(objects, "PersistentVolumeClaim")
    for component in graph["spec"]["components"]:
        spec = component["podTemplate"]["spec"]
        mounts = {one["name"]: one["mountPath"] for one in spec["containers"][0]["volumeMounts"]}
        volumes = {one["name"]: one for one in spec["volumes"]}
        assert mounts.pop("temporary") == "/tmp" and volumes.pop("temporary")
        if component["name"] == "Frontend":
            assert mounts == {"keys": "/etc/graph"} and volumes["keys"]["secret"]["secretName"] in secrets
        elif component["name"] == "Planner":
            assert mounts == {} and component["replicas"] == 0
        else:
            assert mounts == {"models": "/workspace/models"}
            assert volumes["models"]["persistentVolumeClaim"]["claimName"] in claims
        assert spec["containers"][0]["readinessProbe"] and component["sharedMemorySize"]
        gpus = component["podTemplate"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        assert place == "overlays/gpu" or "nvidia.com/gpu" not in gpus
    names = {one["name"] for one in graph["spec"]["components"]}
    budgets = [one["spec"]["selector"]["matchLabels"] for one in of_kind(objects, "PodDisruptionBudget").values()]
    assert {one["nvidia.com/dynamo-component"] for one in budgets} == names - {"Planner"}
    (scraped,) = of_kind(objects, "PodMonitor")["epd"]["spec"]["podMetricsEndpoints"]
    assert str(scraped["portNumber"]) == told["DYN_SYSTEM_PORT"]
    # as rules and panels want it: deploy/observability/README.md
    labelled = [one["targetLabel"] for one in scraped["relabelings"] if one["action"] == "replace"]
    assert labelled == ["graph", "dynamo_component", "worker"]
    assert not scraped.get("honorLabels")
    assert {"action": "labeldrop", "regex": "exported_dynamo_component"} in scraped["metricRelabelings"]


@pytest.mark.parametrize("place", OVERLAYS)
def test_checkpoints_come_from_the_volume(made: dict[str, list[Object]], place: str) -> None:
    """Copied below its mount, or fetched into the cache there."""
    told = {one["name"]: one.get("value") for one in of_kind(made[place], GRAPH)["epd"]["spec"]["env"]}
    configuration = json.loads(told["DYNAMO_GRAPH_CONFIG"])
    models = {section["model"] for section in configuration.values() if "model" in section}
    if place == "overlays/cpu":
        assert all(model.startswith("models/") for model in models)
    else:
        (job,) = [spec for _, spec, _ in pod_specs(of_kind(made["models/fetch"], "Job")["models"])]
        (container,) = job["containers"]
        script, _, *fetched = container["args"]
        assert 'hf download "$$model"' in script
        assert set(fetched) == models
        (mount,) = [one["mountPath"] for one in container["volumeMounts"]]
        (cache,) = [one["value"] for one in container["env"] if one["name"] == "HF_HOME"]
        assert told["HF_HOME"] == cache.replace(mount, "/workspace/models")
        assert told["HF_HUB_OFFLINE"] == "1"


def test_the_job_fetches_what_the_configuration_names() -> None:
    document = Document()
    document.read(ROOT / "configs" / "cova.yaml")
    named = {section["model"] for section in document.values.values() if "model" in section}
    job = yaml.safe_load((DEPLOY / "models" / "fetch" / "job.yaml").read_text())
    _, _, *fetched = job["spec"]["template"]["spec"]["containers"][0]["args"]  # a script, and its name
    assert sorted(fetched) == sorted(named)
    rendered = yaml.safe_load((DEPLOY / "overlays" / "gpu" / "graph.yaml").read_text())
    assert all(name in json.dumps(rendered) for name in named), "of which the overlay's graph is made"


@pytest.mark.parametrize("place", OVERLAYS)
def test_only_pods_that_are_ready_are_scraped(made: dict[str, list[Object]], place: str) -> None:
    """As targets.py does it on one machine: DynamoWorkerDown is no word for a pod that pulls its image or loads."""
    (scraped,) = of_kind(made[place], "PodMonitor")["epd"]["spec"]["podMetricsEndpoints"]
    kept = [one for one in scraped["relabelings"] if one["action"] == "keep"]
    assert kept == [{"action": "keep", "sourceLabels": ["__meta_kubernetes_pod_ready"], "regex": "true"}]


@pytest.mark.parametrize("place", OVERLAYS)
def test_prometheus_gets_the_rules_and_grafana_the_dashboards(made: dict[str, list[Object]], place: str) -> None:
    rules = of_kind(made[place], "PrometheusRule")
    groups = [group for file in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(file.read_text())["groups"]]
    found = rules["epd"]["spec"]["groups"]
    for group in [*groups, *found]:
        for rule in group["rules"]:
            rule["expr"] = " ".join(rule["expr"].split())  # kubectl breaks lines anew
    assert found == groups, "run deploy/kubernetes/render monitoring"
    names = [group["name"] for one in rules.values() for group in one["spec"]["groups"]]
    assert len(names) == len(set(names))
    held = of_kind(made[place], "ConfigMap")["epd-dashboards"]
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {f"dynamo-{file.name}": file.read_text() for file in DASHBOARDS.glob("*.json")}
    assert held["data"] == files, "run deploy/kubernetes/render monitoring; base/kustomization.yaml names them"
    # kubectl keeps what it applied in an annotation
    assert len(json.dumps(held)) < 256 << 10


def test_rules_and_dashboards_are_what_the_command_writes(tmp_path: Path) -> None:
    command = ["deploy/kubernetes/render", "monitoring", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    written = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    base = DEPLOY / "base"
    kept = [base / "rules.yaml", *(base / "dashboards").iterdir()]
    assert written == {file.relative_to(base): file.read_text() for file in kept}


def test_the_inference_service_serves_a_graph_of_pictures(made: dict[str, list[Object]], tmp_path: Path) -> None:
    predictor = of_kind(made["kserve"], "InferenceService")["images"]["spec"]["predictor"]
    (container,) = predictor["containers"]
    held = of_kind(made["kserve"], "ConfigMap")["images-graph"]["data"]
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "graph"]
    plain, overrides = split_overrides([word.replace(mount["mountPath"], str(tmp_path)) for word in container["args"]])
    options = dict(zip(plain[2::2], plain[3::2], strict=True))
    assert (plain[0], overrides, options["--port"]) == ("serve", [], str(container["ports"][0]["containerPort"]))
    document = Document()
    document.read(options["-f"])
    settings = resolve(load_graph(plain[1], str(ROOT)), document)
    assert {name for name, one in settings.items() if one.runs} == {"Frontend", "ImageWorker", "EmbedWorker"}
    (drain,) = [float(one["value"]) for one in container["env"] if one["name"] == DRAIN]
    assert drain == settings["Frontend"].config.request_seconds
    assert predictor["terminationGracePeriodSeconds"] == drain + LEAVING_SECONDS + KILL_SECONDS + MARGIN_SECONDS
    tiny = Document()
    tiny.read(ROOT / "configs" / "tiny-cova.yaml")
    for name in ("ImageWorker", "EmbedWorker"):
        assert document.values[name] == tiny.values[name]


def test_no_secret_and_no_host_of_a_registry_is_committed(made: dict[str, list[Object]]) -> None:
    kept = subprocess.run(
        ["git", "ls-files", "deploy"], cwd=ROOT, capture_output=True, text=True, timeout=120
    ).stdout.split()
    assert not [path for path in kept if Path(path).name in SECRETS]
    for objects in made.values():
        for one in objects:
            for name, spec, _ in pod_specs(one):
                for container in spec["containers"]:
                    image, tag = container["image"].split(":")
                    assert tag and tag != "latest", name
                    assert "." not in image.split("/")[0], name


# Who may reach whom. A place is a pod's labels with its namespace's name, or an address.
Place = tuple[str, dict[str, str]] | str


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def _is_peer(peer: Object, place: Place) -> bool:
    if "ipBlock" in peer:
        if not isinstance(place, str):
            return False
        address, block = ipaddress.ip_address(place), peer["ipBlock"]
        networks = [ipaddress.ip_network(one) for one in (block["cidr"], *block.get("except", []))]
        assert all(one.subnet_of(networks[0]) for one in networks[1:])  # type: ignore[arg-type]
        return address in networks[0] and not any(address in one for one in networks[1:])
    if isinstance(place, str):
        return False
    namespace, labels = place
    if "namespaceSelector" in peer:
        named = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        named = namespace == "dynamo-epd"
    return named and _selects(peer.get("podSelector", {}), labels)


def allowed(policies: list[Object], side: str, pod: dict[str, str], other: Place, port: int, protocol: str) -> bool:
    """Whether a pod of the namespace may be called from (``ingress``) or call (``egress``) the other place."""
    closed = False
    for policy in policies:
        spec = policy["spec"]
        if side.capitalize() not in spec["policyTypes"] or not _selects(spec["podSelector"], pod):
            continue
        closed = True
        for rule in spec.get(side, []):
            peers, ports = rule.get("to" if side == "egress" else "from"), rule.get("ports")
            if peers is not None and not any(_is_peer(peer, other) for peer in peers):
                continue
            if ports is None or any((one.get("protocol", "TCP"), one["port"]) == (protocol, port) for one in ports):
                return True
    return not closed


def reaches(policies: list[Object], pod: dict[str, str], other: Place, port: int, protocol: str = "TCP") -> bool:
    """Both sides agree."""
    if not allowed(policies, "egress", pod, other, port, protocol):
        return False
    if isinstance(other, str) or other[0] != "dynamo-epd":
        return True
    return allowed(policies, "ingress", other[1], ("dynamo-epd", pod), port, protocol)


def _pods(objects: list[Object]) -> dict[str, dict[str, str]]:
    found = {}
    for one in objects:
        for name, _, labels in pod_specs(one):
            found[name.split()[-1]] = labels
    return found


def _not_public() -> Iterator[str]:
    """First and last address of what is not public, and what clouds keep for themselves."""
    for text in NOT_PUBLIC:
        network = ipaddress.ip_network(text)
        yield from (str(network[0]), str(network[-1]))
    yield from ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")


@pytest.mark.parametrize("place", OVERLAYS)
def test_only_encode_workers_reach_out(made: dict[str, list[Object]], place: str) -> None:
    objects = [*made[place], *made["kserve"], *made["models/copy"]]
    policies = list(of_kind(objects, "NetworkPolicy").values())
    pods = _pods(objects)
    assert len(pods) == 12
    outside = ("93.184.215.14", "1.1.1.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "2a00:1450:4001:829::200e")
    for name, labels in pods.items():
        for address in outside:
            for port in (80, 443):
                assert reaches(policies, labels, address, port) == (name == "EncodeWorker"), (name, address)
            assert not reaches(policies, labels, address, 22)
            assert not reaches(policies, labels, address, 443, "UDP")
        for address in _not_public():
            for port in (80, 443, 4222, 6443, 9000):
                assert not reaches(policies, labels, address, port), (name, address)


def test_the_job_that_fetches_models_reaches_no_further(made: dict[str, list[Object]]) -> None:
    policies = list(of_kind([*made["overlays/gpu"], *made["models/fetch"]], "NetworkPolicy").values())
    labels = _pods(made["models/fetch"])["models"]
    assert reaches(policies, labels, "1.1.1.1", 443) and not reaches(policies, labels, "1.1.1.1", 80)
    assert not any(reaches(policies, labels, address, 443) for address in _not_public())
    # and its own policy opens nothing for anybody else
    for name, other in _pods(made["overlays/gpu"]).items():
        assert reaches(policies, other, "1.1.1.1", 443) == (name == "EncodeWorker")


@pytest.mark.parametrize("place", OVERLAYS)
def test_stages_reach_nats_names_the_api_server_and_each_other(made: dict[str, list[Object]], place: str) -> None:
    policies = list(of_kind(made[place], "NetworkPolicy").values())
    pods = _pods(made[place])
    graph = {name: labels for name, labels in pods.items() if "nvidia.com/dynamo-component" in labels}
    dns: Place = ("kube-system", {"k8s-app": "kube-dns"})
    stranger = {"app": "stranger"}
    api = of_kind(made[place], "NetworkPolicy")["epd-api-server"]["spec"]["egress"][0]["to"][0]["ipBlock"]["cidr"]
    for name, labels in graph.items():
        assert reaches(policies, labels, ("dynamo-epd", pods["nats"]), 4222)
        assert not reaches(policies, labels, ("dynamo-epd", pods["nats"]), 8222)
        assert reaches(policies, labels, dns, 53, "UDP") and reaches(policies, labels, dns, 53)
        assert reaches(policies, labels, api.removesuffix("/32"), 6443)
        assert all(reaches(policies, labels, ("dynamo-epd", other), 23456) for other in graph.values())
        assert reaches(policies, labels, ("dynamo-epd", pods["s3"]), 9000) == (name in ("Frontend", "ImageWorker"))
        assert not reaches(policies, labels, ("dynamo-epd", stranger), 23456)
        assert not reaches(policies, stranger, ("dynamo-epd", labels), 23456)
        assert not reaches(policies, labels, ("default", labels), 23456)
    assert not reaches(policies, stranger, ("dynamo-epd", pods["nats"]), 4222)


@pytest.mark.parametrize(
    ("place", "proxies"), [("overlays/cpu", "ingress-nginx"), ("overlays/gpu", "envoy-gateway-system")]
)
def test_clients_come_in_through_the_proxies_alone(made: dict[str, list[Object]], place: str, proxies: str) -> None:
    policies = list(of_kind(made[place], "NetworkPolicy").values())
    for name, labels in _pods(made[place]).items():
        for namespace in (proxies, "monitoring", "default"):
            for port in (8000, 9000, 9090, 4222, 23456):
                opened = {(proxies, "Frontend", 8000), (proxies, "s3", 9000)}
                wanted = (namespace, name, port) in opened or (
                    namespace == "monitoring" and port == 9090 and "nvidia.com/dynamo-component" in labels
                )
                assert allowed(policies, "ingress", labels, (namespace, {}), port, "TCP") == wanted, (name, namespace)


def test_clients_of_kserve_come_in_through_its_proxies_or_an_overlays(made: dict[str, list[Object]]) -> None:
    for place in OVERLAYS:
        policies = list(of_kind([*made[place], *made["kserve"]], "NetworkPolicy").values())
        (labels,) = _pods(made["kserve"]).values()
        for namespace in ("kserve", "ingress-nginx", "envoy-gateway-system", "default", "monitoring", "dynamo-epd"):
            opened = namespace in ("kserve", "ingress-nginx", "envoy-gateway-system")
            assert allowed(policies, "ingress", labels, (namespace, {}), 8080, "TCP") == opened, namespace
            assert not allowed(policies, "ingress", labels, (namespace, {}), 9090, "TCP"), namespace


def test_routes_lead_to_services(made: dict[str, list[Object]]) -> None:
    """The frontend's is the operator's: the deployment's name and the component's, on 8000."""
    backends = [
        (one["name"], one["port"])
        for route in of_kind(made["overlays/gpu"], "HTTPRoute").values()
        for rule in route["spec"]["rules"]
        for one in rule["backendRefs"]
    ]
    paths = [
        path
        for ingress in of_kind(made["overlays/cpu"], "Ingress").values()
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    services = [path["backend"]["service"] for path in paths]
    assert sorted(backends) == [("epd-frontend", 8000), ("s3", 9000)]
    assert services == [
        {"name": "epd-frontend", "port": {"number": 8000}},
        {"name": "s3", "port": {"name": "http"}},
    ]
    ports = of_kind(made["overlays/gpu"], "Service")["s3"]["spec"]["ports"]
    assert [(one["name"], one["port"]) for one in ports] == [("http", 9000)]
    gateway = of_kind(made["overlays/gpu"], "Gateway")["epd"]["spec"]
    assert [one["protocol"] for one in gateway["listeners"]] == ["HTTPS"]


def test_pictures_are_fetched_from_the_store_and_nothing_is_brought_there(made: dict[str, list[Object]]) -> None:
    """By the Gateway with GET alone. An Ingress cannot name methods, but the bytes that a body may have."""
    (rule,) = of_kind(made["overlays/gpu"], "HTTPRoute")["pictures"]["spec"]["rules"]
    assert [one["method"] for one in rule["matches"]] == ["GET"]
    ingresses = of_kind(made["overlays/cpu"], "Ingress")
    limits = {
        name: one["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
        for name, one in ingresses.items()
    }
    assert limits == {"epd": "64m", "pictures": "1"}
    served = {name: [rule["host"] for rule in one["spec"]["rules"]] for name, one in ingresses.items()}
    assert served == {"epd": ["epd.example.org"], "pictures": ["pictures.example.org"]}


def test_the_cpu_overlay_takes_the_gateway_too(tmp_path: Path) -> None:
    """As deploy/README.md says of whom an Ingress is too wide for."""
    overlay = tmp_path / "kubernetes" / "overlays" / "cpu" / "kustomization.yaml"
    assert of_kind(kustomized("overlays/cpu", tmp_path), "Ingress")
    overlay.write_text(overlay.read_text().replace("components/ingress", "components/gateway"))
    objects = kustomized("overlays/cpu", tmp_path)
    for one in objects:
        check(one)
    assert not of_kind(objects, "Ingress")
    assert of_kind(objects, "HTTPRoute").keys() == {"epd", "pictures"}


def test_an_overlay_without_secrets_says_what_is_missing(tmp_path: Path) -> None:
    tree = tmp_path / "kubernetes"
    shutil.copytree(DEPLOY, tree, ignore=shutil.ignore_patterns(*SECRETS))
    ran = kubectl.run("kustomize", str(tree / "overlays/cpu"))
    assert ran.returncode == 1 and "secrets/graph.env" in ran.stderr


def test_make_secrets_draws_what_the_graph_and_nats_take(tmp_path: Path) -> None:
    command = [str(ROOT / "deploy" / "make-secrets"), str(tmp_path)]
    environment = {**os.environ, "DYNAMO": str(BIN / "dynamo")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    key = ran.stdout.splitlines()[-1]
    assert Keys(tmp_path / "keys.yaml").tenant_of(key) == "client"
    assert len(signing_key(tmp_path / "signing.key")) == 96
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in SECRETS)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "is there" in again.stderr
    assert key not in "".join((tmp_path / name).read_text() for name in SECRETS)


@pytest.mark.parametrize("password", ["p0123e5", "p" + "9f" * 24])
def test_nats_takes_its_configuration(tmp_path: Path, password: str) -> None:
    with nats_server(tmp_path, {"NATS_AUTH_USERNAME": "graph", "NATS_AUTH_PASSWORD": password}) as url:
        asyncio.run(_use_nats(url, password))


async def _use_nats(url: str, password: str) -> None:
    client = await nats.connect(url, user="graph", password=password, allow_reconnect=False)
    assert client.max_payload == 8 << 20
    await client.jetstream().add_stream(name="jobs", subjects=["jobs"])
    await client.close()
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        await nats.connect(url, allow_reconnect=False, connect_timeout=30)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kubectl_applies_the_graph(made: dict[str, list[Object]], device: str, tmp_path: Path) -> None:
    """The one object of an overlay whose kind the double of an API server knows."""
    graph = of_kind(made[f"overlays/{device}"], GRAPH)["epd"]
    file = tmp_path / "graph.yaml"
    file.write_text(yaml.safe_dump(graph))
    with KubernetesServer() as server:
        server.namespaces.add("dynamo-epd")
        # kubectl sends no token over plain HTTP: the double takes that for one who may
        variables = {"KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")), "HOME": str(tmp_path)}
        ran = kubectl.run("apply", "--server-side", "-f", str(file), **variables)
        assert ran.returncode == 0, ran.stderr
        assert server.deployment("epd", "dynamo-epd")["spec"] == graph["spec"]


COMMANDS = [line[2:] for line in (ROOT / "deploy" / "README.md").read_text().splitlines() if line.startswith("$ ")]


def test_the_readmes_commands_name_what_there_is() -> None:
    """Each kind of command is run by a test here, or needs a daemon or a cluster; then at least its paths are right."""
    applied = set()
    for command in COMMANDS:
        words = shlex.split(command)
        for word in words:
            if word.startswith(("deploy/", "models/", "configs/")):
                assert Path(word).name in SECRETS or (ROOT / word).exists(), command
        if words[:2] in (["kubectl", "apply"], ["kubectl", "kustomize"]):
            applied.add(words[-1].removeprefix("deploy/kubernetes/"))
        elif words[0] in ("docker", "curl", "export", "kubectl"):
            continue
        else:
            assert words[0] in (".venv/bin/dynamo", "deploy/make-secrets", "deploy/kubernetes/render"), command
    assert applied == {"overlays/cpu", *OTHERS}


def test_the_readmes_kubectl_runs(tmp_path: Path) -> None:
    kubectl.needed()
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.1.2.3"]}],
    }
    with KubernetesServer() as server:
        server.put("discovery.k8s.io", "endpointslices", endpoints)
        variables = {"KUBECONFIG": str(server.kubeconfig(tmp_path / "kubeconfig")), "HOME": str(tmp_path)}
        environment = kubectl.environment(**variables, HF_TOKEN="hf_x")

        def said(words: str) -> str:
            (command,) = [one for one in COMMANDS if one.startswith(f"kubectl {words}")]
            more = " --dry-run=client -o yaml" if words.startswith("create") else " -o yaml"
            ran = subprocess.run(
                ["bash", "-c", command + more], env=environment, capture_output=True, text=True, timeout=120
            )
            assert ran.returncode == 0, ran.stderr
            return ran.stdout

        assert "10.1.2.3" in said("get endpointslices")
        secret = yaml.safe_load(said("create secret generic"))
        check(secret)
        job = next(
            one for one in yaml.safe_load_all((DEPLOY / "models/fetch/job.yaml").read_text()) if one["kind"] == "Job"
        )
        (told,) = [one for one in job["spec"]["template"]["spec"]["containers"][0]["env"] if one["name"] == "HF_TOKEN"]
        reference = told["valueFrom"]["secretKeyRef"]
        assert secret["metadata"]["name"] == reference["name"] and reference["key"] in secret["data"]
