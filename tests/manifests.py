# SPDX-License-Identifier: Apache-2.0
"""deploy/kubernetes as `kubectl kustomize` makes it, and what a cluster would say of it: unknown keys, wrong types,
Pod Security's restricted profile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes.utils
import kubernetes_validate
import yaml

from tests import kubectl, kubernetes_server
from tests.toys.running import ROOT

DEPLOY = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("overlays/cpu", "overlays/gpu")
OTHERS = ("kserve", "models/copy", "models/fetch")
SECRETS = ("graph.env", "keys.yaml", "signing.key")
KINDS: dict[str, Any] = json.loads((Path(__file__).with_name("schemas") / "kinds.json").read_text())
GRAPH = "DynamoGraphDeployment"

Object = dict[str, Any]


def kustomized(place: str, work: Path) -> list[Object]:
    """The objects of a kustomization, with secrets drawn as ``deploy/make-secrets`` does, but not secret. Skips the
    test where there is no kubectl that makes them.
    """
    tree = work / "kubernetes"
    if not tree.exists():
        shutil.copytree(DEPLOY, tree, ignore=shutil.ignore_patterns(*SECRETS))
        secrets = tree / "base" / "secrets"
        (secrets / "graph.env").write_text(
            "NATS_AUTH_USERNAME=graph\nNATS_AUTH_PASSWORD=n\nAWS_ACCESS_KEY_ID=graph\nAWS_SECRET_ACCESS_KEY=s\n"
        )
        (secrets / "keys.yaml").write_text("[]\n")
        (secrets / "signing.key").write_text("0" * 96)
    ran = kubectl.run("kustomize", str(tree / place))
    assert ran.returncode == 0, ran.stderr
    return list(yaml.load_all(ran.stdout, Loader=yaml.CSafeLoader))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """By name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def check(found: Object) -> None:
    """Raises ValueError for a kind, key or value that its schema does not know, and for what is there but empty."""
    kind, version = found["kind"], found["apiVersion"]
    wrong = [f"{path} is empty" for path in _nulls(found, kind)]
    wrong += [f"{path}: {text!r} is no quantity" for path, text in _quantities(found, kind) if not _is_quantity(text)]
    if kind == GRAPH:
        try:
            kubernetes_server.check("dynamographdeployments", found)
        except kubernetes_server.Refused as refused:
            wrong.append(str(refused))
        wrong += _of_metadata(found)
    elif f"{version} {kind}" in KINDS:
        schema = KINDS[f"{version} {kind}"]
        wrong += kubernetes_server.unknown_fields(found, schema)
        wrong += [f"{one.json_path}: {one.message}" for one in jsonschema.Draft7Validator(schema).iter_errors(found)]
        wrong += _of_metadata(found)
    else:
        wrong += _of_kubernetes(found)
    if wrong:
        raise ValueError(f"{kind}: {wrong}")


def _of_metadata(found: Object) -> list[str]:
    """A namespace is nothing but its metadata, and they are the same for every kind."""
    return _of_kubernetes({"apiVersion": "v1", "kind": "Namespace", "metadata": found["metadata"]})


def _of_kubernetes(found: Object) -> list[str]:
    """What the newest Kubernetes' own schemas say against one of its own kinds."""
    try:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as refused:
        return [f"{refused.json_path}: {refused.message}"]
    except kubernetes_validate.SchemaNotFoundError as unknown:
        return [unknown.message]
    return []


def _nulls(value: Any, path: str) -> Iterator[str]:
    """Kubernetes' schemas take null for everything, its API server then refuses it where something is required. That
    of a time which is not yet known is kubectl's own."""
    if value is None and not path.endswith(".creationTimestamp"):
        yield path
    for key, one in _inside(value):
        yield from _nulls(one, f"{path}.{key}")


def _quantities(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Kubernetes' schemas take any text for a quantity."""
    for key, one in _inside(value):
        if key in ("limits", "requests") and isinstance(one, dict):
            yield from ((f"{path}.{key}.{name}", amount) for name, amount in one.items())
        elif key == "sizeLimit":
            yield f"{path}.{key}", one
        else:
            yield from _quantities(one, f"{path}.{key}")


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _is_quantity(amount: Any) -> bool:
    try:
        kubernetes.utils.parse_quantity(amount)
    except ValueError:
        return False
    return True


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
