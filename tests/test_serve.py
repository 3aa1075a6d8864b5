# SPDX-License-Identifier: Apache-2.0
"""`dynamo serve` through its own door: what it prints, whom it keeps alive, how it ends, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.test_worker import eventually
from tests.toys.running import ROOT, Served

RELAY = "tests/toys/relay.py:Front"


def dynamo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo_epd.sdk.cli", *arguments],
        cwd=ROOT,
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_graph_of_the_old_sdk_runs_unchanged(tmp_path: Path) -> None:
    config = tmp_path / "old.yaml"
    config.write_text(
        "Common:\n  message: shared\n"
        "Frontend:\n  greeting: hello\n"
        "Middle:\n  common-configs: [message]\n"
        "Backend:\n  message: ground\n  engine-depth: 3\n  engine-eager: true\n  other: 1\n"
    )
    with Served(tmp_path / "state", "tests.toys.old_graph:Frontend", "-f", str(config)) as served:
        served.wait_until_up()
        assert len(served.workers("Backend")) == 2  # the decorator's count
        reply = served.post("generate", {"text": "a b"})
        arguments = "--depth 3 --eager"
        assert reply == f"hello Middle: Backend: a {arguments}\nhello Middle: Backend: b-shared-ground {arguments}\n"
        assert "422" not in served.text
        printed = [line for line in served.lines if "ready" in line or line.startswith("http")]
        assert {line.split()[0] for line in printed[:-1]} == {"Frontend", "Middle", "Backend"}
        assert printed[-1] == f"http://127.0.0.1:{served.port}"
        assert served.stop() == 0
        assert served.leftovers() == []


def test_ctrl_c_finishes_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        outcome: list[dict[str, object]] = []
        ask = {"number": 6, "pause": 0.3}
        order = {"service": "middle", "endpoint": "relay"}
        calling = threading.Thread(target=lambda: outcome.extend(served.call(ask, **order)["results"]))
        calling.start()
        time.sleep(0.8)
        assert served.stop() == 0
        calling.join()
        assert outcome[0]["ticks"] == list(range(6))
        assert served.leftovers() == []


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        calling = threading.Thread(target=lambda: _ignoring_loss(served, {"mode": "hang"}), daemon=True)
        calling.start()
        time.sleep(0.5)
        served.signal(signal.SIGINT)
        served.wait_for("once more to end at once")
        served.signal(signal.SIGINT)
        assert served.wait(20) == 1
        assert served.leftovers() == []


def _ignoring_loss(served: Served, ask: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        served.call(ask)


def test_a_terminal_that_is_gone_does_not_keep_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynamo_epd.sdk.cli", "serve", RELAY, "-p", "0"]
    environment = dict(os.environ) | {"XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("http://") for line in process.stdout)
        process.stdout.close()
        process.send_signal(signal.SIGHUP)
        process.wait(60)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_terminal_that_is_held_does_not_keep_it(tmp_path: Path) -> None:
    """Ctrl-S, a connection that stalls: nobody reads, and what is printed finds no room."""
    command = [sys.executable, "-m", "dynamo_epd.sdk.cli", "serve", RELAY, "-p", "0"]
    environment = dict(os.environ) | {"XDG_STATE_HOME": str(tmp_path)}
    theirs, ours = os.pipe()
    with open(theirs) as read, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=ours) as process:
        assert any(line.startswith("http://") for line in read)
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(ours, b"x" * 4096)
        os.set_blocking(ours, True)
        os.close(ours)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_workers_and_nats_die_with_the_command_however_it_goes(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        assert len(served.processes()) >= 5
        served.signal(signal.SIGKILL)
        served.process.wait()
        eventually(lambda: served.processes() == [], "no process of it is left", 30)
    with Served(tmp_path, RELAY) as again:  # what it could not remove does not confuse the next one
        again.wait_until_up()
        assert "error" not in again.call({"number": 1})["results"][0]
        assert again.stop() == 0
        assert again.leftovers() == []


def test_the_next_start_removes_what_one_that_was_killed_has_left(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        for pid in [served.process.pid, *served.processes()]:  # at once: none can leave discovery
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        served.process.wait()
        eventually(lambda: served.processes() == [], "no process of it is left", 30)
    left = tmp_path / "dynamo" / f"nats-{served.process.pid}" / "discovery"
    assert [path for path in left.rglob("*") if path.is_file()]
    with Served(tmp_path, RELAY) as again:
        again.wait_until_up()
        assert again.stop() == 0
        assert again.leftovers() == []


def test_a_child_of_a_worker_goes_with_it(tmp_path: Path) -> None:
    with Served(tmp_path, "tests/toys/failing.py:Forking") as served:
        served.wait_until_up()
        worker = os.getpgid(served.workers("Forking")[0])
        forked = [pid for pid in served.processes() if pid != worker and os.getpgid(pid) == worker]
        assert len(forked) == 1
        os.kill(worker, signal.SIGKILL)
        served.wait_for("is back")
        assert forked[0] not in served.processes()
        assert served.stop() == 0
        assert served.leftovers() == []


def test_a_killed_worker_leaves_no_semaphore(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with Served(tmp_path / "state", "tests/toys/failing.py:Locking", TOLD=str(told)) as served:
        served.wait_until_up()
        semaphore = Path("/dev/shm") / f"sem.{told.read_text().split()[0].removeprefix('/')}"
        assert semaphore.exists()
        os.kill(served.workers("Locking")[0], signal.SIGKILL)
        served.wait_for("is back")
        eventually(lambda: not semaphore.exists(), "the semaphore is gone")
        assert served.stop() == 0
        assert not (Path("/dev/shm") / f"sem.{told.read_text().split()[1].removeprefix('/')}").exists()


def test_one_that_keeps_dying_ends_the_graph_with_its_last_error(tmp_path: Path) -> None:
    with Served(tmp_path, "tests/toys/failing.py:Root") as served:
        assert served.wait() == 1
        assert served.text.count("Broken-0 died (exit status 1); starting it again") == 2
        assert "RuntimeError: the tower cannot be loaded" in served.text
        assert "error: Broken-0 keeps dying (exit status 1)" in served.lines
        assert served.leftovers() == []


@pytest.mark.parametrize("service", ["Misconfigured", "Halfway"])
def test_a_configuration_that_a_worker_refuses_is_said_once_without_another_try(tmp_path: Path, service: str) -> None:
    with Served(tmp_path, f"tests/toys/failing.py:{service}") as served:
        assert served.wait() == 2
        assert served.text.count("model: no such directory") == 1
        assert "starting it again" not in served.text


def test_a_worker_says_that_it_is_ready_and_that_it_is_not_alive(tmp_path: Path) -> None:
    with Served(tmp_path, "tests/toys/failing.py:Ailing", "-v") as served:
        served.wait_for(r"asked 3 times")
        assert "Ailing ready" not in served.text.partition("asked 3 times")[0]
        served.wait_for(r"^Ailing ready")
        served.wait_for(r"Ailing-0 died \(exit status 1\); starting it again")
        served.wait_for(r"Ailing is not alive any more")
        served.wait_for(r"Ailing-0 is back")
        assert served.stop() == 0


def test_a_start_that_stands_still_is_shown_and_made_again(tmp_path: Path) -> None:
    settings = {"DYNAMO_START_SECONDS": "8", "MARKER": str(tmp_path / "marker")}
    with Served(tmp_path, "tests/toys/failing.py:Dawdling", **settings) as served:
        served.wait_for(r"^Dawdling-0 has not come up in 8 s; where it stands:")
        served.wait_for(r"failing.py\", line \d+ in __init__")
        served.wait_for(r"Dawdling-0 died \(signal 9\); starting it again")
        served.wait_for(r"^Dawdling ready")
        assert served.stop() == 0


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    with Served(tmp_path, RELAY) as served:
        served.wait_until_up()
        ran = dynamo("serve", RELAY, "-p", str(served.port), XDG_STATE_HOME=str(tmp_path / "other"))
        assert ran.returncode == 2
        assert ran.stderr.count(f"cannot open http://127.0.0.1:{served.port}: Address already in use") == 1
        assert served.process.poll() is None


def test_single_services_in_terminals_of_their_own_meet(tmp_path: Path) -> None:
    with (
        Served(tmp_path, RELAY, "--service-name", "Back") as back,
        Served(tmp_path, RELAY, "--service-name", "Middle") as middle,
        Served(tmp_path, RELAY, "--service-name", "Front") as front,
    ):
        for one in (back, middle, front):
            one.wait_until_up()
        order = {"service": "middle", "endpoint": "relay"}
        eventually(lambda: "error" not in front.call({"number": 2}, **order)["results"][0], "the three together")
        assert sum(len(one.lines) > 0 for one in (back, middle, front)) == 3
        first = next(one for one in (back, middle, front) if "nats-server" in str(_commands(one)))
        for one in (front, middle, back):
            if one is not first:
                assert one.stop() == 0
        assert first.stop() == 0
        assert first.leftovers() == []


def _commands(served: Served) -> list[str]:
    listed = subprocess.run(["ps", "-o", "args=", "--ppid", str(served.process.pid)], capture_output=True, text=True)
    return listed.stdout.splitlines()


def test_dependencies_can_be_served_elsewhere(tmp_path: Path) -> None:
    moved = "--Back.ServiceArgs.dynamo.namespace=far"
    with Served(tmp_path, RELAY, "--service-name", "Back", moved) as back:
        back.wait_until_up()
        with Served(tmp_path, RELAY, "--service-name", "Front", "--depends", "Back=far/Back") as front:
            front.wait_until_up()
            eventually(lambda: "error" not in front.call({"number": 1})["results"][0], "Back in its other namespace")


def test_dry_run_prints_what_would_run_and_starts_nothing(tmp_path: Path) -> None:
    command = (
        "serve",
        RELAY,
        "--dry-run",
        "--Back.events=x",
        "--Back.ServiceArgs.workers=2",
        "--Planner.no-operation=true",
    )
    ran = dynamo(*command, XDG_STATE_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    printed = json.loads(ran.stdout)
    assert printed["services"]["Back"]["events"] == "x"
    assert printed["services"]["Back"]["ServiceArgs"]["workers"] == 2
    assert printed["environment"]["DYN_DISCOVERY_BACKEND"] == "file"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Back:\n  evnts: x\n", "c.yaml:2: unknown key of Back 'evnts'; did you mean events?"),
        ("Bck:\n  events: x\n", "c.yaml:1: unknown service 'Bck'; did you mean Back?"),
        ("Back:\n  events: x\n  fail-start: maybe\n", "c.yaml:3: Back.fail-start: Expected `bool`, got `str`"),
        ("Back: [\n", "c.yaml:2: while parsing a flow node"),
    ],
)
def test_a_wrong_configuration_names_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    ran = dynamo("serve", RELAY, "-f", str(tmp_path / "c.yaml"))
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("port", "message"), [("32767", "take the ports to 32768"), ("high", "must be a number")])
def test_a_system_port_that_no_worker_could_read_is_refused(port: str, message: str) -> None:
    ran = dynamo("serve", RELAY, "--Back.ServiceArgs.workers=0", "--dry-run", DYN_SYSTEM_PORT=port)
    assert ran.returncode == 2
    assert message in ran.stderr


def test_an_import_error_in_the_users_module_shows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import not_installed_anywhere\n")
    ran = dynamo("serve", "mine:Front", "--working-dir", str(tmp_path))
    assert ran.returncode == 2
    assert "not_installed_anywhere" in ran.stderr
    assert "mine.py" in ran.stderr


def test_env_names_versions_gpus_plugins_and_nats() -> None:
    ran = dynamo("env")
    assert ran.returncode == 0
    facts = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert facts["ai-dynamo-runtime"] == "1.6.1"
    assert "UCX" in facts["nixl plugins"]
    assert facts["nats-server"].startswith("v")
    assert facts["gpus"] == "none" or facts["gpus"][0].isdigit() or facts["gpus"].startswith("GPU-")
