# SPDX-License-Identifier: Apache-2.0
"""NATS behind a network that swallows everything for a while: chat comes back by itself, and accepted jobs are done.

A server that is killed or stands still: `tests/hardening/test_faults.py`. Here it runs on, and nobody is told that what
was sent to it is lost.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dynamo_epd.sdk.nats_server import MAX_PAYLOAD, nats_binary
from tests.acceptance.test_jobs import ended, patient
from tests.hardening.load import answered
from tests.hardening.report import Report
from tests.serving import Graph, at_rest, eventually, serve
from tests.toys.running import free_port

AWAY = 10.0
RECOVERED = 5.0
"""Seconds within which chat must be answered again once the network is back."""
JOBS = 8


class Network:
    """A TCP proxy before a port of this machine: the way to it, on which everything can get lost."""

    def __init__(self, port: int):
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.lost = 0
        """Bytes."""
        self._passes = threading.Event()
        self._passes.set()
        self._loses = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, *, late: bool) -> None:
        """From now on nothing arrives, and nobody learns it. ``late``: TCP sends it again when the network is back, as
        after a short outage; else it is lost, as where a router on the way has forgotten the connections."""
        self._loses = not late
        self._passes.clear()

    def mend(self) -> None:
        """Connections that have lost something are ended, new ones come through."""
        if self._loses:
            with self._lock:
                for one in self._open:
                    with suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it too
        self._loses = False
        self._passes.set()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(here,), daemon=True).start()

    def _connect(self, here: socket.socket) -> None:
        self._passes.wait()  # what opens a connection is sent again until it arrives
        with suppress(OSError):
            there = socket.create_connection(("127.0.0.1", self._to), 10)
            there.settimeout(None)
            with self._lock:
                self._open |= {here, there}
            back = threading.Thread(target=self._pass_on, args=(there, here), daemon=True)
            back.start()
            self._pass_on(here, there)
            back.join()
            with self._lock:
                self._open -= {here, there}
            there.close()
        here.close()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._loses:
                    with self._lock:
                        self.lost += len(data)
                else:
                    self._passes.wait()
                    sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def nats_server(directory: Path) -> Iterator[int]:
    """A server with JetStream, and our own one's longest message; its port."""
    port, config, log = free_port(), directory / "nats.conf", directory / "nats.log"
    config.write_text(
        f'listen: 127.0.0.1:{port}\nmax_payload: {MAX_PAYLOAD}\njetstream {{ store_dir: "{directory}/jetstream" }}\n'
    )
    with log.open("w") as file:
        process = subprocess.Popen([nats_binary(), "-c", str(config)], stdout=file, stderr=file)
    try:
        eventually(lambda: "Server is ready" in log.read_text(), "nats-server")
        yield port
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="away"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def network(directory: Path) -> Iterator[Network]:
    with nats_server(directory) as port:
        network = Network(port)
        yield network
        network.close()


@pytest.fixture(scope="module")
def graph(network: Network, directory: Path) -> Iterator[Graph]:
    with serve(
        "graphs.cova:Frontend",
        "configs/tiny-cova.yaml",
        NATS_SERVER=f"nats://127.0.0.1:{network.port}",
        DYN_FILE_KV=str(directory / "discovery"),
    ) as served:
        yield served
        network.mend()  # a drain would wait for it


@pytest.mark.parametrize("how", ["late", "lost"])
def test_chat_and_jobs_outlive_a_network_that_swallows_everything(graph: Graph, network: Network, how: str) -> None:
    with Report(f"nats-away-{how}") as report:
        body = {"prompt": "a large red star on a blue background", "num_inference_steps": 40}
        ids = []
        for number in range(JOBS):
            reply = patient(graph, "POST", "/v1/images/jobs", json=body | {"seed": number})
            assert reply.status_code == 202, reply.text
            ids.append(str(reply.json()["id"]))
        eventually(lambda: answered(graph), "chat is answered before")
        network.swallow(late=how == "late")
        eventually(lambda: not answered(graph), "NATS is missed")
        time.sleep(AWAY)
        assert not answered(graph), "something came through"
        network.mend()
        begun = time.monotonic()
        eventually(lambda: answered(graph), "chat is answered", RECOVERED, pause=0.1)
        report.goal("chat is answered again within 5 s", True, f"{time.monotonic() - begun:.1f} s")
        states = [ended(graph, id) for id in ids]
        done = [state["status"] for state in states]
        report.goal("accepted jobs are all done", done == ["completed"] * JOBS, done)
        assert done == ["completed"] * JOBS, states
        assert (network.lost > 0) == (how == "lost")
        network.lost = 0
        at_rest(graph, 60)
