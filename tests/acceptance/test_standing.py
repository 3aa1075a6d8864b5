# SPDX-License-Identifier: Apache-2.0
"""What stands by itself, KServe's and compose's, as processes: the very commands of the manifests, on the real engines.

Only what has another place here is another: ports, hosts and paths of containers.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.pixels import pixels
from tests.pods import nats, placed
from tests.s3_server import CREDENTIALS, s3_server
from tests.serving import Graph, eventually, serve
from tests.test_compose import SERVICES, interpolated
from tests.toys.running import ROOT

KSERVE = ROOT / "deploy" / "kubernetes" / "kserve"
STAR = "a large red star on a blue background"
BOUND = 300.0
SECRETS = CREDENTIALS | {"NATS_AUTH_USERNAME": "graph", "NATS_AUTH_PASSWORD": "p0123e5"}


def arguments(words: list[str]) -> tuple[str, str, list[str]]:
    """Graph, configuration and the rest of a ``serve``. `Graph` adds a port of its own, which counts as the last."""
    command, graph, option, config, *more = words
    assert (command, option) == ("serve", "-f")
    return graph, config, more


def test_the_inference_service_is_live_healthy_and_predicts() -> None:
    service = yaml.safe_load((KSERVE / "inferenceservice.yaml").read_text())
    (container,) = service["spec"]["predictor"]["containers"]
    (mount,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "graph"]
    assert container["command"] == ["dynamo"]
    # a config map of the directory's files
    graph, config, more = arguments([word.replace(mount, str(KSERVE)) for word in container["args"]])
    with serve(graph, config, *more) as served:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            url = f"{served.url}{container[probe]['httpGet']['path']}"
            eventually(partial(answers, url), probe, 30)
        body = {"instances": [{"prompt": STAR, "seed": 1}]}
        reply = httpx.post(f"{served.url}/v1/models/tiny-image:predict", json=body, timeout=BOUND)
        assert reply.status_code == 200, reply.text[:500]
        (one,) = reply.json()["predictions"]
        assert one["seed"] == 1
        assert pixels(one["image"]["b64"]).shape == (64, 64, 3)


def test_composes_graph_is_healthy_and_keeps_its_pictures_in_the_bucket(tmp_path: Path) -> None:
    """On a NATS server by the file that compose mounts, which refuses whoever has not its password."""
    service: dict[str, Any] = SERVICES["graph-cpu"]
    with nats(tmp_path, SECRETS) as server, s3_server() as s3:
        places = {"http://127.0.0.1:9000": s3.endpoint}
        graph, config, more = arguments(shlex.split(placed(interpolated(service["command"], SECRETS), places)))
        environment = {name: interpolated(text, SECRETS) for name, text in service["environment"].items()}
        assert environment.keys() == {"NATS_SERVER", "DYN_SYSTEM_PORT", *SECRETS}
        del environment["DYN_SYSTEM_PORT"]  # `Graph` takes free ones
        environment["NATS_SERVER"] = server
        with serve(graph, config, *more, model=None, **environment) as served:
            assert served.nats() is None, "it uses the one that there is"
            healthy(served, service["healthcheck"]["test"])
            body = {"model": "tiny-image", "prompt": STAR, "size": "64x64", "response_format": "url"}
            reply = httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=BOUND)
            assert reply.status_code == 200, reply.text[:500]
            (one,) = reply.json()["data"]
            assert one["url"].startswith(f"{s3.endpoint}/{s3.bucket}/")
            assert pixels(httpx.get(one["url"], timeout=60).content).shape == (64, 64, 3)
            (listed,) = httpx.get(f"{served.url}/v1/images", timeout=BOUND).json()["data"]
            kept = [found["Key"] for found in s3.client().list_objects_v2(Bucket=s3.bucket)["Contents"]]
            assert any(listed["id"] in name for name in kept), kept


def answers(url: str) -> bool:
    return httpx.get(url, timeout=BOUND).status_code == 200


def healthy(served: Graph, test: list[str]) -> None:
    """By compose's own health check, which is asked again for a while: stages find each other after they are up."""
    kind, program, *words = test
    assert (kind, program) == ("CMD", "python")
    here = [placed(words[-1], {"127.0.0.1:8000": f"127.0.0.1:{served.port}"})]
    command = [sys.executable, *words[:-1], *here]
    eventually(lambda: subprocess.run(command, timeout=60, check=False).returncode == 0, "it is healthy", 30, 1.0)
