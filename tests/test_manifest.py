# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 - `desk` is a fixture
"""What Kubernetes is told of a graph, checked with the operator's own schemas, unknown keys refused."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.frontend import LAST_BYTES_SECONDS, Admission
from dynamo_epd.sdk.config import ConfigError, Document, resolve, split_overrides
from dynamo_epd.sdk.deployment import builds, images, manifest
from dynamo_epd.sdk.deployment.builds import Build
from dynamo_epd.sdk.deployment.manifest import LEAVING_SECONDS, MARGIN_SECONDS
from dynamo_epd.sdk.graph import Graph, load_graph
from dynamo_epd.sdk.operator import CONFIG, VERSIONS, configuration, outer_namespace, placed
from dynamo_epd.sdk.serve import DEFAULT_DRAIN
from dynamo_epd.sdk.service import info_of
from dynamo_epd.sdk.supervisor import KILL_GRACE
from dynamo_epd.sdk.worker import DRAIN, Worker
from tests.deploying import Desk, desk  # noqa: F401
from tests.kubernetes_server import CRDS, OPERATORS_OWN, Refused, check, schema_of
from tests.manifests import unrestricted
from tests.toys.running import ROOT

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
UPSTREAM = ROOT.parent / "shared" / "crds"


def graph_of(config: str) -> tuple[Build, Graph]:
    """The graph that a configuration is for, as a build that is nowhere: rendering reads its facts alone."""
    kind = next(name for name in ("disagg", "agg", "cova") if name in config)
    graph = load_graph(f"graphs.{kind}:Frontend", str(ROOT))
    return Build("frontend", "12345678", ROOT, builds.describe(graph, f"graphs.{kind}:Frontend")), graph


def read(config: str) -> Document:
    document = Document()
    document.read(ROOT / "configs" / config)
    return document


def rendered(config: str, version: str = "v1beta1", *overrides: str) -> dict[str, Any]:
    build, graph = graph_of(config)
    document = read(config)
    for service, key, text in split_overrides(list(overrides))[1]:
        document.override(service, key, text)
    order = manifest.Order(build.tag, "frontend:12345678", document.values)
    settings = resolve(graph, document)
    return manifest.render(order, build, graph, settings, name="demo", namespace="ns", version=version)


def components(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in made["spec"]["components"]}


def main_of(component: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = component["podTemplate"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_passes_the_schemas(config: str, version: str) -> None:
    made = rendered(config, version, "--Planner.no-operation=false")
    check("dynamographdeployments", made)
    assert json.loads(json.dumps(made)) == made


def pods(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each component, in either version."""
    if "components" in made["spec"]:
        return {name: one["podTemplate"]["spec"] for name, one in components(made).items()}
    extra = {name: one["extraPodSpec"] for name, one in made["spec"]["services"].items()}
    return {name: one | {"containers": [{"name": "main"} | one["mainContainer"]]} for name, one in extra.items()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_pod_is_restricted_and_writes_to_one_volume_alone(config: str, version: str) -> None:
    found = pods(rendered(config, version, "--Planner.no-operation=false"))
    assert "Planner" in found
    for name, pod in found.items():
        assert not unrestricted(pod), name
        assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {images.USER}
        (main,) = pod["containers"]
        assert main["securityContext"]["readOnlyRootFilesystem"] is True
        assert main["volumeMounts"] == [{"name": "temporary", "mountPath": "/tmp"}]
        assert pod["volumes"] == [{"name": "temporary", "emptyDir": {}}]


def test_the_images_are_of_the_user_whom_pods_run_as() -> None:
    text = images.dockerfile(with_library=True, version="1", requirements="# torch==1.0.0\n")
    assert f"useradd --uid {images.USER} " in text
    assert re.findall(r"(?m)^USER (.+)$", text) == [str(images.USER)] * len(images.DEVICES)


@pytest.mark.parametrize(
    "place", [(), ("metadata",), ("spec",), ("spec", "components", 0), ("spec", "components", 0, "podTemplate", "spec")]
)
def test_the_check_refuses_what_the_schemas_do_not_know(place: tuple[Any, ...]) -> None:
    made = rendered("disagg.yaml")
    target: Any = made
    for key in place:
        target = target[key]
    target["nodeSelektor"] = {}
    path = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, (*place, "nodeSelektor"))))
    with pytest.raises(Refused, match=re.escape(f'unknown field "{path}"')):
        check("dynamographdeployments", made)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_check_refuses_the_variable_that_the_operator_writes_into(version: str) -> None:
    made = rendered("disagg.yaml", version)
    made["spec"]["env" if version == "v1beta1" else "envs"][0]["name"] = OPERATORS_OWN
    with pytest.raises(Refused, match="DYN_DEPLOYMENT_CONFIG is the operator's own"):
        check("dynamographdeployments", made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.update(type="encode"), "'encode' is not one of"),
        (lambda one: one.update(replicas="2"), "'2' is not of type 'integer'"),
        (lambda one: one.update(name="Encode_Worker"), "does not match"),
        (lambda one: one.pop("runtimeVersionOverride"), "runtimeVersionOverride is required"),
        (lambda one: main_of(one).pop("image"), "a container named main with an image is required"),
    ],
)
def test_the_check_refuses_wrong_values(change: Any, words: str) -> None:
    made = rendered("disagg.yaml")
    change(components(made)["EncodeWorker"])
    with pytest.raises(Refused, match=words):
        check("dynamographdeployments", made)


def test_the_schemas_are_upstreams() -> None:
    if not UPSTREAM.is_dir():
        pytest.skip("the operator's own files are not beside this repository")

    def without_descriptions(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: without_descriptions(value)
                for key, value in node.items()
                if not (key == "description" and isinstance(value, str))
            }
        return [without_descriptions(one) for one in node] if isinstance(node, list) else node

    for name, held in json.loads(gzip.decompress(CRDS.read_bytes())).items():
        text = (UPSTREAM / f"nvidia.com_{name}.yaml").read_text()
        assert without_descriptions(yaml.load(text, Loader=yaml.CSafeLoader)) == held
        assert schema_of(name, held["spec"]["versions"][-1]["name"]) is not None


def test_one_component_a_service_that_runs() -> None:
    found = components(rendered("disagg.yaml", "v1beta1", "--PrefillWorker.ServiceArgs.workers=3"))
    kinds = {"Frontend": "frontend", "Processor": "worker", "EncodeWorker": "worker"}
    assert {name: one["type"] for name, one in found.items()} == kinds | {
        "PrefillWorker": "prefill",
        "DecodeWorker": "decode",
        "Planner": "planner",
    }
    replicas = {name: one["replicas"] for name, one in found.items() if "replicas" in one}
    assert replicas == {"PrefillWorker": 3, "Planner": 0}, "one is what the operator takes by itself"
    adapted = {name for name, one in found.items() if one.get("scalingAdapter") == {}}
    assert adapted == found.keys() - {"Planner"}
    gpus = {name: main_of(one).get("resources", {}).get("limits") for name, one in found.items()}
    assert gpus["DecodeWorker"] == gpus["EncodeWorker"] == {"nvidia.com/gpu": "1"}
    assert gpus["Frontend"] is gpus["Processor"] is None
    assert found["DecodeWorker"]["sharedMemorySize"] == "8Gi"
    planned = components(rendered("disagg.yaml", "v1beta1", "--Planner.no-operation=false"))
    assert planned.keys() == found.keys()
    assert "replicas" not in planned["Planner"]
    ports: dict[str, Any] = {name: main_of(one).get("ports") for name, one in found.items()}
    # A PodMonitor finds what a container declares; of all others the operator declares it.
    assert {one["containerPort"] for one in ports.pop("Frontend")} == {8000, 9090}
    assert set(ports.values()) == {None}


def test_probes_stand_where_the_operator_probes() -> None:
    for name, one in components(rendered("disagg.yaml")).items():
        main = main_of(one)
        port = 8000 if name == "Frontend" else 9090
        for probe, path in (("startupProbe", "/live"), ("livenessProbe", "/live"), ("readinessProbe", "/health")):
            assert main[probe]["httpGet"] == {"path": path, "port": port, "scheme": "HTTP"}
        assert ("--port" in main["args"]) == (name == "Frontend")


def test_a_frontend_still_answers_while_proxies_learn_that_it_leaves() -> None:
    for name, one in components(rendered("disagg.yaml")).items():
        stop = main_of(one).get("lifecycle", {}).get("preStop")
        assert stop == ({"exec": {"command": ["sleep", "5"]}} if name == "Frontend" else None)


def test_a_pod_is_not_killed_before_it_has_drained(desk: Desk) -> None:
    assert (manifest.DRAIN, manifest.DRAIN_SECONDS, manifest.KILL_SECONDS) == (DRAIN, DEFAULT_DRAIN, KILL_GRACE)

    def graces(*arguments: str) -> set[int]:
        found = pods(made_of(desk, *arguments))
        return {found[name]["terminationGracePeriodSeconds"] for name in ("Door", "Store")}

    of_all, of_one = f"{DRAIN}=300", f"--Store.ServiceArgs.envs.{DRAIN}=600.5"
    assert graces() == {60}
    assert graces("--Door.patience=20") == {60}, "nobody has less than what counts without a word"
    assert graces("--Door.patience=99.5") == {130}, "of the door, and of all behind it"
    assert graces("--Door.patience=99.5", "--env", of_all) == {330}
    assert graces("--env", of_all) == {330}
    assert graces(of_one) == {60, 631}
    assert graces("--env", of_all, of_one) == {330, 631}
    alpha = made_of(desk, "--api-version", "v1alpha1", "--env", of_all)
    assert {one["terminationGracePeriodSeconds"] for one in pods(alpha).values()} == {330}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_pod_that_is_removed_has_as_long_as_a_request_of_its_graph_may_take(config: str, version: str) -> None:
    """What an autoscaler takes away, or a rollout, loses no answer that would have been in time."""
    deadline = read(config).values["Frontend"].get("admission", {}).get("deadline", Admission().deadline)
    assert deadline == 600 or config != "cova.yaml"
    made = rendered(config, version)
    (drain,) = [
        float(one["value"]) for one in made["spec"]["env" if version == "v1beta1" else "envs"] if one["name"] == DRAIN
    ]
    assert drain == deadline + LAST_BYTES_SECONDS, "the last bytes on their way to a slow reader included"
    found = pods(made)
    assert {"Frontend", "Processor", "DecodeWorker"} <= found.keys()
    for name, pod in found.items():
        assert pod["terminationGracePeriodSeconds"] == LEAVING_SECONDS + drain + KILL_GRACE + MARGIN_SECONDS, name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pod_resolves_the_same_settings(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the manifest's variable and command line, as `dynamo serve` does there; but one worker."""
    _, graph = graph_of(config)
    here = resolve(graph, read(config))
    made = rendered(config)
    variable = next(one["value"] for one in made["spec"]["env"] if one["name"] == CONFIG)
    for name, one in components(made).items():
        document = Document()
        document.values = configuration({CONFIG: variable})
        for service, key, text in split_overrides(main_of(one)["args"])[1]:
            document.override(service, key, text)
        there = resolve(graph, document)
        assert there[name].workers == 1
        envs = {each["name"]: each["value"] for each in main_of(one).get("env", [])}
        assert envs == {"HOME": "/tmp"} | here[name].envs
        assert {key: (each.config, each.resources, each.resources_configured) for key, each in there.items()} == {
            key: (each.config, each.resources, each.resources_configured) for key, each in here.items()
        }


def made_of(desk: Desk, *arguments: str) -> dict[str, Any]:
    status = desk.run("deploy", desk.build(), "-n", "corner", "--dry-run", *arguments)
    assert status == 0, desk.noted
    made: dict[str, Any] = yaml.safe_load(desk.said)
    check("dynamographdeployments", made)
    return made


def test_what_the_code_says_reaches_kubernetes(desk: Desk) -> None:
    found = components(made_of(desk, "--Store.ServiceArgs.envs.PAINT=blue", "--Store.shelves=7"))
    store, till = found["Store"], found["Till"]
    assert main_of(store)["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "4Gi", "nvidia.com/gpu": "1"},
    }
    assert "Store asks for 0.5 of a GPU; Kubernetes gives it a whole one" in desk.noted
    assert store["podTemplate"]["metadata"]["labels"] == {"street": "main"}
    assert main_of(store)["env"] == [{"name": "HOME", "value": "/tmp"}, {"name": "PAINT", "value": "blue"}]
    assert main_of(store)["command"] == ["dynamo"]
    assert main_of(store)["args"][:4] == ["serve", "shop:Door", "--service-name", "Store"]
    assert (till["type"], main_of(till)["image"], main_of(till)["args"]) == ("prefill", "example/till:1.2.3", ["till"])


def test_an_image_that_the_code_names_keeps_its_user_and_its_files(desk: Desk) -> None:
    """But root it may not be, and it gets no more rights than the others."""
    pod = pods(made_of(desk))["Till"]
    assert not unrestricted(pod)
    assert "runAsUser" not in pod["securityContext"] and "volumes" not in pod
    (main,) = pod["containers"]
    assert "readOnlyRootFilesystem" not in main["securityContext"]
    assert not {"env", "volumeMounts"} & main.keys()


def as_beta(made: dict[str, Any]) -> dict[str, Any]:
    """A v1alpha1 deployment as the operator's own conversion makes v1beta1 of it, which alone is reconciled
    (api/v1alpha1/shared_spec_conversion.go: buildPodTemplateToHub). Raises AssertionError for a field that this does
    not know: it may be one that the conversion drops, as it does with ``labels``.
    """
    converted = []
    for name, service in made["spec"]["services"].items():
        one = copy.deepcopy(service)
        pod: dict[str, Any] = one.pop("extraPodSpec")
        main = {"name": "main"} | pod.pop("mainContainer")
        for key in ("livenessProbe", "readinessProbe"):
            main[key] = one.pop(key)
        if "envs" in one:
            main["env"] = one.pop("envs")
        if "resources" in one:
            main["resources"] = {
                side: {"nvidia.com/gpu" if key == "gpu" else key: value for key, value in amounts.items()}
                for side, amounts in one.pop("resources").items()
            }
        template: dict[str, Any] = {"spec": {"containers": [main], **pod}}
        if "extraPodMetadata" in one:
            template["metadata"] = one.pop("extraPodMetadata")
        kind = one.pop("componentType")
        beta = {"name": name, "type": one.pop("subComponentType", kind), "podTemplate": template}
        beta["sharedMemorySize"] = one.pop("sharedMemory")["size"]
        if one.pop("scalingAdapter", {}).get("enabled"):
            beta["scalingAdapter"] = {}
        beta |= {key: one.pop(key) for key in ("replicas", "runtimeVersionOverride") if key in one}
        assert not one, name
        converted.append(beta)
    version = made["apiVersion"].replace("v1alpha1", "v1beta1")
    return made | {"apiVersion": version, "spec": {"env": made["spec"]["envs"], "components": converted}}


@pytest.mark.parametrize("config", CONFIGS)
def test_both_versions_are_the_same_deployment(config: str) -> None:
    overrides = ["--Planner.no-operation=false", "--EncodeWorker.ServiceArgs.workers=3"]
    assert as_beta(rendered(config, "v1alpha1", *overrides)) == rendered(config, "v1beta1", *overrides)


def test_both_versions_are_the_same_toy(desk: Desk) -> None:
    """Which has what no graph here has: labels, variables and an image of its own, a CPU's and memory's amount."""
    arguments = ["--env", "A=1", "--env-from-secret", "B=b", "--Store.ServiceArgs.workers=2"]
    alpha, beta = (made_of(desk, "--api-version", version, *arguments) for version in ("v1alpha1", "v1beta1"))
    assert components(beta)["Store"]["podTemplate"]["metadata"] == {"labels": {"street": "main"}}
    assert as_beta(alpha)["spec"] == beta["spec"]


def test_v1alpha1_says_the_same_in_its_own_words(desk: Desk) -> None:
    made = made_of(desk, "--api-version", "v1alpha1", "--env", "A=1")
    assert made["apiVersion"] == "nvidia.com/v1alpha1"
    store, till = made["spec"]["services"]["Store"], made["spec"]["services"]["Till"]
    assert store["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi", "gpu": "1"},
        "limits": {"memory": "4Gi", "gpu": "1"},
    }
    assert (store["componentType"], till["componentType"], till["subComponentType"]) == ("worker", "worker", "prefill")
    assert store["envs"] == [{"name": "HOME", "value": "/tmp"}, {"name": "PAINT", "value": "red"}]
    assert {"name": "A", "value": "1"} in made["spec"]["envs"]
    assert store["extraPodSpec"]["mainContainer"]["args"][:2] == ["serve", "shop:Door"]


def test_variables_and_secrets_reach_every_pod(desk: Desk) -> None:
    made = made_of(desk, "--env", "A=1=2", "--env", "B=", "--env-from-secret", "HF_TOKEN=token")
    env = {one.pop("name"): one for one in made["spec"]["env"]}
    assert (env["A"], env["B"]) == ({"value": "1=2"}, {"value": ""})
    assert env["HF_TOKEN"] == {"valueFrom": {"secretKeyRef": {"name": "dynamo-env-secrets", "key": "token"}}}
    other = made_of(desk, "--env-from-secret", "HF_TOKEN=token", "--env-secrets-name", "mine")
    assert other["spec"]["env"][-1]["valueFrom"]["secretKeyRef"]["name"] == "mine"


def test_dollars_are_left_alone_by_kubernetes(desk: Desk) -> None:
    arguments = ["--Store.gate=$(HOME)/$x", "--Store.ServiceArgs.envs.PAINT=$(HOME)", "--env", "P=a$$b$(HOME)"]
    made = made_of(desk, *arguments)
    assert made["spec"]["env"][0]["value"] == '{"Store":{"gate":"$$(HOME)/$$x"}}'
    assert main_of(components(made)["Store"])["env"][-1] == {"name": "PAINT", "value": "$$(HOME)"}
    assert made["spec"]["env"][-1] == {"name": "P", "value": "a$$$$b$$(HOME)"}


def test_a_variable_is_there_once(desk: Desk) -> None:
    made = made_of(desk, "--env", "A=1", "--env", "A=2", "--env", "DYN_SYSTEM_HOST=::", "--env-from-secret", "B=b")
    names = ["DYNAMO_GRAPH_CONFIG", "DYN_SYSTEM_HOST", "DYN_SYSTEM_PORT", DRAIN, "A", "B"]
    assert [one["name"] for one in made["spec"]["env"]] == names
    assert [one.get("value") for one in made["spec"]["env"][1:]] == ["::", "9090", "30", "2", None]


def test_a_model_that_lies_here_is_pointed_out(desk: Desk) -> None:
    (desk.directory / "models").mkdir()
    desk.patch.chdir(desk.directory)
    (desk.directory / "shop.yaml").write_text("Till: {model: models}\n")
    made_of(desk, "-f", "shop.yaml")
    assert "note: Till.model: models is a directory here and no part of the image" in desk.noted


def test_the_image_is_the_environments_or_the_builds(desk: Desk) -> None:
    tag = desk.build()
    images = []
    for name, value in (("DYNAMO_IMAGE", "example/base:2"), ("DYNAMO_REGISTRY", "registry.example/team/")):
        desk.patch.setenv(name, value)
        images.append(main_of(components(made_of(desk))["Door"])["image"])
    assert images == ["example/base:2", f"registry.example/team/{tag}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "Corner"], "-n Corner: must be lower-case letters"),
        (["-n", "c" * 60], "longer than Kubernetes' 63 characters"),
        (["--env", "A"], "--env A: must be NAME=VALUE"),
        (["--env", "A-B=1"], "'A-B' is not the name of an environment variable"),
        (["--env-from-secret", "A"], "--env-from-secret A: must be NAME=KEY"),
        (["--env", "A=1", "--env-from-secret", "A=a"], "--env A: --env-from-secret says it too"),
        (["--env", "DYNAMO_DRAIN_SECONDS=5m"], "DYNAMO_DRAIN_SECONDS '5m' is no number of seconds"),
        (["--env", "DYNAMO_DRAIN_SECONDS=inf"], "DYNAMO_DRAIN_SECONDS 'inf' is no number of seconds"),
        (["--Store.shelfs=1"], "--Store.shelfs: unknown key of Store 'shelfs'; did you mean shelves?"),
        (["--Shop.shelves=1"], "unknown service 'Shop'"),
        (["--Store.ServiceArgs.resources.gpu=many"], "Store: resources.gpu 'many' is not a number"),
        (["-f", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_a_wrong_order_is_said_in_one_line(desk: Desk, arguments: list[str], words: str) -> None:
    assert desk.run("deploy", desk.build(), "--dry-run", *arguments) == 2
    errors = [line for line in desk.noted.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert words in errors[0]


def test_what_the_code_overrides_is_the_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = graph_of("disagg.yaml")
    monkeypatch.setitem(info_of(graph.services["Frontend"]).kubernetes_overrides, "nodeSelector", {})
    with pytest.raises(ConfigError, match="Frontend: kubernetes_overrides takes entrypoint and cmd, not nodeSelector"):
        rendered("disagg.yaml")


def test_too_many_services_are_refused() -> None:
    build, graph = graph_of("disagg.yaml")
    settings = resolve(graph, read("disagg.yaml"))
    order = manifest.Order(build.tag, "i", {})
    many = {f"Service{index}": dataclasses.replace(settings["Frontend"], name=f"S{index}") for index in range(26)}
    with pytest.raises(ConfigError, match="26 services run; a DynamoGraphDeployment takes 25"):
        manifest.render(order, build, graph, many, name="a", namespace="b")


def test_addresses_are_the_operators() -> None:
    _, graph = graph_of("disagg.yaml")
    settings = resolve(graph, read("disagg.yaml"))
    pod = {"DYN_NAMESPACE": "ns-demo", "DYN_PARENT_DGD_K8S_NAME": "demo"}
    worker = pod | {"DYN_NAMESPACE_WORKER_SUFFIX": "abc"}
    assert placed(settings, {"DYN_NAMESPACE": "mine"}) == settings
    assert {one.namespace for one in placed(settings, pod).values()} == {"ns-demo"}
    assert {one.namespace for one in placed(settings, worker).values()} == {"ns-demo-abc"}
    assert (outer_namespace(pod), outer_namespace(worker)) == (None, "ns-demo")
    assert placed(settings, worker)["EncodeWorker"].component == settings["EncodeWorker"].component


@pytest.mark.parametrize("config", ["disagg.yaml", "cova.yaml"])
def test_those_who_read_an_arena_know_its_owners_address(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frontend is of no generation of workers, and its pictures are READ by all; what it READs is of any."""
    _, graph = graph_of(config)
    monkeypatch.setenv("DYN_PARENT_DGD_K8S_NAME", "demo")
    monkeypatch.setenv("DYN_NAMESPACE", "ns-demo")

    def process(name: str) -> Worker:
        monkeypatch.setenv("DYN_NAMESPACE_WORKER_SUFFIX", "" if name == "Frontend" else "abc")
        return Worker(graph, placed(resolve(graph, read(config))), name, 0)

    reads = [(name, owner) for name, one in graph.services.items() for owner in getattr(one, "reads", ())]
    found = {(name, owner) for name, owner in reads if owner in graph.services}
    assert {("EncodeWorker", "Frontend"), ("PrefillWorker", "EncodeWorker")} <= found
    for name, owner in found:
        its_own = process(owner)
        address = its_own.owner_addresses[owner]
        assert process(name).owner_addresses[owner] == address, (name, owner)
        assert address in its_own._own_addresses()
    assert process("PrefillWorker").owner_addresses["EncodeWorker"][0] == "ns-demo-abc"
    assert process("Frontend")._own_addresses() == [("ns-demo", "Frontend")]


@pytest.mark.parametrize("text", ["{", "[]", '{"Store": 3}'])
def test_a_configuration_in_the_environment_may_be_wrong(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{CONFIG}: "):
        configuration({CONFIG: text})


def test_an_order_is_read_back_from_its_manifest() -> None:
    made = rendered("cova.yaml")
    order = manifest.Order.of(copy.deepcopy(made))
    assert order.configuration == read("cova.yaml").values
    assert made["metadata"]["annotations"][manifest.BUILD] == order.build == "frontend:12345678"
    assert Path(order.image).name == "frontend:12345678"
