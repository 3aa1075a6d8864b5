# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 - `desk` is a fixture
"""Graphs as their manifests' own commands start them: a process for each component, with the variables of Dynamo's
operator, found through an API server, on the real engines.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dynamo_epd.http.auth import new_key
from dynamo_epd.sdk.deployment import builds, commands
from models import world
from tests.deploying import Desk, desk  # noqa: F401
from tests.kubernetes_server import KubernetesServer
from tests.manifests import DEPLOY
from tests.pixels import pixels
from tests.pods import Pod, nats, placed
from tests.questions import chat, data_url, user
from tests.s3_server import CREDENTIALS, S3Server, s3_server
from tests.serving import START_SECONDS
from tests.test_worker import eventually
from tests.toys.running import ROOT

TINY = ROOT / "models" / "tiny"
"""On a cluster a volume's path, or a hub's name."""
TOGETHER = {"Frontend", "Processor", "EncodeWorker", "DecodeWorker", "Planner"}
APART = TOGETHER | {"PrefillWorker"}
WHOLE = APART | {"ImageWorker", "EmbedWorker"}
STAR = "a large red star on a blue background"


@contextlib.contextmanager
def pods_of(
    cluster: KubernetesServer,
    stored: dict[str, Any],
    kubeconfig: str,
    nats: str,
    code: Path,
    secrets: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Pod]]:
    """A deployment's components that have replicas, by name, once the frontend is ready. Each is unready until its
    engine has loaded, answers on its probes then, and ends with 0."""
    components = [one for one in stored["spec"]["components"] if one.get("replicas", 1)]
    pods: dict[str, Pod] = {}
    try:
        for one in components:
            pods[one["name"]] = Pod(stored, one, kubeconfig, nats, code, secrets)
        waited_for = {name: pod for name, pod in pods.items() if name != "Frontend"}

        def up() -> bool:
            for name, pod in list(waited_for.items()):
                if pod.probe("startup") == 200:
                    assert pod.probe("liveness") == pod.probe("readiness") == 200, name
                    waited_for.pop(name).show(cluster)
            return not waited_for

        eventually(up, "every stage is up", START_SECONDS)
        eventually(lambda: pods["Frontend"].probe("readiness") == 200, "the frontend is ready", START_SECONDS)
        assert pods["Frontend"].probe("liveness") == 200
        for name, pod in pods.items():
            assert "\nprocess_start_time_seconds " in pod.metrics(), name
        pods["Frontend"].show(cluster)  # its Service has the labels too: others READ pictures from it
        yield pods
    finally:
        statuses = {name: pod.stop() for name, pod in pods.items()}
        for pod in pods.values():
            print(pod.output)
    assert set(statuses.values()) == {0}, statuses


@pytest.mark.parametrize(
    ("graph", "components", "models"),
    [
        ("agg", TOGETHER, {"Common": "llava"}),
        ("disagg", APART, {"Common": "llava"}),
        ("cova", WHOLE, {"Common": "llava", "ImageWorker": "image", "EmbedWorker": "t5"}),
    ],
)
def test_the_manifests_commands_are_the_graph(
    desk: Desk, graph: str, components: set[str], models: dict[str, str]
) -> None:
    """Together they see."""
    desk.patch.setattr(builds, "library_files", desk.library_files)
    build = builds.find(desk.build(graph=f"graphs.{graph}:Frontend", where=ROOT))
    overrides = [f"--{service}.model={TINY / model}" for service, model in models.items()]
    with KubernetesServer() as cluster, nats(desk.directory) as server:
        kubeconfig = str(cluster.kubeconfig(desk.directory / "kubeconfig"))
        desk.patch.setenv("KUBECONFIG", kubeconfig)
        desk.patch.setattr(commands, "POLL_SECONDS", 0.05)
        config = str(ROOT / "configs" / f"tiny-{graph}.yaml")
        arguments = ["-n", "demo", "-f", config, *overrides, "--Planner.no-operation=false"]
        assert desk.run("deploy", build.tag, *arguments) == 0, desk.noted
        with pods_of(cluster, cluster.deployment("demo"), kubeconfig, server, build.code) as pods:
            assert pods.keys() == components
            scene, picture = drawn()
            answers: list[Any] = []

            def answered() -> bool:
                answers.append(ask(pods["Frontend"], picture))
                return bool(answers[-1] == scene.caption)

            try:
                eventually(answered, "each stage has found the others", 60)
                assert "\nepd_request_duration_seconds_count{" in pods["Frontend"].metrics()
                if "ImageWorker" in components:
                    eventually(lambda: validated(pods["Frontend"], scene), "a picture is made and compared", 60)
            finally:
                print(answers[-1:])


def test_the_overlays_graph_answers_those_with_a_key_and_keeps_its_pictures_in_s3(desk: Desk) -> None:
    """As overlays/cpu has it, with its secrets, the NATS server of the base, and all that lies elsewhere here."""
    desk.patch.setattr(builds, "library_files", desk.library_files)
    build = builds.find(desk.build(graph="graphs.cova:Frontend", where=ROOT))
    desk.patch.delenv("XDG_STATE_HOME")  # a pod has none: its state lies in its home
    home, keys, signing = (desk.directory / name for name in ("home", "keys.yaml", "signing.key"))
    home.mkdir()
    key, line = new_key("client")
    keys.write_text(f"{line}\n")
    signing.write_text("0" * 96)
    for file in (keys, signing):
        file.chmod(0o440)
    secrets = CREDENTIALS | {"NATS_AUTH_USERNAME": "graph", "NATS_AUTH_PASSWORD": "p0123e5"}
    with KubernetesServer() as cluster, nats(desk.directory, secrets) as server, s3_server() as s3:
        graph = yaml.safe_load((DEPLOY / "overlays" / "cpu" / "graph.yaml").read_text())
        places = {
            "nats://nats:4222": server,
            "http://s3:9000": s3.endpoint,
            "https://pictures.example.org": s3.endpoint,
            "/etc/graph/keys.yaml": str(keys),
            "/etc/graph/signing.key": str(signing),
            "models/tiny": str(TINY),
            "/tmp": str(home),
        }
        graph["spec"] = json.loads(placed(json.dumps(graph["spec"]), places))
        cluster.namespaces.add(graph["metadata"]["namespace"])
        kubeconfig = str(cluster.kubeconfig(desk.directory / "kubeconfig", namespace=graph["metadata"]["namespace"]))
        with pods_of(cluster, graph, kubeconfig, server, build.code, secrets) as pods:
            assert pods.keys() == WHOLE - {"Planner"}, "KEDA's or nobody's, without the planner"
            keeps_in_s3(f"http://127.0.0.1:{pods['Frontend'].ports[8000]}", key, s3)
            scene, picture = drawn()
            bearer = f"Bearer {key}"
            eventually(lambda: ask(pods["Frontend"], picture, Authorization=bearer) == scene.caption, "it sees", 60)


def keeps_in_s3(url: str, key: str, s3: S3Server) -> None:
    """A picture by its address, with which anyone may fetch it from the bucket, and by its name, with the key."""
    body = {"model": "tiny-image", "prompt": STAR, "size": "64x64", "response_format": "url"}
    replies: list[httpx.Response] = []
    with httpx.Client(base_url=url, timeout=START_SECONDS) as client:
        refused = client.post("/v1/images/generations", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        client.headers["Authorization"] = f"Bearer {key}"

        def made() -> bool:
            replies.append(client.post("/v1/images/generations", json=body))
            return replies[-1].status_code == 200

        eventually(made, "a picture is made and stored", 60)
        (address,) = [one["url"] for one in replies[-1].json()["data"]]
        assert address.startswith(f"{s3.endpoint}/{s3.bucket}/")
        fetched = httpx.get(address, timeout=60)
        assert pixels(fetched.content).shape == (64, 64, 3)
        listed = client.get("/v1/images").json()["data"][0]
        assert client.get(f"/v1/images/{listed['id']}").content == fetched.content
        assert httpx.get(f"{url}/v1/images/{listed['id']}", timeout=60).status_code == 401
    kept = [one["Key"] for one in s3.client().list_objects_v2(Bucket=s3.bucket)["Contents"]]
    assert any(listed["id"] in name for name in kept), kept


def validated(front: Pod, scene: world.Scene) -> bool:
    """Whether the graph's own picture of a scene is like what was asked for."""
    body = json.dumps({"prompt": scene.caption, "seed": 1}).encode()
    url = f"http://127.0.0.1:{front.ports[8000]}/v1/validations"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return bool(json.load(reply)["data"][0]["similarity"] > 0.9)
    except urllib.error.HTTPError:
        return False


def drawn() -> tuple[world.Scene, str]:
    """A scene and its picture as a data URL."""
    chance = random.Random(4)
    scene = next(world.scenes(chance, held_out=False, pairs=0.0))
    file = io.BytesIO()
    world.draw(scene, chance).image.save(file, "PNG")
    return scene, data_url(file.getvalue())


def ask(front: Pod, picture: str, **headers: str) -> Any:
    """The answer, or an error's body."""
    body = chat(user("Describe the picture.", picture), max_tokens=32)
    request = urllib.request.Request(
        f"http://127.0.0.1:{front.ports[8000]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.read()
