# SPDX-License-Identifier: Apache-2.0
"""The talk with the Kubernetes API about deployments. The only file that imports the `kubernetes` client."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import kubernetes.config
import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION
from urllib3.exceptions import HTTPError

from dynamo_epd.sdk.deployment import DeploymentError
from dynamo_epd.sdk.deployment.manifest import BUILD, KIND, LAST_APPLIED, components_of, remembering
from dynamo_epd.sdk.deployment.merging import change, three_way
from dynamo_epd.sdk.operator import ADAPTERS, DEPLOYMENTS, GROUP, VERSIONS, adapter_of, no_tls

SECONDS = 30.0
"""For the API server to answer."""
ATTEMPTS = 5
"""At an update that others get ahead of."""
GATEWAY_API = "gateway.networking.k8s.io", "v1"
_SERVICE_ACCOUNT_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


class Unanswered(DeploymentError):
    """The API server cannot be reached, or has trouble of its own: it may answer the next time."""


class Gone(DeploymentError):
    """There is no deployment of that name."""


class Cluster:
    """The deployments in one namespace of the cluster that kubeconfig, or the pod that this runs in, names.

    Every method raises DeploymentError, in one line: no cluster, no rights, no such namespace or name.
    """

    def __init__(self, namespace: str | None):
        configuration = _configuration()
        configuration.retries = False
        self.namespace = namespace or _current_namespace()
        self._host = configuration.host
        api = client.ApiClient(configuration)
        self._objects = client.CustomObjectsApi(api)
        # The client calls a patch that is no list a strategic one, which custom objects do not have.
        patching = client.ApiClient(configuration, "Content-Type", "application/merge-patch+json")
        self._patches = client.CustomObjectsApi(patching)
        self._network = client.NetworkingV1Api(api)

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Makes the deployment of ``manifest``."""
        name = manifest["metadata"]["name"]
        with self._errors(name):
            found: dict[str, Any] = self._objects.create_namespaced_custom_object(
                GROUP,
                _version(manifest),
                self.namespace,
                DEPLOYMENTS,
                remembering(manifest),
                field_validation="Strict",
                _request_timeout=SECONDS,
            )
            return found

    def get(self, name: str, version: str = VERSIONS[0]) -> dict[str, Any]:
        with self._errors(name):
            found: dict[str, Any] = self._objects.get_namespaced_custom_object(
                GROUP, version, self.namespace, DEPLOYMENTS, name, _request_timeout=SECONDS
            )
            return found

    def all(self) -> list[dict[str, Any]]:
        with self._errors(None):
            found = self._objects.list_namespaced_custom_object(
                GROUP, VERSIONS[0], self.namespace, DEPLOYMENTS, _request_timeout=SECONDS
            )
            return list(found["items"])

    def delete(self, name: str) -> dict[str, Any] | None:
        """Asks for the deployment to be deleted. Returns it where it stays for a while yet, for those who have put a
        finalizer into it, as the operator does: they first clear away what they have made.
        """
        with self._errors(name):
            found: dict[str, Any] = self._objects.delete_namespaced_custom_object(
                GROUP, VERSIONS[0], self.namespace, DEPLOYMENTS, name, _request_timeout=SECONDS
            )
            return None if found.get("kind") == "Status" else found

    def update(self, manifest: dict[str, Any]) -> dict[str, int] | None:
        """Brings the deployment from what was rendered last to ``manifest``. Returns the replicas that scaling adapters
        were told of, which the operator brings about later; None where there was nothing to change.

        A field that differs in the cluster from what was rendered last, and does not change between the two, is left
        as it is: an annotation, an image set by hand. Replicas are changed in the scaling adapter that holds them.
        """
        name, version = manifest["metadata"]["name"], _version(manifest)
        scaled: dict[str, int] = {}
        for attempt in range(ATTEMPTS):
            live = self.get(name, version)
            last = rendered(live)
            wanted = three_way(last, remembering(manifest), live)
            _check_components(live, wanted)
            for component, replicas in _scaled(last, manifest, live).items():
                self._scale(name, component, replicas)  # first: what the annotation says once is not asked for again
                scaled[component] = replicas
            _keep_replicas(live, wanted)
            patch = change(live, wanted)
            if not patch:
                return scaled or None
            # The server refuses the patch where somebody was quicker: lists travel whole.
            patch.setdefault("metadata", {})["resourceVersion"] = live["metadata"]["resourceVersion"]
            try:
                self._patch(name, version, patch)
                return scaled
            except ApiException as error:
                if error.status != 409 or attempt == ATTEMPTS - 1:
                    raise self._error(error, name) from error
        raise AssertionError

    def _patch(self, name: str, version: str, patch: dict[str, Any]) -> None:
        with self._errors(name, conflicts=False):
            self._patches.patch_namespaced_custom_object(
                GROUP,
                version,
                self.namespace,
                DEPLOYMENTS,
                name,
                patch,
                field_validation="Strict",
                _request_timeout=SECONDS,
            )

    def _scale(self, name: str, component: str, replicas: int) -> None:
        adapter = adapter_of(name, component)
        place = (GROUP, VERSIONS[0], self.namespace, ADAPTERS, adapter)
        body = {"spec": {"replicas": replicas}}
        with self._errors(name):
            try:
                self._patches.patch_namespaced_custom_object_scale(*place, body, _request_timeout=SECONDS)
            except ApiException as error:
                if error.status != 404:
                    raise
                raise DeploymentError(f"the operator has not made the scaling adapter {adapter!r} yet") from error

    def addresses(self, service: str) -> list[str]:
        """URLs under which Ingresses and HTTPRoutes show a service to the outside; of those that may be read."""
        return [*self._of_ingresses(service), *self._of_routes(service)]

    def _of_ingresses(self, service: str) -> Iterator[str]:
        try:
            ingresses = self._network.list_namespaced_ingress(self.namespace, _request_timeout=SECONDS).items
        except (ApiException, HTTPError):
            return
        for ingress in ingresses:
            secure = {host for tls in ingress.spec.tls or [] for host in tls.hosts or []}
            for rule in ingress.spec.rules or []:
                for path in rule.http.paths if rule.http else []:
                    if path.backend.service is not None and path.backend.service.name == service and rule.host:
                        scheme = "https" if rule.host in secure else "http"
                        yield f"{scheme}://{rule.host}{(path.path or '').rstrip('/')}"

    def _of_routes(self, service: str) -> Iterator[str]:
        try:
            routes = self._objects.list_namespaced_custom_object(
                *GATEWAY_API, self.namespace, "httproutes", _request_timeout=SECONDS
            )["items"]
        except (ApiException, HTTPError):
            return
        for route in routes:
            spec = route["spec"]
            paths = [
                match.get("path", {}).get("value", "/").rstrip("/")
                for rule in spec.get("rules", [])
                if any(backend["name"] == service for backend in rule.get("backendRefs", []))
                for match in rule.get("matches", [{}])
            ]
            parents = spec.get("parentRefs", []) if paths else []
            for listener in (one for parent in parents for one in self._listeners(parent)):
                scheme = "https" if listener["protocol"] == "HTTPS" else "http"
                port = "" if listener["port"] == {"https": 443, "http": 80}[scheme] else f":{listener['port']}"
                for host in spec.get("hostnames", []):
                    yield from (f"{scheme}://{host}{port}{path}" for path in paths)

    def _listeners(self, parent: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of a Gateway that a route is attached to."""
        if parent.get("kind", "Gateway") != "Gateway":
            return []
        namespace = parent.get("namespace", self.namespace)
        try:
            gateway = self._objects.get_namespaced_custom_object(
                *GATEWAY_API, namespace, "gateways", parent["name"], _request_timeout=SECONDS
            )
        except (ApiException, HTTPError):
            return []
        section = parent.get("sectionName")
        return [one for one in gateway["spec"]["listeners"] if section in (None, one["name"])]

    @contextlib.contextmanager
    def _errors(self, name: str | None, *, conflicts: bool = True) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            if error.status == 409 and not conflicts:
                raise
            raise self._error(error, name) from error
        except (HTTPError, OSError) as error:
            raise Unanswered(f"no cluster answers at {self._host}") from error

    def _error(self, error: ApiException, name: str | None) -> DeploymentError:
        """One line of what the server said."""
        if (insecure := no_tls(error, self._host)) is not None:
            return DeploymentError(insecure)
        try:
            body = json.loads(error.body or "{}")
        except ValueError:
            body = {}
        message = _one_line(str(body.get("message") or error.reason or ""))
        if error.status == 401:
            return DeploymentError(f"the cluster at {self._host} does not know you: {message}")
        if error.status == 403:
            return DeploymentError(f"no rights: {message}")
        if error.status == 404 and "namespaces" in message:
            return DeploymentError(f"no namespace {self.namespace!r} in this cluster")
        if error.status == 404 and name is not None and f'"{name}"' in message:
            return Gone(f"no deployment {name!r} in namespace {self.namespace}")
        if error.status == 404:
            return DeploymentError(f"this cluster knows no {KIND}: Dynamo's operator is not installed there")
        if error.status == 409 and body.get("reason") == "AlreadyExists":
            return DeploymentError(
                f"{name!r} is taken in namespace {self.namespace}; `dynamo deployment update` changes it"
            )
        if error.status == 429 or error.status >= 500:
            return Unanswered(f"the cluster at {self._host} cannot answer now: {error.status} {message}")
        what = f" {name!r}" if name else ""
        return DeploymentError(f"the cluster refuses{what}: {message}")


def rendered(live: dict[str, Any]) -> dict[str, Any]:
    """The manifest that a deployment was last given. Raises DeploymentError for one that is not ours."""
    metadata = live["metadata"]
    try:
        found: dict[str, Any] = json.loads((metadata.get("annotations") or {})[LAST_APPLIED])
        return found
    except (KeyError, ValueError):
        raise DeploymentError(f"{metadata['name']!r} was not made by `dynamo deploy`; use kubectl") from None


def build_of(live: dict[str, Any]) -> str | None:
    """The tag of the build that a deployment runs."""
    found = (live["metadata"].get("annotations") or {}).get(BUILD)
    return str(found) if found is not None else None


def _check_components(live: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises DeploymentError where services would come or go, which the operator takes from nobody."""
    before, after = components_of(live).keys(), components_of(wanted).keys()
    changes = [
        f"{word} {name}" for word, names in (("adds", after - before), ("drops", before - after)) for name in names
    ]
    if changes:
        name = live["metadata"]["name"]
        raise DeploymentError(
            f"this {', '.join(sorted(changes))}; a deployment keeps its services: `dynamo deployment delete {name}` "
            "and `dynamo deploy` make it anew"
        )


def _scaled(last: dict[str, Any], wanted: dict[str, Any], live: dict[str, Any]) -> dict[str, int]:
    """Replicas of the components whose adapter must be told of others."""
    before, now = components_of(last), components_of(live)
    return {
        name: _replicas(one)
        for name, one in components_of(wanted).items()
        if _has_adapter(now.get(name, {})) and _replicas(before.get(name, {})) != _replicas(one) != _replicas(now[name])
    }


def _keep_replicas(live: dict[str, Any], wanted: dict[str, Any]) -> None:
    now = components_of(live)
    for name, one in components_of(wanted).items():
        if _has_adapter(now[name]):
            one.pop("replicas", None)
            one.update({key: value for key, value in now[name].items() if key == "replicas"})


def _has_adapter(component: dict[str, Any]) -> bool:
    asked = component.get("scalingAdapter")
    return asked is not None and asked.get("enabled", True)  # v1alpha1 has a switch, v1beta1 none


def _replicas(component: dict[str, Any]) -> int:
    return int(component.get("replicas", 1))


def _version(manifest: dict[str, Any]) -> str:
    return str(manifest["apiVersion"]).rpartition("/")[2]


def _configuration() -> client.Configuration:
    """As kubectl finds it: the kubeconfig, else the account of the pod that this runs in."""
    found = client.Configuration()
    try:
        kubernetes.config.load_kube_config(_kubeconfig(), client_configuration=found)
    except (ConfigException, OSError, yaml.YAMLError) as error:
        try:
            kubernetes.config.load_incluster_config(client_configuration=found)
        except ConfigException:
            raise DeploymentError(f"no cluster: {_one_line(str(error))}") from error
    return found


def _kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION


def _current_namespace() -> str:
    try:
        _, active = kubernetes.config.list_kube_config_contexts(_kubeconfig())
        return str(active["context"].get("namespace") or "default")
    except (ConfigException, OSError):
        pass
    if os.path.exists(_SERVICE_ACCOUNT_NAMESPACE):
        with open(_SERVICE_ACCOUNT_NAMESPACE) as file:
            return file.read().strip()
    return "default"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
