# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes as `kubectl kustomize` makes it, and what a cluster would say of it: unknown keys, wrong types,
Pod Security's restricted profile.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes.client
import yaml

from tests import kubernetes_server
from tests.toys.running import ROOT

DEPLOY = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
OTHERS = ("kserve", "models/copy", "models/fetch")
SECRETS = ("graph.env", "keys.yaml", "signing.key")
BUILT_IN = {
    "Namespace": "v1",
    "Service": "v1",
    "ConfigMap": "v1",
    "Secret": "v1",
    "Pod": "v1",
    "PersistentVolumeClaim": "v1",
    "StatefulSet": "apps/v1",
    "Deployment": "apps/v1",
    "Job": "batch/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Ingress": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
}
KINDS: dict[str, Any] = json.loads((Path(__file__).with_name("schemas") / "kinds.json").read_text())
GRAPH = "DynamoGraphDeployment"
PLAIN: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}

Object = dict[str, Any]


def kustomized(place: str, work: Path) -> list[Object]:
    """The objects of a kustomization, with secrets drawn as ``deploy/make-secrets`` does, but not secret."""
    tree = work / "kubernetes"
    if not tree.exists():
        shutil.copytree(DEPLOY, tree, ignore=shutil.ignore_patterns(*SECRETS))
        secrets = tree / "base" / "secrets"
        (secrets / "graph.env").write_text(
            "NATS_AUTH_USERNAME=graph\nNATS_AUTH_PASSWORD=n\nAWS_ACCESS_KEY_ID=graph\nAWS_SECRET_ACCESS_KEY=s\n"
        )
        (secrets / "keys.yaml").write_text("[]\n")
        (secrets / "signing.key").write_text("0" * 96)
    ran = subprocess.run(
        ["kubectl", "kustomize", str(tree / place)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return list(yaml.load_all(ran.stdout, Loader=yaml.CSafeLoader))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """By name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def check(found: Object) -> None:
    """Raises ValueError for a kind, key or value that its schema does not know."""
    kind, version = found["kind"], found["apiVersion"]
    if kind == GRAPH:
        try:
            kubernetes_server.check("dynamographdeployments", found)
        except kubernetes_server.Refused as refused:
            raise ValueError(str(refused)) from refused
    elif BUILT_IN.get(kind) == version:
        _typed(found, f"V1{kind}", kind)
    elif f"{version} {kind}" in KINDS:
        schema = KINDS[f"{version} {kind}"]
        _typed(found["metadata"], "V1ObjectMeta", f"{kind}.metadata")
        unknown = list(kubernetes_server.unknown_keys(found["spec"], schema["properties"]["spec"], "spec"))
        wrong = [f"{one.json_path}: {one.message}" for one in jsonschema.Draft7Validator(schema).iter_errors(found)]
        if unknown or wrong:
            raise ValueError(f"{kind}: {[*unknown, *wrong]}")
    else:
        raise ValueError(f"no schema of {version} {kind} is known here")


def _typed(value: Any, kind: str, path: str) -> Any:
    """``value`` as that class of the Kubernetes client, which knows every key, its type and what is required."""
    listed = re.fullmatch(r"list\[(.+)\]", kind)
    mapped = re.fullmatch(r"dict\(str, (.+)\)", kind)
    if listed:
        if not isinstance(value, list):
            raise ValueError(f"{path}: {value!r} is no {kind}")
        return [_typed(one, listed[1], f"{path}[{index}]") for index, one in enumerate(value)]
    if mapped:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {value!r} is no {kind}")
        return {key: _typed(one, mapped[1], f"{path}.{key}") for key, one in value.items()}
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ValueError(f"{path}: {value!r} is no {kind}")
        return value
    if kind in ("object", "datetime"):
        return value
    model = getattr(kubernetes.client, kind)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {value!r} is no {kind}")
    named = {key: attribute for attribute, key in model.attribute_map.items()}
    unknown = value.keys() - named.keys()
    if unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}")
    types = {key: model.openapi_types[attribute] for key, attribute in named.items()}
    return model(**{named[key]: _typed(one, types[key], f"{path}.{key}") for key, one in value.items()})


def pod_specs(found: Object) -> Iterator[tuple[str, Object, dict[str, str]]]:
    """Name, pod spec and labels of every pod that an object leads to; those that the operator gives included."""
    name, spec = f"{found['kind']} {found['metadata']['name']}", found.get("spec", {})
    if found["kind"] == "Pod":
        yield name, spec, found["metadata"].get("labels", {})
    elif found["kind"] in ("StatefulSet", "Deployment", "Job"):
        yield name, spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    elif found["kind"] == "InferenceService":
        yield name, spec["predictor"], {"serving.kserve.io/inferenceservice": found["metadata"]["name"]}
    elif found["kind"] == GRAPH:
        for one in spec["components"]:
            labels = {
                "nvidia.com/dynamo-graph-deployment-name": found["metadata"]["name"],
                "nvidia.com/dynamo-component": one["name"],
            }
            yield f"{name}, {one['name']}", one["podTemplate"]["spec"], labels


def unrestricted(spec: Object) -> list[str]:
    """What the restricted profile of Kubernetes' Pod Security Standards would refuse in a pod."""
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    for volume in spec.get("volumes", []):
        found += [f"volume of kind {kind}" for kind in volume.keys() - {"name"} - allowed]
    pod = spec.get("securityContext", {})
    found += [f"pod: {key}" for key in ("sysctls", "seLinuxOptions", "windowsOptions") if key in pod]
    for one in [*spec.get("containers", []), *spec.get("initContainers", [])]:
        own = one.get("securityContext", {})
        merged, capabilities = {**pod, **own}, own.get("capabilities", {})
        wrong = {
            "privileged": own.get("privileged", False),
            "may become root": merged.get("runAsNonRoot") is not True or merged.get("runAsUser", 1) == 0,
            "may escalate": own.get("allowPrivilegeEscalation") is not False,
            "keeps capabilities": "ALL" not in capabilities.get("drop", []),
            "adds capabilities": bool(set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}),
            "has no seccomp profile": merged.get("seccompProfile", {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "host ports": any(port.get("hostPort") for port in one.get("ports", [])),
            "procMount": own.get("procMount", "Default") != "Default",
        }
        found += [f"{one['name']}: {what}" for what, is_so in wrong.items() if is_so]
    return found
