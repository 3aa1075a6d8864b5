# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes API server over HTTP: objects in memory, for the `kubernetes` client, kubectl and the runtime.

A double. It speaks what they need of the REST paths: discovery, get, list, watch, create, replace, patch and delete,
with resource versions, bearer tokens that may do all, only read, or what Dynamo's planners may, and the Status objects
of Kubernetes' errors. Two resources of Dynamo's operator are checked against its schemas (tests/crds), and a key that
these do not know is refused; so are changes that its webhook refuses (deploy/operator/internal/webhook/validation of
ai-dynamo/dynamo), and it makes and follows scaling adapters. What it does not do: convert between versions of a
resource, evaluate the schemas' CEL rules, prune, set defaults, or know who owns a field (an apply patch is merged like
any other).

``python -m tests.kubernetes_server`` serves until Ctrl-C, for commands that are typed in another terminal. It prints
which KUBECONFIG to export there.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gzip
import json
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml
from kubernetes.client import V1ObjectMeta

CRDS = Path(__file__).with_name("crds") / "crds.json.gz"
GROUP = "nvidia.com"
DEPLOYMENTS, ADAPTERS = "dynamographdeployments", "dynamographdeploymentscalingadapters"
RESOURCES: dict[tuple[str, str], tuple[str, list[str], list[str]]] = {
    # (group, plural): kind, versions, short names
    (GROUP, DEPLOYMENTS): ("DynamoGraphDeployment", ["v1beta1", "v1alpha1"], ["dgd"]),
    (GROUP, ADAPTERS): ("DynamoGraphDeploymentScalingAdapter", ["v1beta1", "v1alpha1"], ["dgdsa"]),
    (GROUP, "dynamoworkermetadatas"): ("DynamoWorkerMetadata", ["v1alpha1"], []),
    ("", "pods"): ("Pod", ["v1"], []),
    ("discovery.k8s.io", "endpointslices"): ("EndpointSlice", ["v1"], []),
    ("networking.k8s.io", "ingresses"): ("Ingress", ["v1"], []),
    ("gateway.networking.k8s.io", "httproutes"): ("HTTPRoute", ["v1"], []),
    ("gateway.networking.k8s.io", "gateways"): ("Gateway", ["v1"], ["gtw"]),
}
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status|scale))?"
)
PLANNER_MAY = {
    ("GET", DEPLOYMENTS, None),
    ("PATCH", DEPLOYMENTS, None),
    ("PATCH", ADAPTERS, "scale"),
    ("GET", "pods", None),
    ("GET", "endpointslices", None),
    *((verb, "dynamoworkermetadatas", None) for verb in ("GET", "POST", "PUT", "PATCH", "DELETE")),
}
"""Verb, resource, part of it: the Role that the operator's chart gives planners (its templates/planner.yaml)."""
OPERATORS_OWN = "DYN_DEPLOYMENT_CONFIG"
"""The operator reads this variable of a deployment into types of its own, where a number of GPUs is a string, and
writes ``port`` into the frontend's section (internal/dynamo/graph.go). It reconciles nothing where it cannot.
"""
_SEMANTIC_TAG = re.compile(r":v?\d+\.\d+\.\d+")
WATCH_SECONDS = 30.0
ANYTHING = {"x-kubernetes-preserve-unknown-fields": True}
METADATA = {"properties": dict.fromkeys(V1ObjectMeta.attribute_map.values(), ANYTHING)}
"""Of every object alike, which is why no schema of a kind repeats it."""


class Refused(Exception):
    """An answer other than success, as Kubernetes words it."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


class KubernetesServer:
    """``with KubernetesServer() as server``. ``operator`` sees every deployment that is written and may change it:
    by default it calls it ready at once.
    """

    def __init__(self, *, operator: Callable[[dict[str, Any]], None] | None = None, knows_dynamo: bool = True):
        self.operator = operator or make_ready
        self.namespaces = {"default", "dynamo-cloud"}
        self.objects: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str]] = []
        """(verb, path, content type) of each, in order."""
        self.before: Callable[[str, str], None] = lambda verb, path: None
        """Called before each request is answered: somebody else's move. After a ConnectionError there is no answer."""
        self.lag = 0.0
        """Seconds until a deployment has what its scaling adapter was told."""
        self._knows_dynamo = knows_dynamo
        self._events: list[tuple[int, str, tuple[str, str, str, str], dict[str, Any]]] = []
        self._version = 1
        self._changed = threading.Condition()
        self._closing = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def kubeconfig(self, path: Path, token: str = "admin", namespace: str | None = None) -> Path:
        """Writes a kubeconfig. Tokens: ``admin``, ``reader``, ``planner``; any other is refused. Without a token comes
        kubectl, which says none over plain HTTP.
        """
        context = {"cluster": "test", "user": "test"} | ({"namespace": namespace} if namespace else {})
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": {"server": self.url}}],
                    "users": [{"name": "test", "user": {"token": token}}],
                    "contexts": [{"name": "test", "context": context}],
                }
            )
        )
        return path

    def deployment(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """What is stored. Changing it is somebody else's change: follow it with `touch`."""
        return self.objects[GROUP, DEPLOYMENTS, namespace, name]

    def touch(self, stored: dict[str, Any]) -> None:
        with self._changed:
            self._version += 1
            stored["metadata"]["resourceVersion"] = str(self._version)
            self._changed.notify_all()

    def put(self, group: str, plural: str, stored: dict[str, Any]) -> None:
        """Writes an object as one who may."""
        metadata = stored["metadata"]
        with self._changed:
            self._store((group, plural, metadata["namespace"], metadata["name"]), stored)

    def __enter__(self) -> KubernetesServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, verb: str, url: str, token: str, content_type: str, body: bytes) -> Any:
        """The object to answer with, or an iterator of a watch's events. Raises Refused."""
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append((verb, parts.path, content_type))
        if token not in ("", "admin", "reader", "planner"):
            raise Refused(401, "Unauthorized", "Unauthorized")
        self.before(verb, parts.path)
        if verb == "GET" and (known := self._discovery(parts.path)) is not None:
            return known
        match = _PATH.fullmatch(parts.path)
        group, plural = (match["group"] or "", match["plural"]) if match else ("", "")
        known_resource = RESOURCES.get((group, plural))
        if match is None or known_resource is None or (group == GROUP and not self._knows_dynamo):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if match["version"] not in known_resource[1]:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        may = token != "planner" or (verb, plural, match["sub"]) in PLANNER_MAY
        if not may or (token == "reader" and verb != "GET"):
            verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}
            raise Refused(
                403,
                "Forbidden",
                f'{plural}.{group} is forbidden: User "{token}" cannot {verbs[verb]} resource "{plural}" '
                f'in API group "{group}" in the namespace "{match["namespace"]}"',
            )
        key = (group, plural, match["namespace"] or "", match["name"] or "")
        version = match["version"]
        if verb == "GET" and not match["name"]:
            if query.get("watch") in ("true", "1"):
                return self._watch(key, version, query)
            return self._list(key, version, query)
        if verb == "GET":
            return self._shown(self._existing(key), version)
        if verb == "DELETE":
            return self._delete(key, version)
        sent = yaml.safe_load(body) if "yaml" in content_type else json.loads(body)
        with self._changed:
            return self._shown(self._write(verb, key, version, sent, content_type, match["sub"], query), version)

    def _discovery(self, path: str) -> dict[str, Any] | None:
        groups: dict[str, set[str]] = {}
        for (group, _), (_, versions, _) in RESOURCES.items():
            if group and (group != GROUP or self._knows_dynamo):
                groups.setdefault(group, set()).update(versions)
        if path == "/version":
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/openapi/v3":
            place = f"apis/{GROUP}/v1beta1"
            return {"paths": {place: {"serverRelativeURL": f"/openapi/v3/{place}"}}}
        if path == f"/openapi/v3/apis/{GROUP}/v1beta1":
            return _openapi()
        if path == "/apis":
            named: list[dict[str, Any]] = [
                {
                    "name": group,
                    "versions": [
                        {"groupVersion": f"{group}/{one}", "version": one} for one in sorted(versions, reverse=True)
                    ],
                }
                for group, versions in groups.items()
            ]
            for one in named:
                one["preferredVersion"] = one["versions"][0]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
        match = re.fullmatch(r"/(?:api|apis/([^/]+))/(v[^/]+)", path)
        if match is None or (match[1] and match[2] not in groups.get(match[1], set())):
            return None
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{match[1]}/{match[2]}" if match[1] else match[2],
            "resources": [
                {
                    "name": plural,
                    "singularName": kind.lower(),
                    "namespaced": True,
                    "kind": kind,
                    "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                    "shortNames": short,
                }
                for (group, plural), (kind, versions, short) in RESOURCES.items()
                if group == (match[1] or "") and match[2] in versions
            ],
        }

    def _existing(self, key: tuple[str, str, str, str]) -> dict[str, Any]:
        found = self.objects.get(key)
        if found is None:
            raise Refused(404, "NotFound", f'{key[1]}{"." if key[0] else ""}{key[0]} "{key[3]}" not found')
        return found

    def _shown(self, stored: dict[str, Any], version: str) -> dict[str, Any]:
        group = stored["apiVersion"].rpartition("/")[0]
        return copy.deepcopy(stored) | {"apiVersion": f"{group}/{version}" if group else version}

    def _list(self, key: tuple[str, str, str, str], version: str, query: dict[str, str]) -> dict[str, Any]:
        with self._changed:
            items = [
                self._shown(one, version) for place, one in self.objects.items() if _within(place, key, one, query)
            ]
            kind = RESOURCES[key[:2]][0]
            return {
                "kind": f"{kind}List",
                "apiVersion": f"{key[0]}/{version}" if key[0] else version,
                "metadata": {"resourceVersion": str(self._version)},
                "items": items,
            }

    def _watch(self, key: tuple[str, str, str, str], version: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        seen = int(query.get("resourceVersion") or 0)
        while not self._closing:
            with self._changed:
                fresh = [event for event in self._events if event[0] > seen and _within(event[2], key, event[3], query)]
                if not fresh:
                    self._changed.wait(WATCH_SECONDS)
            for number, kind, _, stored in fresh:
                seen = number
                yield {"type": kind, "object": self._shown(stored, version)}

    def _delete(self, key: tuple[str, str, str, str], version: str) -> dict[str, Any]:
        with self._changed:
            stored = self._existing(key)
            if stored["metadata"].get("finalizers"):  # it stays until whoever has put them in has taken them out
                stored["metadata"].setdefault("deletionTimestamp", _now())
                self._store(key, stored)
                return self._shown(stored, version)
            del self.objects[key]
            if key[1] == DEPLOYMENTS:
                for adapter in [place for place, one in self.objects.items() if _is_of(place, one, key)]:
                    del self.objects[adapter]
            self._version += 1
            self._events.append((self._version, "DELETED", key, stored))
            self._changed.notify_all()
        return {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"name": key[3]}}

    def _write(
        self,
        verb: str,
        key: tuple[str, str, str, str],
        version: str,
        sent: Any,
        content_type: str,
        sub: str | None,
        query: dict[str, str],
    ) -> dict[str, Any]:
        if verb == "POST":
            key = (*key[:3], sent["metadata"]["name"])
            if key[2] not in self.namespaces:
                raise Refused(404, "NotFound", f'namespaces "{key[2]}" not found')
            if key in self.objects:
                raise Refused(409, "AlreadyExists", f'{key[1]}.{key[0]} "{key[3]}" already exists')
            found = sent
        elif verb == "PUT":
            self._check_version(self._existing(key), sent)
            found = sent
        elif "apply-patch" in content_type:
            found = merged(self.objects.get(key, {}), sent)
        elif "json-patch" in content_type:
            raise Refused(415, "UnsupportedMediaType", "this double knows merge and apply patches")
        elif "strategic" in content_type and key[0] == GROUP:
            raise Refused(415, "UnsupportedMediaType", "custom resources have no strategic merge patch")
        elif sub == "scale":
            found = merged(self._existing(key), {"spec": {"replicas": sent["spec"]["replicas"]}})
        else:
            self._check_version(self._existing(key), sent)
            found = merged(self._existing(key), sent)
        found = copy.deepcopy(found) | {"apiVersion": f"{key[0]}/{version}" if key[0] else version}
        found["metadata"] = {"namespace": key[2], **found["metadata"]}
        if sub == "status":
            found["spec"] = self._existing(key).get("spec")
        check(key[1], found)
        if key[1] == DEPLOYMENTS and key in self.objects:
            _check_update(self.objects[key], found)
        if query.get("dryRun"):
            return found
        self._store(key, found)
        if key[1] == DEPLOYMENTS and sub is None:
            self._make_adapters(key, found)
            self.operator(found)
        if key[1] == ADAPTERS and self.lag:
            late = threading.Timer(self.lag, self._follow_late, [key])
            late.daemon = True
            late.start()
        elif key[1] == ADAPTERS:
            self._follow(key, found)
        return found

    def _follow_late(self, key: tuple[str, str, str, str]) -> None:
        with self._changed:
            if key in self.objects:
                self._follow(key, self.objects[key])

    def _make_adapters(self, key: tuple[str, str, str, str], deployment: dict[str, Any]) -> None:
        """Of every component that asks for one."""
        for name, one in components_of(deployment).items():
            place = (GROUP, ADAPTERS, key[2], f"{key[3]}-{name.lower()}")
            if _has_adapter(one) and place not in self.objects:
                spec = {"dgdRef": {"name": key[3], "componentName": name}, "replicas": one.get("replicas", 1)}
                metadata = {"name": place[3], "namespace": key[2]}
                kind = RESOURCES[GROUP, ADAPTERS][0]
                self._store(place, {"apiVersion": f"{GROUP}/v1beta1", "kind": kind, "metadata": metadata, "spec": spec})

    def _follow(self, key: tuple[str, str, str, str], adapter: dict[str, Any]) -> None:
        """The deployment gets an adapter's replicas."""
        reference = adapter["spec"]["dgdRef"]
        place = (GROUP, DEPLOYMENTS, key[2], reference["name"])
        deployment = copy.deepcopy(self.objects[place])
        components_of(deployment)[reference["componentName"]]["replicas"] = adapter["spec"]["replicas"]
        self._store(place, deployment)
        self.operator(deployment)

    def _store(self, key: tuple[str, str, str, str], found: dict[str, Any]) -> None:
        before = self.objects.get(key)
        self._version += 1
        old = before["metadata"] if before else {}
        changed = before is None or before.get("spec") != found.get("spec")
        found["metadata"] |= {
            "uid": old.get("uid") or str(uuid.uuid4()),
            "creationTimestamp": old.get("creationTimestamp") or _now(),
            "generation": old.get("generation", 0) + int(changed),
            "resourceVersion": str(self._version),
        }
        self.objects[key] = found
        self._events.append((self._version, "MODIFIED" if before else "ADDED", key, found))
        self._changed.notify_all()

    def _check_version(self, stored: dict[str, Any], sent: dict[str, Any]) -> None:
        wanted = sent.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != stored["metadata"]["resourceVersion"]:
            name = stored["metadata"]["name"]
            raise Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on "{name}": the object has been modified; '
                "please apply your changes to the latest version and try again",
            )


def components_of(deployment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: the objects themselves."""
    spec = deployment["spec"]
    found: dict[str, dict[str, Any]] = (
        {one["name"]: one for one in spec["components"]} if "components" in spec else spec["services"]
    )
    return found


def _has_adapter(component: dict[str, Any]) -> bool:
    asked = component.get("scalingAdapter")
    return asked is not None and asked.get("enabled", True)


def _is_of(place: tuple[str, str, str, str], one: dict[str, Any], deployment: tuple[str, str, str, str]) -> bool:
    return place[:3] == (GROUP, ADAPTERS, deployment[2]) and one["spec"]["dgdRef"]["name"] == deployment[3]


def _check_update(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises Refused for what the operator's webhook refuses of anybody who is not the operator."""
    old, new = components_of(before), components_of(after)
    name = after["metadata"]["name"]
    if old.keys() != new.keys():
        raise Refused(422, "Invalid", f"{name}: component topology is immutable and cannot be modified after creation")
    for one in old:
        owned = _has_adapter(old[one]) or _has_adapter(new[one])
        if owned and old[one].get("replicas", 1) != new[one].get("replicas", 1):
            raise Refused(
                422, "Invalid", f"{name}: {one}.replicas cannot be modified directly when scaling adapter is enabled"
            )


def _openapi() -> dict[str, Any]:
    """As much as kubectl needs to leave the checking of fields to the server."""
    kind = {"group": GROUP, "version": "v1beta1", "kind": "DynamoGraphDeployment"}
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    patch = {"parameters": [parameter], "x-kubernetes-action": "patch", "x-kubernetes-group-version-kind": kind}
    path = f"/apis/{GROUP}/v1beta1/namespaces/{{namespace}}/dynamographdeployments/{{name}}"
    return {"openapi": "3.0.0", "info": {"title": "double", "version": "1"}, "paths": {path: {"patch": patch}}}


def make_ready(deployment: dict[str, Any]) -> None:
    """A stand-in for the operator: every component is up, at once."""
    condition = {"type": "Ready", "status": "True", "reason": "AllReady", "message": "", "lastTransitionTime": _now()}
    deployment["status"] = {
        "observedGeneration": deployment["metadata"]["generation"],
        "state": "successful",
        "conditions": [condition],
        "components": {
            name: {
                "componentKind": "Deployment",
                "replicas": one.get("replicas", 1),
                "readyReplicas": one.get("replicas", 1),
                "updatedReplicas": one.get("replicas", 1),
            }
            for name, one in components_of(deployment).items()
        },
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(into: Any, patch: Any) -> Any:
    """JSON Merge Patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    found = dict(into) if isinstance(into, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def _within(place: tuple[str, str, str, str], key: tuple[str, str, str, str], one: Any, query: dict[str, str]) -> bool:
    if place[:2] != key[:2] or (key[2] and place[2] != key[2]):
        return False
    if "fieldSelector" in query and query["fieldSelector"] != f"metadata.name={place[3]}":
        return False
    labels = one["metadata"].get("labels", {})
    wanted = [text.partition("=") for text in query.get("labelSelector", "").split(",") if text]
    return all(labels.get(name) == value.lstrip("=") for name, _, value in wanted)


_schemas: dict[tuple[str, str], dict[str, Any]] = {}


def schema_of(plural: str, version: str) -> dict[str, Any] | None:
    """The OpenAPI schema of a checked resource, else None."""
    if not _schemas:
        for name, definition in json.loads(gzip.decompress(CRDS.read_bytes())).items():
            for one in definition["spec"]["versions"]:
                _schemas[name, one["name"]] = one["schema"]["openAPIV3Schema"]
    return _schemas.get((plural, version))


def check(plural: str, found: dict[str, Any]) -> None:
    """Raises Refused for what the schema, or the operator's admission, does not take."""
    version = found["apiVersion"].rpartition("/")[2]
    schema = schema_of(plural, version)
    if schema is None:
        return
    name = found["metadata"].get("name")
    spec = found.get("spec", {})
    unknown = list(unknown_fields(found, schema))
    if unknown:
        raise Refused(400, "BadRequest", f'strict decoding error: unknown field "{unknown[0]}"')
    wrong = next(iter(jsonschema.Draft7Validator(schema).iter_errors(found)), None)
    if wrong is not None:
        where = ".".join(map(str, wrong.absolute_path))
        raise Refused(422, "Invalid", f'{found["kind"]}.{GROUP} "{name}" is invalid: {where}: {wrong.message}')
    if f'"name": "{OPERATORS_OWN}"' in json.dumps(spec):
        raise Refused(422, "Invalid", f"{name}: {OPERATORS_OWN} is the operator's own, which writes into it")
    for component in spec.get("components", []):
        containers = component.get("podTemplate", {}).get("spec", {}).get("containers", [])
        main = next((one for one in containers if one["name"] == "main"), None)
        if main is None or not main.get("image"):
            raise Refused(422, "Invalid", f"{component['name']}: a container named main with an image is required")
        if not _SEMANTIC_TAG.search(main["image"]) and "runtimeVersionOverride" not in component:
            raise Refused(422, "Invalid", f"{component['name']}: runtimeVersionOverride is required")


def unknown_fields(found: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """Paths of the keys of an object that its schema does not name. Of metadata it says no more than that it is there;
    a status is the operator's own, and the double's is of one version alone.
    """
    known = {"status": ANYTHING} | schema["properties"] | {"metadata": METADATA}
    for key, value in found.items():
        if key not in known:
            yield key
        elif key != "status":
            yield from unknown_keys(value, known[key], key)


def unknown_keys(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Paths of the keys that the schema does not name: jsonschema by itself lets them pass."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from unknown_keys(one, schema.get("items", {}), f"{path}[{index}]")
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    named, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, inner in value.items():
        if key in named:
            yield from unknown_keys(inner, named[key], f"{path}.{key}")
        elif isinstance(others, dict):
            yield from unknown_keys(inner, others, f"{path}.{key}")
        elif not others:
            yield f"{path}.{key}"


def _handler(server: KubernetesServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            content_type = self.headers.get("Content-Type") or ""
            try:
                found = server.answer(self.command, self.path, token, content_type, self.rfile.read(length))
            except Refused as refused:
                self._send(refused.code, refused.body)
                return
            except ConnectionError:
                self.close_connection = True
                return
            if isinstance(found, dict):
                self._send(201 if self.command == "POST" else 200, found)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for event in found:
                    data = json.dumps(event).encode() + b"\n"
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.flush()
            except OSError:
                self.close_connection = True  # whoever watched has left

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, KubernetesServer() as alone:
        print(f"export KUBECONFIG={alone.kubeconfig(Path(directory) / 'kubeconfig')}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
