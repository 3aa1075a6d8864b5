# SPDX-License-Identifier: Apache-2.0
"""``dynamo build``, ``get``, ``deploy``, ``deployment``: their arguments, what they do in which order, what they say.

Standard output has what scripts read; notes and progress go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from dynamo_epd.sdk.config import ConfigError, Document, resolve
from dynamo_epd.sdk.deployment import builds, images, manifest

Overrides = list[tuple[str, str, str]]
DEFAULT_TIMEOUT = 3600.0
"""Seconds: an image and a checkpoint may have to be fetched first."""


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


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "--Service.key=value overrides the configuration file."
    parser.add_argument("tag", help="as `dynamo build` printed it")
    parser.add_argument("-n", "--name", help="of the deployment (default: the build's)")
    _add_rendered(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and change nothing")
    parser.add_argument(
        "--api-version", choices=manifest.VERSIONS, default=manifest.VERSIONS[0], help="of the manifest"
    )
    _add_waiting(parser)
    parser.set_defaults(run=_create)


def _add_rendered(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--config-file", dest="file", help="YAML: service names, and Common")
    parser.add_argument("--env", "--envs", action="append", default=[], metavar="NAME=VALUE", dest="envs")
    parser.add_argument("--env-from-secret", action="append", default=[], metavar="NAME=KEY", dest="secrets")
    parser.add_argument(
        "--env-secrets-name",
        default=os.environ.get("DYNAMO_ENV_SECRETS", "dynamo-env-secrets"),
        metavar="SECRET",
        help="that --env-from-secret means (default: %(default)s)",
    )
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--namespace", default=os.environ.get("KUBE_NS"), help="of Kubernetes (default: $KUBE_NS)")
    parser.add_argument("-t", "--target", choices=("kubernetes",), default="kubernetes")
    parser.add_argument("-e", "--endpoint", default=os.environ.get("DYNAMO_CLOUD"), help=argparse.SUPPRESS)


def _add_waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="until it is ready")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, help="seconds (default: %(default)g)")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _refuse_overrides(overrides: Overrides, what: str) -> None:
    if overrides:
        raise ConfigError(f"--{overrides[0][0]}.{overrides[0][1]}: {what} takes no configuration")


def _build(arguments: argparse.Namespace, overrides: Overrides) -> int:
    _refuse_overrides(overrides, "a build")
    if not Path(arguments.working_dir).is_dir():
        raise ConfigError(f"--working-dir {arguments.working_dir}: no such directory")
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
    print(json.dumps(value, indent=2) if form == "json" else yaml.safe_dump(value, sort_keys=False), end="")
    if form == "json":
        print()


def _create(arguments: argparse.Namespace, overrides: Overrides) -> int:
    build = builds.find(arguments.tag)
    _say_endpoint(arguments.endpoint)
    document = Document()
    if arguments.file:
        document.read(arguments.file)
    for service, key, text in overrides:
        document.override(service, key, text)
    made = _render(build, document, arguments, arguments.name or build.name, arguments.api_version)
    if arguments.dry_run:
        print(yaml.safe_dump(made, sort_keys=False), end="")
        return 0
    raise NotImplementedError


def _render(
    build: builds.Build, document: Document, arguments: argparse.Namespace, name: str, version: str
) -> dict[str, Any]:
    graph = build.graph()
    settings = resolve(graph, document)
    extras = manifest.Extras(
        image=images.deployed(build.tag),
        envs=_pairs("--env", arguments.envs),
        secrets=_pairs("--env-from-secret", arguments.secrets),
        secrets_name=arguments.env_secrets_name,
    )
    for one in settings.values():
        wanted = one.resources.get("gpu")
        if one.runs and wanted and float(wanted) != int(float(wanted)):
            _note(f"{one.name} asks for {wanted} of a GPU; Kubernetes gives it a whole one")
    return manifest.render(
        build,
        graph,
        document,
        settings,
        name=name,
        namespace=arguments.namespace or "default",
        extras=extras,
        version=version,
    )


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{option} {text}: must be NAME={'VALUE' if option == '--env' else 'KEY'}")
        found[manifest.check_environment(name)] = value
    return found


def _say_endpoint(endpoint: str | None) -> None:
    if endpoint:
        _note(f"{endpoint}: Dynamo has no api-store any more; this talks to the Kubernetes API of your kubeconfig")
