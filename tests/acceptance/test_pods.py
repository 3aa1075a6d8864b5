# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 - `desk` is a fixture
"""Graphs as their manifests' own commands start them: a process for each component, with the variables of Dynamo's
operator, found through an API server, on the real engines.
"""

from __future__ import annotations

import io
import json
import random
import urllib.error
import urllib.request
from typing import Any

import pytest

from dynamo_epd.sdk.deployment import builds, commands
from models import world
from tests.deploying import Desk, desk  # noqa: F401
from tests.kubernetes_server import KubernetesServer
from tests.pods import Pod, nats
from tests.questions import chat, data_url, user
from tests.serving import START_SECONDS
from tests.test_worker import eventually
from tests.toys.running import ROOT

TINY = ROOT / "models" / "tiny"
"""On a cluster a volume's path, or a hub's name."""
STAGES = {"Frontend", "Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker", "Planner"}


@pytest.mark.parametrize(
    ("graph", "more", "models"),
    [
        ("disagg", set(), {"Common": "llava"}),
        ("cova", {"ImageWorker", "EmbedWorker"}, {"Common": "llava", "ImageWorker": "image", "EmbedWorker": "t5"}),
    ],
)
def test_the_manifests_commands_are_the_graph(desk: Desk, graph: str, more: set[str], models: dict[str, str]) -> None:
    """Each is unready until its engine has loaded, answers on its probes then, and ends with 0; together they see."""
    desk.patch.setattr(builds, "library_files", desk.library_files)
    build = builds.find(desk.build(graph=f"graphs.{graph}:Frontend", where=ROOT))
    overrides = [f"--{service}.model={TINY / model}" for service, model in models.items()]
    with KubernetesServer() as cluster, nats(desk.directory / "nats.log") as server:
        kubeconfig = str(cluster.kubeconfig(desk.directory / "kubeconfig"))
        desk.patch.setenv("KUBECONFIG", kubeconfig)
        desk.patch.setattr(commands, "POLL_SECONDS", 0.05)
        config = str(ROOT / "configs" / f"tiny-{graph}.yaml")
        arguments = ["-n", "demo", "-f", config, *overrides, "--Planner.no-operation=false"]
        assert desk.run("deploy", build.tag, *arguments) == 0, desk.noted
        stored = cluster.deployment("demo")
        pods = {one["name"]: Pod(stored, one, kubeconfig, server, build.code) for one in stored["spec"]["components"]}
        answers: list[Any] = []
        try:
            assert pods.keys() == STAGES | more
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
            pods["Frontend"].show(cluster)  # its Service has the labels too: others READ pictures from it
            scene, picture = drawn()

            def answered() -> bool:
                answers.append(ask(pods["Frontend"], picture))
                return bool(answers[-1] == scene.caption)

            eventually(answered, "each stage has found the others", 60)
            if more:
                eventually(lambda: validated(pods["Frontend"], scene), "a picture is made, described and compared", 60)
        finally:
            print(answers[-1:])
            statuses = {name: pod.stop() for name, pod in pods.items()}
            for pod in pods.values():
                print(pod.output)
    assert set(statuses.values()) == {0}, statuses


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


def ask(front: Pod, picture: str) -> Any:
    """The answer, or an error's body."""
    body = chat(user("Describe the picture.", picture), max_tokens=32)
    request = urllib.request.Request(
        f"http://127.0.0.1:{front.ports[8000]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.read()
