# SPDX-License-Identifier: Apache-2.0
"""`dynamo serve` as a process of its own, with its own state, its lines, and a look at what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """One that nobody uses now, and that no connection is given by chance: Linux takes those from 32768 on. Up to there
    they are system ports too: the runtime reads DYN_SYSTEM_PORT as a signed number of 16 bits."""
    while True:
        port = random.randrange(10000, 20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def clean_environment() -> dict[str, str]:
    """This process' environment without what names a graph, and without what an engine in it has set for itself."""
    prefixes = ("DYN_", "DYNAMO_", "VLLM_")
    names = ("NATS_SERVER", "CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_DISABLE")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes) and name not in names}


MEANT_TO_STAY = frozenset({"jetstream", "store", "signing.key"})
"""Of the state: jobs that were accepted, pictures that were made, and what signs their addresses outlive the graph."""


class Served:
    """``with Served(state_dir, graph, *arguments) as served``. ``lines`` grows with what it prints, errors included.

    ``within`` is a command that becomes the one that follows it, as ``env`` does.
    """

    def __init__(self, state: Path, *arguments: str, within: Sequence[str] = (), **environment: str):
        self.state = state
        self.port = free_port()
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "dynamo_epd.sdk.cli", "serve", *arguments, "-p", str(self.port)],
            cwd=ROOT,
            env=clean_environment() | {"XDG_STATE_HOME": str(state)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self.lines.append("<end>")
            self._changed.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """The first line that matches. Fails when the command ends, or nothing comes, before."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(pattern) or "<end>" in self.lines, timeout)
            match = self._find(pattern)
        assert match, f"no line matches {pattern!r} in:\n{self.text}"
        return match

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next((match for line in self.lines if (match := re.search(pattern, line))), None)

    def wait_until_up(self) -> Served:
        self.wait_for(r"^http://|is up$")
        return self

    def post(self, route: str, body: Any, timeout: float = 60) -> str:
        """The reply's text, whatever its status."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{route}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as refused:
            return str(refused.read().decode())

    def call(self, *asks: dict[str, Any], **order: Any) -> dict[str, Any]:
        """Lets the relay graph's Front make calls."""
        found: dict[str, Any] = json.loads(self.post("call", {"asks": list(asks), **order}))
        return found

    def workers(self, service: str) -> dict[int, int]:
        """Worker index → pid."""
        return self.all_workers().get(service, {})

    def all_workers(self) -> dict[str, dict[int, int]]:
        """Service → worker index → pid."""
        found: dict[str, dict[int, int]] = {}
        for pid in self.processes():
            words = _read_words(pid, "cmdline")
            if "dynamo_epd.sdk.worker" in words:
                service, index = (words[words.index(name) + 1] for name in ("--service-name", "--worker-index"))
                found.setdefault(service, {})[int(index)] = pid
        return found

    def processes(self) -> list[int]:
        """Every live process with our state directory in its environment, the command's own included."""
        marker = f"XDG_STATE_HOME={self.state}"
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if marker in _read_words(pid, "environ")]

    def leftovers(self) -> list[str]:
        """Processes, state and sockets that are still there."""
        left = [f"process {pid}: {' '.join(_read_words(pid, 'cmdline'))}" for pid in self.processes()]
        files = [path for path in self.state.rglob("*") if path.is_file() and path.name != "lock"]
        left += [str(path) for path in files if not MEANT_TO_STAY.intersection(path.relative_to(self.state).parts)]
        left += [str(path) for path in Path(tempfile.gettempdir()).glob(f"dynamo-{self.process.pid}-*")]
        return left

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def stop(self) -> int:
        """Ctrl-C, and the exit status."""
        self.signal(signal.SIGINT)
        return self.wait()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _read_words(pid: int, file: str) -> list[str]:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return []
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")
    except (OSError, IndexError):
        return []
