# SPDX-License-Identifier: Apache-2.0
"""Whose server and whose discovery it is, where several processes have, or had, one. With graphs: test_serve.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_epd.sdk import nats_server
from dynamo_epd.sdk.nats_server import LocalNats, _free_port, discovery_dir, state_dir


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(nats_server, "_free_port", lambda: (4222, None))
    return state_dir()


def test_nobody_else_enters_where_workers_find_each_other(state: Path) -> None:
    """Who writes there is a worker of the graph."""
    nats = LocalNats(join=False)
    assert nats.discovery.is_relative_to(state)
    assert discovery_dir("nats://elsewhere:4222").is_relative_to(state)
    assert state.stat().st_mode & 0o777 == nats.discovery.parent.stat().st_mode & 0o777 == 0o700
    nats.close()


def test_a_dead_server_of_this_processs_number_is_no_other_one(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container each supervisor is process 1, also the one before, which was killed."""

    def wait(_: float) -> None:
        raise AssertionError("nobody is to be waited for")

    monkeypatch.setattr(nats_server.time, "sleep", wait)
    left = state / f"nats-{os.getpid()}"
    left.mkdir()
    (left / "old").touch()
    record = {"url": "nats://127.0.0.1:1", "name": f"dynamo-{os.getpid()}", "pid": os.getpid(), "password": "x"}
    (state / "nats.json").write_text(json.dumps(record))
    nats = LocalNats(join=True)
    assert nats.owned
    assert [path.name for path in left.iterdir()] == ["nats.conf"]
    assert json.loads((state / "nats.json").read_text())["url"] == nats.url
    nats.close()
    assert not left.exists()


def served_by(pid: int) -> LocalNats:
    """A server of another process with a worker in discovery."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "getpid", lambda: pid)
        patched.setattr(nats_server, "_answers", lambda _: False)
        nats = LocalNats(join=False)
    nats.discovery.mkdir()
    (nats.discovery / "worker").touch()
    return nats


def test_what_a_dead_graph_has_left_is_removed_and_a_live_ones_discovery_stays_though_both_had_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    live, dead = served_by(os.getppid()), served_by(gone.pid)
    assert live.url == dead.url
    monkeypatch.setattr(nats_server, "_answers", lambda _: False)
    nats = LocalNats(join=False)
    assert not dead.discovery.parent.exists()
    assert (live.discovery / "worker").exists()
    for one in (nats, live, dead):
        one.close()


def test_who_joins_a_server_joins_its_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    nats = LocalNats(join=False)
    monkeypatch.setattr(nats_server, "_answers", lambda _: True)
    joined = LocalNats(join=True)
    assert not joined.owned
    assert joined.discovery == nats.discovery
    joined.close()
    assert nats.discovery.parent.exists()
    nats.close()


def test_graphs_that_start_at_one_moment_choose_two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither's server listens yet, and each may have a state directory of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        usual = probe.getsockname()[1]
    monkeypatch.setattr(nats_server, "DEFAULT_PORT", usual)
    first, claim = _free_port()
    second, nothing = _free_port()
    assert claim is not None and nothing is None
    assert first == usual != second
    claim.close()
    again, claim = _free_port()
    assert again == usual
    assert claim is not None
    claim.close()


@pytest.mark.parametrize(("supervisor", "printed"), [("the parent", "started\n"), ("gone", "")])
def test_a_server_whose_supervisor_has_died_before_it_could_tell_is_not_started(supervisor: str, printed: str) -> None:
    parent = os.getpid() if supervisor == "the parent" else os.getppid()
    command = [sys.executable, "-c", nats_server._EXEC_WITH_PARENT, "/bin/echo", "started"]
    environment = os.environ | {"DYNAMO_SUPERVISOR_PID": str(parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == printed
    assert ran.returncode == (0 if printed else 1)
