# SPDX-License-Identifier: Apache-2.0
"""Discovery through a real etcd: workers find each other, and one that is killed is forgotten."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_worker import eventually
from tests.toys.running import Served, free_port


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[str]:
    binary = shutil.which("etcd")
    assert binary is not None, "etcd is not installed: apt-get install etcd-server"
    client, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            binary,
            *("--data-dir", str(tmp_path / "etcd")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *(
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"default={peer}",
            ),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: _healthy(client), "etcd answers", 60)
        yield client
    finally:
        process.terminate()
        process.wait(20)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_a_graph_meets_through_etcd(etcd: str, tmp_path: Path) -> None:
    environment = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd}
    arguments = ("tests/toys/relay.py:Front", "--Back.ServiceArgs.workers=2")
    with Served(tmp_path / "state", *arguments, **environment) as served:
        served.wait_until_up()
        assert not list((tmp_path / "state").rglob("instances"))  # nothing fell back to files
        eventually(lambda: len(served.call()["instances"]) == 2, "both instances")
        results = served.call(*[{"number": 2}] * 4)["results"]
        assert sorted(one["worker"] for one in results) == [0, 0, 1, 1]
        os.kill(served.workers("Back")[0], signal.SIGKILL)
        served.wait_for(r"Back-0 is back")
        eventually(lambda: len(served.call()["instances"]) == 2, "the dead forgotten, the new one known", 60)
        assert all("error" not in one for one in served.call(*[{"number": 1}] * 4)["results"])
        assert served.stop() == 0
        assert served.leftovers() == []
