# SPDX-License-Identifier: Apache-2.0
"""``dynamo build``, ``get``, ``deploy``, ``deployment``: their arguments, what they do in which order, what they say.

Standard output has what scripts read; notes and progress go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dynamo_epd.sdk.config import ConfigError, Document, resolve
from dynamo_epd.sdk.deployment import DeploymentError, builds, images, manifest, status
from dynamo_epd.sdk.operator import VERSIONS

Overrides = list[tuple[str, str, str]]
DEFAULT_TIMEOUT = 3600.0
"""Seconds: an image and a checkpoint may have to be fetched first."""
DELETE_TIMEOUT = 600.0
"""Seconds: pods may finish what they have."""
POLL_SECONDS = 2.0
SILENCE_SECONDS = 60.0
"""In which an API server that does not answer may come back: one that is updated or loses its leader does."""


def add_parsers(commands: Any) -> None:
    """Adds the sub-commands. Each sets ``run``: a function of the arguments and the overrides to the exit status."""
    build = commands.add_parser("build", allow_abbrev=False, help="pack a graph with its code, under a tag")
    build.add_argument("graph", help="module[:Service] or path/to/file.py[:Service]")
    build.add_argument("-o", "--output-dir", type=Path, help="leave a copy of the build there")
    build.add_argument("-f", "--force", action="store_true", help="build again, and replace a copy that is there")
    build.add_argument("--containerize", action="store_true", help="make an image, with docker or podman")
    build.add_argument("--push", action="store_true", help="make an image and push it")
    build.add_argument(
        "--device", choices=images.DEVICES, help="of the image (default: gpu where a service wishes one)"
    )
    build.add_argument("--working-dir", default=".", help="where the graph's modules are found (default: here)")
    build.set_defaults(run=_build)
    get = commands.add_parser("get", allow_abbrev=False, help="show a build")
    get.add_argument("tag")
    get.add_argument("-o", "--output", choices=("json", "yaml", "path"), default="yaml")
    get.set_defaults(run=_get)
    _add_create(commands.add_parser("deploy", allow_abbrev=False, help="deploy a build to Kubernetes"))
    below = commands.add_parser("deployment", allow_abbrev=False, help="deployments on Kubernetes").add_subparsers(
        dest="deployment", required=True
    )
    _add_create(below.add_parser("create", allow_abbrev=False, help="as `dynamo deploy`"))
    update = below.add_parser("update", allow_abbrev=False, help="change what was deployed, and nothing else")
    update.epilog = (
        "Without -f the configuration stays, overrides included; with it the file takes its place. Variables and "
        "secrets stay beside new ones. What others have changed since stays as it is."
    )
    update.add_argument("name")
    update.add_argument("tag", nargs="?", help="of another build (default: the one that is deployed)")
    _add_rendered(update)
    update.add_argument("--dry-run", action="store_true", help="print the manifest and change nothing")
    _add_waiting(update, "until it is ready", DEFAULT_TIMEOUT)
    update.set_defaults(run=_update)
    get = below.add_parser("get", allow_abbrev=False, help="how a deployment is, and where it answers")
    delete = below.add_parser("delete", allow_abbrev=False, help="end a deployment")
    _add_waiting(delete, "until it is gone", DELETE_TIMEOUT)
    listing = below.add_parser("list", allow_abbrev=False, help="the deployments of the namespace")
    for parser, run in ((get, _show), (delete, _delete), (listing, _list)):
        if parser is not listing:
            parser.add_argument("name")
        if parser is not delete:
            parser.add_argument("-o", "--output", choices=("json", "yaml"), help="the whole objects")
        _add_target(parser)
        parser.set_defaults(run=run)


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "--Service.key=value overrides the configuration file."
    parser.add_argument("tag", help="as `dynamo build` printed it")
    parser.add_argument("-n", "--name", help="of the deployment (default: the build's)")
    _add_rendered(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and change nothing")
    parser.add_argument("--api-version", choices=VERSIONS, default=VERSIONS[0], help="of the manifest")
    _add_waiting(parser, "until it is ready", DEFAULT_TIMEOUT)
    parser.set_defaults(run=_create)


def _add_rendered(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--config-file", dest="file", help="YAML: service names, and Common")
    parser.add_argument(
        "--env", "--envs", action="append", default=[], metavar="NAME=VALUE", dest="envs", help="for every pod"
    )
    parser.add_argument(
        "--env-from-secret",
        action="append",
        default=[],
        metavar="NAME=KEY",
        dest="secrets",
        help="for every pod, from the Secret",
    )
    parser.add_argument(
        "--env-secrets-name",
        default=os.environ.get("DYNAMO_ENV_SECRETS", "dynamo-env-secrets"),
        metavar="SECRET",
        help="that --env-from-secret means (default: %(default)s)",
    )
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--namespace",
        default=os.environ.get("KUBE_NS"),
        help="of Kubernetes (default: $KUBE_NS, else the kubeconfig's)",
    )
    parser.add_argument("-t", "--target", choices=("kubernetes",), default="kubernetes")
    parser.add_argument("-e", "--endpoint", default=os.environ.get("DYNAMO_CLOUD"), help=argparse.SUPPRESS)


def _add_waiting(parser: argparse.ArgumentParser, until: str, timeout: float) -> None:
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help=until)
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds (default: %(default)g)")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _refuse_overrides(overrides: Overrides, what: str) -> None:
    if overrides:
        raise ConfigError(f"--{overrides[0][0]}.{overrides[0][1]}: {what} takes no configuration")


def _build(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "a build")
    if not Path(arguments.working_dir).is_dir():
        raise ConfigError(f"--working-dir {arguments.working_dir}: no such directory")
    if arguments.push and not os.environ.get(images.REGISTRY):
        raise ConfigError(f"--push: {images.REGISTRY} says where to, and is not set")
    built = builds.build(arguments.graph, arguments.working_dir, force=arguments.force)
    if arguments.output_dir is not None:
        builds.copy(built, arguments.output_dir, force=arguments.force)
    if arguments.containerize or arguments.push:
        image = images.name_of(built.tag)
        wishes = any(one["resources"].get("gpu") for one in built.facts["services"].values())
        images.containerize(built.directory, image, arguments.device or ("gpu" if wishes else "cpu"))
        if arguments.push:
            images.push(image)
        print(f"image: {image}")
    print(f"Successfully built {built.tag}.")
    return 0


def _get(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "a build")
    found = builds.find(arguments.tag)
    if arguments.output == "path":
        print(found.directory)
    else:
        _print({"tag": found.tag, **found.facts, "path": str(found.directory)}, arguments.output)
    return 0


def _print(value: Any, form: str) -> None:
    print(json.dumps(value, indent=2) + "\n" if form == "json" else yaml.safe_dump(value, sort_keys=False), end="")


def _create(arguments: argparse.Namespace, overrides: Overrides) -> int:
    build = builds.find(arguments.tag)
    _say_endpoint(arguments.endpoint)
    document = _document(arguments.file, {}, overrides)
    envs, secrets = _variables(arguments, {}, {})
    order = manifest.Order(
        build=build.tag,
        image=_image(build),
        configuration=document.values,
        envs=envs,
        secrets=secrets,
    )
    name = arguments.name or build.name
    # What is wrong with the order is said before any cluster is asked.
    made = _render(order, build, document, name, arguments.namespace or "default", arguments.api_version)
    if arguments.dry_run:
        print(yaml.safe_dump(manifest.remembering(made), sort_keys=False), end="")
        return 0
    from dynamo_epd.sdk.deployment.cluster import Cluster

    cluster = Cluster(arguments.namespace)
    made["metadata"]["namespace"] = cluster.namespace
    cluster.create(made)
    print(f"Created {name} of {build.tag} in namespace {cluster.namespace}.", flush=True)
    return _wait(cluster, name, arguments)


def _update(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _say_endpoint(arguments.endpoint)
    from dynamo_epd.sdk.deployment.cluster import Cluster, rendered

    cluster = Cluster(arguments.namespace)
    last = rendered(cluster.get(arguments.name))
    before = manifest.Order.of(last)
    build = builds.find(arguments.tag or before.build)
    document = _document(arguments.file, before.configuration, overrides)
    envs, secrets = _variables(arguments, before.envs, before.secrets)
    kept = build.tag == before.build and not (os.environ.get(images.IMAGE) or os.environ.get(images.REGISTRY))
    order = manifest.Order(
        build=build.tag,
        image=before.image if kept else _image(build),
        configuration=document.values,
        envs=envs,
        secrets=secrets,
    )
    version = str(last["apiVersion"]).rpartition("/")[2]
    made = _render(order, build, document, arguments.name, cluster.namespace, version)
    if arguments.dry_run:
        print(yaml.safe_dump(manifest.remembering(made), sort_keys=False), end="")
        return 0
    scaled = cluster.update(made)
    if scaled is None:
        print(f"{arguments.name} is as it should be.")
        return 0
    print(f"Updated {arguments.name} in namespace {cluster.namespace}.", flush=True)
    return _wait(cluster, arguments.name, arguments, scaled)


def _show(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "`deployment get`")
    _say_endpoint(arguments.endpoint)
    from dynamo_epd.sdk.deployment.cluster import Cluster

    cluster = Cluster(arguments.namespace)
    live = cluster.get(arguments.name)
    if arguments.output:
        _print(live, arguments.output)
    else:
        print(status.describe(live, cluster.addresses(status.frontend_service(live))))
    return 0


def _list(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "`deployment list`")
    _say_endpoint(arguments.endpoint)
    from dynamo_epd.sdk.deployment.cluster import Cluster

    found = Cluster(arguments.namespace).all()
    if arguments.output:
        _print(found, arguments.output)
    else:
        print(status.table(found))
    return 0


def _delete(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "`deployment delete`")
    _say_endpoint(arguments.endpoint)
    from dynamo_epd.sdk.deployment.cluster import Cluster

    cluster, name = Cluster(arguments.namespace), arguments.name
    deleted = cluster.delete(name)
    if deleted is not None and not arguments.wait:
        print(f"Deleting {name} from namespace {cluster.namespace}.")
        return 0
    if deleted is not None and (left := _until(lambda: _holding(cluster, deleted), name, "is not gone", arguments)):
        return left
    print(f"Deleted {name} from namespace {cluster.namespace}.")
    return 0


def _holding(cluster: Any, deleted: dict[str, Any]) -> str | None:
    """Whose finalizers a deleted deployment still has; None once it is gone."""
    from dynamo_epd.sdk.deployment.cluster import Gone

    try:
        metadata = cluster.get(deleted["metadata"]["name"])["metadata"]
    except Gone:
        return None
    if metadata["uid"] != deleted["metadata"]["uid"]:
        return None  # somebody was quick to make it anew
    return f"waiting for {', '.join(metadata.get('finalizers') or ['Kubernetes'])}"


def _wait(cluster: Any, name: str, arguments: argparse.Namespace, scaled: dict[str, int] | None = None) -> int:
    """Until the operator calls it ready, and has as many replicas as were asked of it (``scaled``). Raises
    DeploymentError when it fails, or the time is over.
    """

    def look() -> str | None:
        live = cluster.get(name)
        state = status.state(live, scaled)
        if status.failed(live):
            raise DeploymentError(f"{name} failed: {state}")
        if state != status.READY:
            return state
        print(status.describe(live, cluster.addresses(status.frontend_service(live))))
        return None

    return _until(look, name, "is not ready", arguments) if arguments.wait else 0


def _until(look: Callable[[], str | None], name: str, late: str, arguments: argparse.Namespace) -> int:
    """Asks ``look`` again and again until nothing is missing any more, and says what is. An API server that does not
    answer is asked again for `SILENCE_SECONDS`. Raises DeploymentError when the time is over. Returns the exit status.
    """
    from dynamo_epd.sdk.deployment.cluster import Unanswered

    answered = time.monotonic()
    end, said = answered + arguments.timeout, ""
    try:
        while True:
            try:
                missing = look()
                answered = time.monotonic()
            except Unanswered as error:
                if time.monotonic() - answered > SILENCE_SECONDS:
                    raise
                missing = str(error)
            if missing is None:
                return 0
            if missing != said:
                print(f"  {missing}", file=sys.stderr, flush=True)
                said = missing
            if time.monotonic() > end:
                raise DeploymentError(f"{name} {late} after {arguments.timeout:g} s: {missing}")
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
    except KeyboardInterrupt:
        _note(f"not waiting any more; `dynamo deployment get {name}` shows how it goes on")
        return 130


def _document(file: str | None, configuration: dict[str, Any], overrides: Overrides) -> Document:
    """The file, or else ``configuration``, with the overrides in it."""
    document = Document()
    if file:
        document.read(file)
    else:
        document.values = configuration
    for service, key, text in overrides:
        document.override(service, key, text)
    return document


def _render(
    order: manifest.Order, build: builds.Build, document: Document, name: str, namespace: str, version: str
) -> dict[str, Any]:
    """The manifest, with notes on what will be otherwise than on this machine."""
    graph = build.graph()
    settings = resolve(graph, document)
    for one in settings.values():
        if one.runs and manifest.shares_a_gpu(one):
            _note(f"{one.name} asks for {one.resources['gpu']} of a GPU; Kubernetes gives it a whole one")
    for part, section in document.values.items():
        model = section.get("model")
        if isinstance(model, str) and Path(model).is_dir():
            _note(f"{part}.model: {model} is a directory here and no part of the image; pods look below /workspace")
    return manifest.render(order, build, graph, settings, name=name, namespace=namespace, version=version)


def _image(build: builds.Build) -> str:
    image = images.deployed(build.tag)
    if image == build.tag:
        _note(
            f"pods will run the image {image}; {images.REGISTRY} says where it is pushed, {images.IMAGE} names another"
        )
    return image


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text}: must be NAME={'VALUE' if option == '--env' else 'KEY'}")
        found[manifest.check_environment(name)] = value
    return found


def _variables(
    arguments: argparse.Namespace, envs: dict[str, str], secrets: dict[str, list[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """``envs`` and ``secrets`` with what the options say. A variable is in one of them: a token that comes from a
    Secret from now on must not stay in the annotations.
    """
    plain = _pairs("--env", arguments.envs)
    keys = _pairs("--env-from-secret", arguments.secrets)
    if both := sorted(plain.keys() & keys.keys()):
        raise ConfigError(f"--env {both[0]}: --env-from-secret says it too")
    secret = {name: value for name, value in secrets.items() if name not in plain}
    secret |= {name: [arguments.env_secrets_name, key] for name, key in keys.items()}
    return {name: value for name, value in (envs | plain).items() if name not in secret}, secret


def _say_endpoint(endpoint: str | None) -> None:
    if endpoint:
        _note(f"{endpoint}: Dynamo has no api-store any more; this talks to the Kubernetes API of your kubeconfig")
