# SPDX-License-Identifier: Apache-2.0
"""A running graph through its door: `dynamo scale` by hand, and what the socket takes and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd.sdk.control import LINE_BYTES, ControlError, ask
from tests.test_worker import eventually
from tests.toys.calling import Callers, busy_worker, door
from tests.toys.calling import ready as counts
from tests.toys.running import ROOT, Served

GRAPH = "tests/toys/scaled.py:Front"


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    with Served(home, GRAPH, "--Planner.stages.Calm.max=2", "--Calm.fail-from=1") as graph:
        yield graph.wait_until_up()


def scale(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynamo_epd.sdk.cli", "scale", *arguments],
        cwd=ROOT,
        env=dict(os.environ) | {"XDG_STATE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def resized(home: Path, service: str, before: int, after: int) -> None:
    """By `dynamo scale`, which waits until it is so and says it."""
    ran = scale(home, GRAPH, f"{service}={after}")
    said = f"{service}: {before} → {after} workers\n{service}: {after} ready\n"
    assert (ran.returncode, ran.stdout) == (0, said), ran.stderr


def test_workers_come_and_go_under_load_and_no_request_is_lost(served: Served, home: Path) -> None:
    with Callers(served, seconds=0.1) as callers:
        callers.number(4)
        resized(home, "Busy", 1, 3)
        first = served.workers("Busy")
        assert set(first) == {0, 1, 2}
        assert served.workers("Calm").keys() == {0}
        grown = len(callers.answers)
        eventually(lambda: {busy_worker(one) for one in callers.answers[grown:]} == {0, 1, 2}, "work reaches all three")
        resized(home, "Busy", 3, 1)
        assert served.workers("Busy") == {0: first[0]}, "the highest go first"
        shrunk = len(callers.answers)
        eventually(lambda: len(callers.answers) > shrunk + 8, "more answers")
        resized(home, "Busy", 1, 2)
        assert set(served.workers("Busy")) == {0, 1}, "an index is used again"
    assert callers.lost == []
    assert "died" not in served.text
    shown = [line for line in served.lines if "→" in line or "has left" in line]
    assert shown[:2] == ["Busy: 1 → 3 workers (by hand)", "Busy: 3 → 1 workers (by hand)"]
    assert sorted(shown[2:4]) == ["Busy-1 has left", "Busy-2 has left"]


def test_workers_of_the_service_with_http_share_its_port(served: Served, home: Path) -> None:
    with Callers(served, seconds=0.01) as callers:
        callers.number(2)
        resized(home, "Front", 1, 2)
        fronts = served.workers("Front")
        grown = len(callers.answers)
        both = set(fronts.values())
        eventually(lambda: {json.loads(one)["pid"] for one in callers.answers[grown:]} == both, "requests reach both")
        os.kill(fronts[0], signal.SIGKILL)  # the first one must find its port again beside the other
        served.wait_for(r"^Front-0 is back$")
    again = scale(home, GRAPH, "Front=1")
    assert (again.returncode, set(served.workers("Front"))) == (0, {0}), again.stderr
    assert '"workers"' in served.post("call", {"seconds": 0.001})


def test_a_worker_that_does_not_come_up_is_taken_back_and_the_graph_goes_on(served: Served, home: Path) -> None:
    ran = scale(home, GRAPH, "Calm=2")
    assert ran.returncode == 1
    assert ran.stdout == "Calm: 1 → 2 workers\nCalm: 1 ready\n"
    served.wait_for(r"^Calm-1 keeps dying \(exit status 1\); it is taken back$")
    served.wait_for(r"RuntimeError: no room for one more")
    again = scale(home, GRAPH, "Calm=2")
    assert again.returncode == 1 and "a worker of Calm did not come up; wait" in again.stderr
    assert '"workers"' in served.post("call", {"seconds": 0.001})


def test_without_numbers_it_says_how_many_there_are(served: Served, home: Path) -> None:
    ran = scale(home, f"./{GRAPH}")
    assert ran.returncode == 0
    assert set(ran.stdout.splitlines()) == {f"{name}: {count} ready" for name, count in counts(home).items()}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("other:Graph", "Busy=2"), 2, f"error: no graph other:Graph runs for this user; running: {GRAPH}"),
        ((GRAPH, "Busy"), 2, "error: Busy: must be Service=N"),
        ((GRAPH, "Busy=2", "--Busy.fail-from=1"), 2, "error: --Busy.fail-from: scaling takes no configuration"),
        ((GRAPH, "Bsy=2"), 1, "error: Bsy does not run here; there is Front, Calm, Busy"),
        ((GRAPH, "Busy=0"), 1, "error: Busy keeps at least 1 of its workers"),
        ((GRAPH, "Calm=3"), 1, "error: Calm may have at most 2 workers"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    served: Served, home: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    before = counts(home)
    ran = scale(home, *arguments)
    assert ran.returncode == status
    assert ran.stderr.startswith(message) and ran.stderr.count("\n") == 1
    assert counts(home) == before


def test_no_graph_at_all_is_said(tmp_path: Path) -> None:
    ran = scale(tmp_path, GRAPH, "Busy=2")
    assert (ran.returncode, ran.stderr) == (2, f"error: no graph {GRAPH} runs for this user; running: none\n")


def test_the_door_is_its_users_alone(served: Served, home: Path) -> None:
    path = door(home)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b'{"do": "scale", "service": "Busy"}\n',
        b'{"do": "scale", "service": "Busy", "workers": true}\n',
        b'{"do": "scale", "service": "Busy", "workers": "3"}\n',
        b'{"do": "scale", "service": ["Busy"], "workers": 3}\n',
        b'{"do": "stop"}\n',
    ],
)
def test_what_is_no_question_is_refused(served: Served, home: Path, line: bytes) -> None:
    answer = json.loads(_say(door(home), line))
    assert answer.keys() == {"error"}
    assert '"workers"' in served.post("call", {"seconds": 0.001})


def test_a_line_without_end_is_not_read_on(served: Served, home: Path) -> None:
    assert _say(door(home), b"x" * (4 * LINE_BYTES)) == b""
    assert counts(home)["Front"] == 1


def _say(path: Path, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(20)
        caller.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            caller.sendall(line)
            return b"".join(iter(lambda: caller.recv(4096), b""))
        return b""


def test_a_graph_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="the graph does not answer"):
        asyncio.run(ask(tmp_path / "nobody", do="status"))


def test_it_ends_in_the_middle_of_a_grow_and_leaves_nothing(served: Served, home: Path) -> None:
    path, answer = door(home), dict[str, Any]()
    answer |= asyncio.run(ask(path, do="scale", service="Busy", workers=4))
    assert answer["before"] == 2
    assert served.stop() == 0
    assert served.leftovers() == []
    assert scale(home, GRAPH).returncode == 2
