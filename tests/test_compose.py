# SPDX-License-Identifier: Apache-2.0
"""deploy/compose.yaml by the compose specification's schema and rules, and by what the project has."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dynamo_epd.sdk.config import Document, resolve, split_overrides
from dynamo_epd.sdk.graph import load_graph
from tests.toys.running import ROOT

DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SCHEMA = json.loads((ROOT / "tests" / "schemas" / "compose.json").read_text())
PROFILES = ("cpu", "gpu")
SET = {"NATS_AUTH_USERNAME": "u", "NATS_AUTH_PASSWORD": "p", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+)(?:(?P<kind>:-|:\?)(?P<text>[^}]*))?\}")


def profile(name: str) -> dict[str, dict[str, Any]]:
    return {key: one for key, one in SERVICES.items() if name in one["profiles"]}


def interpolated(text: str, environment: dict[str, str]) -> str:
    """As compose does it. Raises KeyError for a variable that must be set."""

    def value(found: re.Match[str]) -> str:
        if environment.get(found["name"]):
            return environment[found["name"]]
        if found["kind"] == ":-":
            return found["text"]
        raise KeyError(found["name"])

    return VARIABLE.sub(value, text)


def mounts(service: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Source, target, mode of the short form."""
    parts = [text.split(":") for text in service.get("volumes", [])]
    return [(one[0], one[1], one[2] if len(one) > 2 else "rw") for one in parts]


def test_it_passes_the_schema() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(FILE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("services", "nats", "comand"), []),
        (("services", "nats", "healthcheck", "intervall"), "1s"),
        (("services", "s3", "ports"), "9000"),
        (("volumes", "home", "drivr"), "local"),
        (("service",), {}),
    ],
)
def test_the_schema_refuses(path: tuple[str, ...], value: Any) -> None:
    file = copy.deepcopy(FILE)
    inner = file
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid(file)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_whole(name: str) -> None:
    """What a service names is in the same profile, and there are no circles."""
    services = profile(name)
    assert services.keys() == {
        "loopback", "nats", "s3", f"graph-{name}", f"targets-{name}", "prometheus", "grafana"
    }  # fmt: skip

    def named(one: dict[str, Any]) -> set[str]:
        shared = (one.get(key, "").removeprefix("service:") for key in ("network_mode", "pid") if key in one)
        return {*one.get("depends_on", {}), *shared}

    done: set[str] = set()
    while len(done) < len(services):
        ready = {key for key, one in services.items() if key not in done and named(one) <= done}
        assert ready, services.keys() - done
        done |= ready
    for one in services.values():
        for other, how in one.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]


def test_the_cpu_profile_needs_no_gpu_runtime() -> None:
    for one in profile("cpu").values():
        assert not {"deploy", "devices", "gpus", "runtime", "device_cgroup_rules"} & one.keys()
        assert "gpu" not in str(one.get("command")) and "target: gpu" not in str(one)
    devices = SERVICES["graph-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_every_mounted_path_exists() -> None:
    for name, one in SERVICES.items():
        for source, target, mode in mounts(one):
            assert target.startswith("/")
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name}: {source}"
                assert mode == "ro", f"{name}: {source}"
            else:
                assert source in FILE["volumes"], f"{name}: {source}"


def test_prometheus_finds_its_files_where_they_are_mounted() -> None:
    prometheus = SERVICES["prometheus"]
    at = {target: source for source, target, _ in mounts(prometheus)}
    config = next(word.split("=", 1)[1] for word in prometheus["command"] if word.startswith("--config.file"))
    directory = str(Path(config).parent)
    here = DEPLOY / at[directory] / Path(config).name
    settings = yaml.safe_load(here.read_text())
    files = [text for job in settings["scrape_configs"] for one in job["file_sd_configs"] for text in one["files"]]
    writer = SERVICES["targets-cpu"]
    written = Path(writer["entrypoint"][-1])
    shared = {source: target for source, target, _ in mounts(writer)}
    for text in files:
        found = (Path(directory) / text).as_posix()
        place = Path(os.path.normpath(found))
        assert at[str(place.parent)] == "targets" and place.name == written.name
    assert shared["targets"] == str(written.parent)
    assert (shared["./observability/targets.py"], SERVICES["targets-gpu"]["entrypoint"]) == (
        writer["entrypoint"][1],
        writer["entrypoint"],
    )
    # its control socket and its state are the graph's
    for name in PROFILES:
        graph = {source: target for source, target, _ in mounts(SERVICES[f"graph-{name}"])}
        for volume in ("home", "temporary"):
            assert {s: t for s, t, _ in mounts(SERVICES[f"targets-{name}"])}[volume] == graph[volume]


def test_grafana_gets_all_that_its_provisioning_names() -> None:
    grafana = SERVICES["grafana"]
    provisioning = DEPLOY / "observability" / "grafana" / "provisioning"
    text = "".join(file.read_text() for file in provisioning.rglob("*.yaml"))
    for name in re.findall(r"\$\{?([A-Z_]+)", text):
        assert name in grafana["environment"]
    assert grafana["environment"]["DASHBOARDS"] in [target for _, target, _ in mounts(grafana)]


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("more", ["", "--Frontend.auth.keys-file=/run/graph/keys.yaml"])
def test_the_graphs_command_is_one_that_the_project_has(name: str, more: str) -> None:
    """`dynamo serve` would resolve it; the stores of frontend and image worker are one."""
    words = shlex.split(interpolated(SERVICES[f"graph-{name}"]["command"], SET | {"EPD_ARGS": more}))
    plain, overrides = split_overrides(words)
    assert plain[:2] == ["serve", "graphs.cova:Frontend"]
    options = dict(zip(plain[2::2], plain[3::2], strict=True))
    assert options.keys() == {"-f", "--host", "--port"}
    sources = {target: source for source, target, _ in mounts(SERVICES[f"graph-{name}"])}
    assert sources["/workspace/configs"] == "../configs"
    document = Document()
    document.read(ROOT / options["-f"])
    for service, key, text in overrides:
        document.override(service, key, text)
    settings = resolve(load_graph(plain[1], str(ROOT)), document)
    assert settings["Frontend"].config.store == settings["ImageWorker"].config.store
    assert settings["Frontend"].config.store.bucket == "pictures"
    assert str(settings["Frontend"].config.auth).count("keys.yaml") == bool(more)
    buckets = {target for source, target, _ in mounts(SERVICES["s3"]) if source == "pictures"}
    assert buckets == {f"{SERVICES['s3']['command'][-1]}/pictures"}
    if name == "cpu":
        models = [one.config.model for one in settings.values() if hasattr(one.config, "model") and one.config.model]
        assert models and all(str(model).startswith("models/tiny/") for model in models)
        assert sources["/workspace/models/tiny"] == "../models/tiny"


def test_secrets_come_from_outside_and_are_asked_for() -> None:
    assert VARIABLE.search(TEXT)
    for name in SET:
        with pytest.raises(KeyError, match=name):
            interpolated(TEXT, {key: value for key, value in SET.items() if key != name})
        assert all(found["kind"] == ":?" for found in VARIABLE.finditer(TEXT) if found["name"] == name)
    assert VARIABLE.search(interpolated(TEXT, SET)) is None


def test_what_runs_is_pinned_fenced_and_published_on_loopback_alone() -> None:
    for name, one in SERVICES.items():
        image = interpolated(one["image"], {})
        repository, tag = image.split(":")
        assert tag != "latest" and "." not in repository, name
        assert one["cap_drop"] == ["ALL"] and one["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in one and "/var/run/docker.sock" not in str(one), name
        assert "ports" not in one or all(text.startswith("127.0.0.1:") for text in one["ports"]), name
        assert ("healthcheck" in one) == (not name.startswith(("loopback", "targets"))), name


def test_docker_takes_the_file() -> None:
    asked = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(asked, capture_output=True, timeout=120).returncode:
        pytest.skip("no docker compose here")
    for name in PROFILES:
        command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--profile", name, "config", "--quiet"]
        ran = subprocess.run(command, env={**os.environ, **SET}, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
