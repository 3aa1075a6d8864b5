# SPDX-License-Identifier: Apache-2.0
"""NATS out of reach for a while: what is asked meanwhile is refused, chat comes back by itself, and accepted jobs are
done, all by the same processes.

A server that is killed or stands still: `tests/hardening/test_faults.py`. Here it runs on. A network that swallows
everything tells nobody that what was sent is lost; one that refuses lets clients try again as often as they will.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from dynamo_epd.sdk.nats_server import MAX_PAYLOAD, nats_binary
from tests.acceptance.test_jobs import ended, patient
from tests.hardening.load import answered
from tests.hardening.report import Report
from tests.serving import Graph, at_rest, eventually, serve
from tests.toys.running import free_port

OUTAGES = {"late": 10.0, "lost": 10.0, "refused": 150.0}
"""Seconds by kind. Clients of NATS give up after 60 tries, two seconds apart, unless they are told not to. The long
outage is the kind in which a try takes no longer than that: where everything is swallowed each waits for its time."""
PATIENCE = 30.0
"""Seconds within which a refusal must be there while NATS is away: two workers' silences, and a machine that is busy.
The deadline of a request, five minutes, is longer than any outage here, and would tell nothing."""
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
        self._refuses = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, *, late: bool) -> None:
        """From now on nothing arrives, and nobody learns it. ``late``: TCP sends it again when the network is back, as
        after a short outage; else it is lost, as where a router on the way has forgotten the connections."""
        self._loses = not late
        self._passes.clear()

    def refuse(self) -> None:
        """Ends every connection, and from now on each new one at once."""
        self._refuses = True
        self._end_all()

    def mend(self) -> None:
        """Connections that have lost something are ended, new ones come through."""
        if self._loses:
            self._end_all()
        self._loses = self._refuses = False
        self._passes.set()

    def close(self) -> None:
        self._listener.close()

    def _end_all(self) -> None:
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it too

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(here,), daemon=True).start()

    def _connect(self, here: socket.socket) -> None:
        self._passes.wait()  # what opens a connection is sent again until it arrives
        if self._refuses:
            here.close()
            return
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


def status(graph: Graph) -> int:
    """Of a chat's reply. Fails where none comes: nothing hangs until NATS is back."""
    body = {"model": "tiny-llava", "messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 4}
    return httpx.post(f"{graph.url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code


@pytest.mark.parametrize("how", OUTAGES)
def test_chat_and_jobs_outlive_a_nats_that_is_out_of_reach(graph: Graph, network: Network, how: str) -> None:
    with Report(f"nats-away-{how}") as report:
        body = {"prompt": "a large red star on a blue background", "num_inference_steps": 40}
        ids = []
        for number in range(JOBS):
            reply = patient(graph, "POST", "/v1/images/jobs", json=body | {"seed": number})
            assert reply.status_code == 202, reply.text
            ids.append(str(reply.json()["id"]))
        eventually(lambda: answered(graph), "chat is answered before")
        processes = graph.all_workers()
        replies = Counter[int]()
        try:
            if how == "refused":
                network.refuse()
            else:
                network.swallow(late=how == "late")
            eventually(lambda: not answered(graph), "NATS is missed")
            end = time.monotonic() + OUTAGES[how]
            while time.monotonic() < end:
                replies[status(graph)] += 1
                time.sleep(1)
        finally:
            network.mend()  # the next kind of outage begins in peace, whatever became of this one
        begun = time.monotonic()
        eventually(lambda: answered(graph), "chat is answered", RECOVERED, pause=0.1)
        report.goal("chat is answered again within 5 s", True, f"{time.monotonic() - begun:.1f} s")
        report.goal("every chat was refused meanwhile", set(replies) == {503}, dict(replies))
        assert set(replies) == {503}, replies
        states = [ended(graph, id) for id in ids]
        done = [state["status"] for state in states]
        report.goal("accepted jobs are all done", done == ["completed"] * JOBS, done)
        assert done == ["completed"] * JOBS, states
        report.goal("the same processes answer", graph.all_workers() == processes, processes)
        assert graph.all_workers() == processes, graph.text[-3000:]
        assert (network.lost > 0) == (how == "lost")
        network.lost = 0
        at_rest(graph, 60)
