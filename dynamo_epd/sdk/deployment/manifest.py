# SPDX-License-Identifier: Apache-2.0
"""A build and a configuration as a ``DynamoGraphDeployment``: what Dynamo's operator makes pods, services and scaling
adapters of.

One component per service that runs. Ports, probes' paths and the environment that every pod gets are the operator's
(deploy/operator/internal/dynamo/component_*.go and internal/consts/consts.go of ai-dynamo/dynamo): 8000 with /live and
/health for the frontend, the runtime's own 9090 with the same two for the rest, ``DYN_NAMESPACE``,
``DYN_NAMESPACE_WORKER_SUFFIX``, ``DYN_DISCOVERY_BACKEND=kubernetes``, ``NATS_SERVER``. The configuration goes along in
``DYNAMO_GRAPH_CONFIG``, which ``dynamo serve`` reads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from dynamo_epd.sdk.config import PLANNER, SERVICE_ARGS, ConfigError, ServiceSettings
from dynamo_epd.sdk.deployment import DeploymentError
from dynamo_epd.sdk.deployment.builds import Build
from dynamo_epd.sdk.deployment.images import USER
from dynamo_epd.sdk.graph import Graph
from dynamo_epd.sdk.operator import CONFIG, GROUP, HTTP_PORT, SYSTEM_PORT, VERSIONS, component_of
from dynamo_epd.sdk.service import info_of

KIND = "DynamoGraphDeployment"
BUILD = "dynamo-epd/build"
"""Annotation: the tag of what is deployed."""
ORDER = "dynamo-epd/order"
LAST_APPLIED = "dynamo-epd/last-applied"
"""Annotation: the manifest as it was last rendered. What differs from it in the cluster was changed by others."""
MAX_COMPONENTS = 25
MAX_LABEL = 63
LEAVING_SECONDS = 5
"""In which a frontend that must go answers as before: Services and proxies learn of it only by and by."""
DRAIN, DRAIN_SECONDS = "DYNAMO_DRAIN_SECONDS", 30
"""In which `dynamo serve` lets running requests finish: the variable that says it, and what counts without it. Pods
have as long as the graph gives a request: one that is removed, by an autoscaler or a rollout, loses none that it has.
"""
KILL_SECONDS = 20
"""For what is left then."""
MARGIN_SECONDS = 5
SHARED_MEMORY, SHARED_MEMORY_WITH_GPU = "1Gi", "8Gi"
TEMPORARY = "/tmp"
"""All that a pod of an image of ours may write to, its home included: a volume of its own that goes with the pod."""
TYPES = ("frontend", "worker", "prefill", "decode", "planner", "epp")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Order:
    """What the command line asked for. It goes along in an annotation, so that an update begins where this ended."""

    build: str
    """The tag."""
    image: str
    """Of every service whose code names none."""
    configuration: dict[str, Any]
    """As the file and the overrides said it."""
    envs: dict[str, str] = dataclasses.field(default_factory=dict)
    secrets: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Variable → name and key of a Secret."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Order:
        """That of a rendered manifest. Raises DeploymentError for one whose order has other keys."""
        try:
            return cls(**json.loads(manifest["metadata"]["annotations"][ORDER]))
        except (KeyError, TypeError, ValueError) as error:
            name = manifest["metadata"]["name"]
            raise DeploymentError(
                f"{name!r} was made by another version of this command: that one can update it, and `dynamo deployment "
                f"delete {name}` and `dynamo deploy` make it anew"
            ) from error


def check_name(name: str, services: list[str]) -> None:
    """Raises ConfigError for a name that the operator could not make resources of (``name-service``)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"-n {name}: must be lower-case letters, digits and '-', and begin with a letter")
    longest = max(services, key=len, default="")
    if len(name) + 1 + len(longest) > MAX_LABEL:
        raise ConfigError(f"-n {name}: with -{longest.lower()} it is longer than Kubernetes' {MAX_LABEL} characters")


def render(
    order: Order,
    build: Build,
    graph: Graph,
    settings: Mapping[str, ServiceSettings],
    *,
    name: str,
    namespace: str,
    version: str = VERSIONS[0],
) -> dict[str, Any]:
    """The manifest. ``settings`` are what the order's configuration resolves to.

    Raises ConfigError for what Kubernetes cannot be told.
    """
    # One that the configuration switches off is there without replicas: the operator takes no component later on.
    running = [one for one in settings.values() if one.runs or info_of(graph.services[one.name]).runs_if is not None]
    check_name(name, [one.name for one in running])
    if len(running) > MAX_COMPONENTS:
        raise ConfigError(f"{len(running)} services run; a {KIND} takes {MAX_COMPONENTS}")
    # Of all services: a request that a door of the graph has let in may be in any of them.
    longest = max((getattr(one.config, "request_seconds", 0.0) for one in running), default=0.0)
    drain = max(DRAIN_SECONDS, math.ceil(longest))
    components = [_component(build, graph, one, order, drain) for one in running]
    env: dict[str, dict[str, Any]] = {
        CONFIG: {"value": _literal(_json(carried(order.configuration)))},
        "DYN_SYSTEM_HOST": {"value": "0.0.0.0"},
        # The operator sets it for workers alone; the frontend has metrics too.
        "DYN_SYSTEM_PORT": {"value": str(SYSTEM_PORT)},
        DRAIN: {"value": str(drain)},
    }
    env |= {key: {"value": _literal(value)} for key, value in order.envs.items()}
    for key, (secret, inner) in order.secrets.items():
        env[key] = {"valueFrom": {"secretKeyRef": {"name": secret, "key": inner}}}
    variables = [{"name": key} | value for key, value in env.items()]
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": {"app.kubernetes.io/managed-by": "dynamo-epd"},
        "annotations": {BUILD: build.tag, ORDER: _json(dataclasses.asdict(order))},
    }
    manifest = {"apiVersion": f"{GROUP}/{version}", "kind": KIND, "metadata": metadata}
    if version == "v1alpha1":
        return manifest | {"spec": {"envs": variables, "services": {one["name"]: _alpha(one) for one in components}}}
    return manifest | {"spec": {"env": variables, "components": components}}


def remembering(manifest: dict[str, Any]) -> dict[str, Any]:
    """With itself in `LAST_APPLIED`, for an update to begin with."""
    annotations = manifest["metadata"]["annotations"] | {
        LAST_APPLIED: json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    }
    return manifest | {"metadata": manifest["metadata"] | {"annotations": annotations}}


def components_of(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of a deployment of either version, by name: the objects themselves."""
    spec = manifest["spec"]
    found: dict[str, dict[str, Any]] = spec.get("services") or {one["name"]: one for one in spec.get("components", [])}
    return found


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _literal(text: str) -> str:
    """For a variable's value: Kubernetes replaces ``$(NAME)`` in it, and makes one ``$`` of two."""
    return text.replace("$", "$$")


def carried(configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration for the pods, without what the manifest says itself: there it can be changed."""
    values = copy.deepcopy(configuration)
    for section in values.values():
        service_args = section.get(SERVICE_ARGS)
        if isinstance(service_args, dict):
            for key in ("workers", "envs"):
                service_args.pop(key, None)
            if not service_args:
                del section[SERVICE_ARGS]
    return {name: section for name, section in values.items() if section}


def component_type(graph: Graph, settings: ServiceSettings) -> str:
    """One of `TYPES`. What the code or the configuration says counts; there is no ``encode``, it is a worker."""
    info = info_of(graph.services[settings.name])
    said = settings.dynamo.get("component_type") or info.component_type
    if said in TYPES:
        return str(said)
    if graph.services[settings.name] is graph.root and has_http(graph, settings.name):
        return "frontend"
    if settings.name == PLANNER:
        return "planner"
    return next((kind for kind in ("prefill", "decode") if settings.name.lower().startswith(kind)), "worker")


def has_http(graph: Graph, name: str) -> bool:
    info = info_of(graph.services[name])
    return info.app is not None or bool(info.marked("api"))


def _component(build: Build, graph: Graph, one: ServiceSettings, order: Order, drain: int) -> dict[str, Any]:
    kind = component_type(graph, one)
    info = info_of(graph.services[one.name])
    gpus = _gpus(one)
    named = build.facts["services"][one.name].get("image")
    main: dict[str, Any] = {"name": "main", "image": named or order.image, **_command(build, graph, one)}
    envs = one.envs if named else {"HOME": TEMPORARY} | one.envs
    if envs:
        main["env"] = [{"name": key, "value": _literal(value)} for key, value in envs.items()]
    resources = _resources(one, gpus)
    if resources:
        main["resources"] = resources
    scheme = "HTTPS" if getattr(one.config, "tls", None) is not None else "HTTP"
    main |= _probes(HTTP_PORT if kind == "frontend" else SYSTEM_PORT, scheme if kind == "frontend" else "HTTP")
    if kind == "frontend":
        # The operator names the first alone, and a PodMonitor finds only ports that a container names.
        main["ports"] = [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "system", "containerPort": SYSTEM_PORT},
        ]
        # Not preStop.sleep, which Kubernetes has from 1.30 on.
        main["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(LEAVING_SECONDS)]}}}
    main |= _fence_of_container(ours=not named)
    template: dict[str, Any] = {
        "spec": {
            "containers": [main],
            "terminationGracePeriodSeconds": _grace(one, order, drain),
            **_fence_of_pod(ours=not named),
        },
    }
    if info.labels:
        template["metadata"] = {"labels": dict(info.labels)}
    found: dict[str, Any] = {
        "name": component_of(one.name),
        "type": kind,
        "runtimeVersionOverride": build.facts["runtime"],
        "sharedMemorySize": SHARED_MEMORY_WITH_GPU if gpus else SHARED_MEMORY,
        "podTemplate": template,
    }
    replicas = one.workers if one.runs else 0
    if replicas != 1:  # one is what the operator takes by itself, and what is not said again undoes no scaling
        found["replicas"] = replicas
    if kind != "planner":
        found["scalingAdapter"] = {}
    return found


def _command(build: Build, graph: Graph, one: ServiceSettings) -> dict[str, Any]:
    """The service's own command: one worker of it, since a replica is a pod."""
    overrides = info_of(graph.services[one.name]).kubernetes_overrides
    for key in overrides:
        if key not in ("entrypoint", "cmd"):
            raise ConfigError(f"{one.name}: kubernetes_overrides takes entrypoint and cmd, not {key}")
    arguments = ["serve", build.facts["graph"], "--service-name", one.name]
    if has_http(graph, one.name):
        arguments += ["--host", "0.0.0.0", "--port", str(HTTP_PORT)]
    arguments += [f"--{one.name}.{SERVICE_ARGS}.workers=1"]
    return {
        "command": _words(overrides.get("entrypoint")) or ["dynamo"],
        "args": _words(overrides.get("cmd")) or arguments,
    }


def _words(given: Any) -> list[str]:
    if not given:
        return []
    return [given] if isinstance(given, str) else [str(word) for word in given]


def _wished_gpus(one: ServiceSettings) -> float:
    try:
        wanted = float(one.resources.get("gpu") or 0)
    except ValueError as error:
        raise ConfigError(f"{one.name}: resources.gpu {one.resources['gpu']!r} is not a number") from error
    if wanted < 0:
        raise ConfigError(f"{one.name}: resources.gpu is negative")
    return wanted


def shares_a_gpu(one: ServiceSettings) -> bool:
    """Whether a part of a card is asked for. Kubernetes shares none out."""
    return not _wished_gpus(one).is_integer()


def _gpus(one: ServiceSettings) -> int:
    """Whole cards; a decorator's wish counts too: nobody here can see whether there are any."""
    return math.ceil(_wished_gpus(one))


def _resources(one: ServiceSettings, gpus: int) -> dict[str, Any]:
    """Requests, and limits for what cannot be given back: a CPU limit would only make a worker stand still."""
    requests: dict[str, str] = {key: str(one.resources[key]) for key in ("cpu", "memory") if key in one.resources}
    limits: dict[str, str] = {key: value for key, value in requests.items() if key == "memory"}
    if gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(gpus)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _grace(one: ServiceSettings, order: Order, drain: int) -> int:
    """Seconds for a pod to end: a kubelet kills what is not gone by then, finished or not. ``drain``: where nobody says
    another."""
    text = (order.envs | one.envs).get(DRAIN, str(drain))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{one.name}: {DRAIN} {text!r} is no number of seconds")
    return LEAVING_SECONDS + math.ceil(seconds) + KILL_SECONDS + MARGIN_SECONDS


def _probes(port: int, scheme: str) -> dict[str, Any]:
    """As the operator's own, written out: an old one must not kill a worker after a single late answer."""

    def get(path: str) -> dict[str, Any]:
        return {"path": path, "port": port, "scheme": scheme}

    return {
        # Two hours: a large checkpoint from a slow disk.
        "startupProbe": {"httpGet": get("/live"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 720},
        "livenessProbe": {"httpGet": get("/live"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
        "readinessProbe": {"httpGet": get("/health"), "periodSeconds": 10, "timeoutSeconds": 4, "failureThreshold": 3},
    }


def _fence_of_pod(*, ours: bool) -> dict[str, Any]:
    """With `_fence_of_container` what Pod Security's restricted profile asks for. Who an image that is not ours runs as
    is for that image to say, as long as it is not root.
    """
    context: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if not ours:
        return {"securityContext": context}
    user = dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), USER)
    # Without a bound, as the container's own files would be: checkpoints from the hub may land there.
    return {"securityContext": context | user, "volumes": [{"name": "temporary", "emptyDir": {}}]}


def _fence_of_container(*, ours: bool) -> dict[str, Any]:
    """What an image that is not ours writes to is not known here, so its files stay writable."""
    context: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if not ours:
        return {"securityContext": context}
    return {
        "securityContext": context | {"readOnlyRootFilesystem": True},
        "volumeMounts": [{"name": "temporary", "mountPath": TEMPORARY}],
    }


def _alpha(component: dict[str, Any]) -> dict[str, Any]:
    """A v1beta1 component in the words of v1alpha1, where it is the value of its name."""
    template = component["podTemplate"]
    main = dict(template["spec"]["containers"][0])
    main.pop("name")
    kind = component["type"]
    found: dict[str, Any] = {
        "componentType": "worker" if kind in ("prefill", "decode") else kind,
        "runtimeVersionOverride": component["runtimeVersionOverride"],
        "sharedMemory": {"size": component["sharedMemorySize"]},
        "livenessProbe": main.pop("livenessProbe"),
        "readinessProbe": main.pop("readinessProbe"),
    }
    if kind in ("prefill", "decode"):
        found["subComponentType"] = kind
    if "replicas" in component:
        found["replicas"] = component["replicas"]
    if "scalingAdapter" in component:
        found["scalingAdapter"] = {"enabled": True}
    if "env" in main:
        found["envs"] = main.pop("env")
    if "resources" in main:
        found["resources"] = {
            side: {key.replace("nvidia.com/", ""): value for key, value in amounts.items()}
            for side, amounts in main.pop("resources").items()
        }
    if "metadata" in template:
        found["extraPodMetadata"] = template["metadata"]
    rest = {key: value for key, value in template["spec"].items() if key != "containers"}
    return found | {"extraPodSpec": {"mainContainer": main} | rest}


def check_environment(name: str) -> str:
    """``name``, or ConfigError where a container takes no such variable."""
    if not _ENVIRONMENT.fullmatch(name):
        raise ConfigError(f"{name!r} is not the name of an environment variable")
    return name
