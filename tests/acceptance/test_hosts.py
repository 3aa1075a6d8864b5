# SPDX-License-Identifier: Apache-2.0
"""More than one host: every stage in a network namespace of its own, with an address of its own.

NATS and etcd stand on one host, frontend and processor on another, encode, prefill and decode on one each. Nothing is
shared but the network: messages, embeddings and KV caches all cross it. Needs root, iproute2 and etcd-server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.questions import Said, ask_all, assert_same, question
from tests.reference import Reference
from tests.serving import START_SECONDS, untrained
from tests.toys.running import ROOT, clean_environment

HUB = "10.77.0.1"
STAGES = {
    "front": ("Processor", "Frontend"),
    "encode": ("EncodeWorker",),
    "prefill": ("PrefillWorker",),
    "decode": ("DecodeWorker",),
}
ASK = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from tests.questions import post
bodies = json.load(sys.stdin)
with ThreadPoolExecutor(4) as pool:
    replies = list(pool.map(lambda body: post("http://127.0.0.1:8000/v1/chat/completions", body, timeout=300), bodies))
json.dump(replies, sys.stdout)
"""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Hosts:
    """Namespaces on one bridge, 10.77.0.0/24; the bridge's own host is ``hub``."""

    def __init__(self) -> None:
        self._prefix = f"epd{os.getpid()}"
        self._made: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def name(self, host: str) -> str:
        return f"{self._prefix}{host}"

    def make(self) -> None:
        assert shutil.which("ip"), "iproute2 is not installed: apt-get install iproute2"
        self._add("hub")
        ip("-n", self.name("hub"), "link", "add", "br0", "type", "bridge")
        ip("-n", self.name("hub"), "addr", "add", f"{HUB}/24", "dev", "br0")
        ip("-n", self.name("hub"), "link", "set", "br0", "up")
        for number, host in enumerate(STAGES, 2):
            self._add(host)
            ends = (f"v{host}", "netns", self.name("hub")), ("eth0", "netns", self.name(host))
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            ip("-n", self.name("hub"), "link", "set", f"v{host}", "master", "br0", "up")
            ip("-n", self.name(host), "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", self.name(host), "link", "set", "eth0", "up")

    def _add(self, host: str) -> None:
        ip("netns", "add", self.name(host))
        self._made.append(host)
        ip("-n", self.name(host), "link", "set", "lo", "up")

    def start(self, host: str, log: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name(host), *command],
            cwd=ROOT,
            env=clean_environment() | environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def run(self, host: str, *command: str, given: str = "") -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name(host), *command],
            cwd=ROOT,
            input=given,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def close(self) -> None:
        for process in reversed(self._processes):  # the stages first: leaving, they tell etcd
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        for host in self._made:
            ip("netns", "del", self.name(host))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    home = tmp_path_factory.mktemp("hosts")
    hosts = Hosts()
    try:
        hosts.make()
        _start(hosts, home)
        yield hosts
    finally:
        hosts.close()


def _start(hosts: Hosts, home: Path) -> None:
    etcd = shutil.which("etcd")
    assert etcd, "etcd is not installed: apt-get install etcd-server"
    clients, peers = f"http://{HUB}:2379", f"http://{HUB}:2380"
    hosts.start(
        "hub",
        home / "etcd.log",
        *(etcd, "--data-dir", str(home / "etcd"), "--listen-client-urls", clients, "--advertise-client-urls", clients),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
        *("--initial-cluster", f"default={peers}"),
    )
    nats = home / "nats.conf"
    nats.write_text(f'listen: {HUB}:4222\nmax_payload: 8388608\njetstream {{store_dir: "{home}/js"}}\n')
    hosts.start("hub", home / "nats.log", str(Path(sys.executable).parent / "nats-server"), "-c", str(nats))
    environment = {
        "NATS_SERVER": f"nats://{HUB}:4222",
        "DYN_DISCOVERY_BACKEND": "etcd",
        "ETCD_ENDPOINTS": clients,
    }
    command = (
        sys.executable,
        "-m",
        "dynamo_epd.sdk.cli",
        "serve",
        "graphs.disagg:Frontend",
        "-f",
        "configs/tiny-disagg.yaml",
        f"--Common.model={untrained('llava')}",
    )
    for host, services in STAGES.items():
        for service in services:
            hosts.start(
                host,
                home / f"{service}.log",
                *(*command, "--service-name", service, "-p", "8000"),
                **{**environment, "XDG_STATE_HOME": str(home / host)},
            )
    _wait(hosts, home)


def _wait(hosts: Hosts, home: Path) -> None:
    end = time.monotonic() + START_SECONDS
    last: Any = None
    while True:
        try:
            last = json.loads(hosts.run("front", "curl", "-s", "-m", "5", "http://127.0.0.1:8000/health"))
            if last["status"] == "ready":
                return
        except (AssertionError, json.JSONDecodeError) as error:
            last = error
        logs = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in sorted(home.glob("*.log")))
        assert time.monotonic() < end, f"{last}\n{logs}"
        time.sleep(0.5)


def test_stages_on_hosts_of_their_own_give_the_same_answers(hosts: Hosts, reference: Reference):
    questions = [question(seed) for seed in range(20)]
    expected = ask_all(reference.url, questions, model="reference")
    replies = json.loads(hosts.run("front", sys.executable, "-c", ASK, given=json.dumps(questions)))
    assert_same(expected, [Said.of(reply) for reply in replies])
