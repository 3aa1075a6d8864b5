# SPDX-License-Identifier: Apache-2.0
"""Which of a worker's lines are shown, and what a process is told. How they are kept and ended: test_serve.py."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import circus.process
import circus.stream.redirector
import psutil
import pytest

from dynamo_epd.sdk import notify as notify_module
from dynamo_epd.sdk import supervisor as supervisor_module
from dynamo_epd.sdk.notify import WAIT_SECONDS, notify
from dynamo_epd.sdk.supervisor import (
    BAD_CONFIG,
    LEAVE_SECONDS,
    MAX_DEATHS,
    MAX_FIRST_STARTS,
    STILL_HTTP_SECONDS,
    GraphFailed,
    Slot,
    Supervisor,
    _Output,
)
from dynamo_epd.transfer.slots import MAX_LEASE_SECONDS
from tests.serving import eventually


def shown(*chunks: bytes, verbose: bool = False) -> tuple[list[str], Slot]:
    lines: list[str] = []
    slot = Slot("Back", 1, [], {})
    output = _Output(slot, lines.append, verbose)
    for chunk in chunks:
        output({"data": chunk})
    return lines, slot


def test_warnings_tracebacks_and_request_lines_are_shown_with_the_workers_name() -> None:
    text = (
        b"INFO vllm: loading\nsome print\nWARNING x: careful\nINFO y: done\n"
        b"ERROR z: failed\nTraceback (most recent call last):\n  File\nValueError: no\n"
        b"INFO dynamo_epd.request: POST 200\nDEBUG y: more\n(EngineCore pid=7) ERROR 11-21 core.py: dead\n"
        b"[7] 2026/11/21 01:47:52.87 [INF] Server is ready\n[7] 2026/11/21 01:47:52.88 [ERR] JetStream is off\n"
    )
    lines, slot = shown(text)
    assert lines == [
        "[Back-1] WARNING x: careful",
        "[Back-1] ERROR z: failed",
        "[Back-1] Traceback (most recent call last):",
        "[Back-1]   File",
        "[Back-1] ValueError: no",
        "[Back-1] INFO dynamo_epd.request: POST 200",
        "[Back-1] (EngineCore pid=7) ERROR 11-21 core.py: dead",
        "[Back-1] [7] 2026/11/21 01:47:52.88 [ERR] JetStream is off",
    ]
    assert len(slot.tail) == 13  # the last words have everything


def test_a_thread_that_died_and_stacks_are_shown_though_they_have_no_level() -> None:
    text = (
        b"loading\nException in thread listener:\nTraceback (most recent call last):\nValueError: no\nINFO x: on\n"
        b"more\nThread 0x00007f (most recent call first):\n  File a.py\n"
    )
    lines, _ = shown(text)
    assert [line.removeprefix("[Back-1] ") for line in lines] == [
        "Exception in thread listener:",
        "Traceback (most recent call last):",
        "ValueError: no",
        "Thread 0x00007f (most recent call first):",
        "  File a.py",
    ]


def test_lines_are_whole_whatever_the_chunks_and_progress_bars_are_split() -> None:
    lines, slot = shown(b"WARN", b"ING a: b", b"\n", b"10%\r20%\r\n", verbose=True)
    assert lines == ["[Back-1] WARNING a: b", "[Back-1] 10%", "[Back-1] 20%"]
    assert list(slot.tail) == ["WARNING a: b", "10%", "20%"]


def test_a_line_without_end_is_cut() -> None:
    lines, slot = shown(*[b"x" * 1024] * 80, verbose=True)
    assert len(lines) == 1
    assert len(slot.tail[0]) > 64 * 1024


def until_it_keeps_dying(slot: Slot, *, start: float = 1800.0) -> list[str]:
    """What is shown of a graph of one worker that never comes up."""
    lines: list[str] = []

    async def main() -> None:
        supervisor = Supervisor([["Back"]], drain=1, start=start, show=lines.append)
        await supervisor.open()
        try:
            await supervisor.start(slot)
            with pytest.raises(GraphFailed, match="Back-0 keeps dying"):
                async with asyncio.timeout(60):
                    await supervisor.failed()
            await supervisor.stop()
        finally:
            supervisor.close()

    asyncio.run(main())
    return lines


def test_a_process_is_told_how_often_its_worker_was_started_again(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = ["sh", "-c", f"echo $DYNAMO_RESTARTS >> {told}; exit 1"]
    until_it_keeps_dying(Slot("Back", 0, command, os.environ | {"DYNAMO_RESTARTS": "7"}))
    assert told.read_text().split() == [str(number) for number in range(MAX_FIRST_STARTS)]


DIES_LATER = """
import os, socket, sys, time
def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.sendto(f"MAINPID={os.getpid()}\\n{text}".encode(), os.environ["NOTIFY_SOCKET"])
if os.environ["DYNAMO_RESTARTS"] == "0":
    notify("READY=1")
if sys.argv[1] == "dies":
    time.sleep(0.2)
    sys.exit(1)
time.sleep(600)
"""


@pytest.mark.parametrize("beside", [True, False])
def test_one_that_keeps_dying_ends_the_graph_only_where_nobody_else_gives_its_service(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    monkeypatch.setattr(supervisor_module, "BACK_OFF_CAP", 0.01)

    async def main() -> None:
        supervisor = Supervisor([["Back"]], drain=1, show=lambda _: None)
        await supervisor.open()
        try:
            for index, what in enumerate(("dies", "stays") if beside else ("dies",)):
                await supervisor.start(Slot("Back", index, [sys.executable, "-c", DIES_LATER, what], dict(os.environ)))
            async with asyncio.timeout(60):
                if beside:
                    while supervisor.slots["Back-0"].deaths < MAX_DEATHS + 2:
                        await asyncio.sleep(0.05)
                    failed = asyncio.create_task(supervisor.failed())
                    await asyncio.sleep(0.1)
                    assert not failed.done()
                    failed.cancel()
                else:
                    with pytest.raises(GraphFailed, match="Back-0 keeps dying"):
                        await supervisor.failed()
                    assert supervisor.slots["Back-0"].deaths == MAX_DEATHS
            await supervisor.stop()
        finally:
            supervisor.close()

    asyncio.run(main())


def test_a_start_that_was_ended_for_its_time_gives_the_next_more() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    lines = until_it_keeps_dying(Slot("Back", 0, command, dict(os.environ)), start=0.2)
    late = [line.partition(";")[0] for line in lines if "has not come up" in line]
    assert late == [f"Back-0 has not come up in {seconds} s" for seconds in ("0.2", "0.4", "0.8")]


DRAINS = """
import os, signal, socket, sys, time
from pathlib import Path
said, name, until = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def say(what):
    with said.open("a") as file:
        file.write(f"{name} {what}, ")
def tell(field):
    text = f"MAINPID={os.getpid()}\\n{field}=1"
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
def end(*_):
    say("asked")
    tell("X_DRAINED")
    while until not in said.read_text():
        time.sleep(0.01)
    say("gone")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
tell("READY")
(said.parent / name).touch()
while True:
    signal.pause()
"""
"""Drains at once, and is gone once something has been said."""


def test_who_is_called_ends_once_its_callers_have_drained_and_nats_once_all_are_gone(tmp_path: Path) -> None:
    said = tmp_path / "said"

    async def main() -> None:
        supervisor = Supervisor([["front"], ["back"], ["nats"]], drain=30, show=lambda _: None)
        await supervisor.open()
        try:
            for name, until in (("front", "back gone"), ("back", "back asked"), ("nats", "nats asked")):
                command = [sys.executable, "-c", DRAINS, str(said), name, until]
                await supervisor.start(Slot(name, 0, command, dict(os.environ), waits_for_ready=name != "nats"))
            async with asyncio.timeout(60):
                await supervisor.ready()
                while not (tmp_path / "nats").exists():  # a process that is no worker: nobody else waits for it
                    await asyncio.sleep(0.01)
                await supervisor.stop()
        finally:
            supervisor.close()

    asyncio.run(main())
    assert said.read_text() == "front asked, back asked, back gone, front gone, nats asked, nats gone, "


LEAVES = """
import os, signal, socket, sys, time
from pathlib import Path
said, then = Path(sys.argv[1]), sys.argv[2]
def say(what):
    with said.open("a") as file:
        file.write(f"{what}, ")
def leave(*_):
    say("told to leave")
    if then == "stands still":
        os.kill(os.getpid(), signal.SIGSTOP)
def end(*_):
    say("told to end")
    os._exit(0)
signal.signal(signal.SIGUSR2, leave)
signal.signal(signal.SIGTERM, end)
text = f"MAINPID={os.getpid()}\\nREADY=1\\nX_URL=http://x"
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
while True:
    time.sleep(1)
"""
"""Has something to finish for ever."""


@pytest.mark.parametrize(
    ("then", "told"), [("stands still", "told to leave, "), ("works on", "told to leave, told to end, ")]
)
def test_who_leaves_is_ended_where_it_stands_still_and_hurries_where_the_graph_ends(
    tmp_path: Path, then: str, told: str
) -> None:
    said, lines = tmp_path / "said", list[str]()

    async def main() -> None:
        supervisor = Supervisor([["Back"]], drain=30, show=lines.append)
        await supervisor.open()
        try:
            slot = Slot("Back", 0, [sys.executable, "-c", LEAVES, str(said), then], dict(os.environ))
            await supervisor.start(slot)
            async with asyncio.timeout(60):
                await supervisor.ready()
                leaving = asyncio.create_task(supervisor.remove(slot))
                while not said.exists():
                    await asyncio.sleep(0.01)
                if then == "works on":
                    await supervisor.stop()
                await leaving
            assert supervisor.slots == {}
        finally:
            supervisor.close()

    asyncio.run(main())
    assert said.read_text() == told
    assert any("Back-0 has stood still" in line for line in lines) == (then == "stands still")


@pytest.mark.parametrize(("waited", "alive"), [(6.0, True), (4.0, False)])
def test_a_worker_that_finds_no_core_does_not_stand_still(
    monkeypatch: pytest.MonkeyPatch, waited: float, alive: bool
) -> None:
    lines = list[str]()
    supervisor = Supervisor([["Back"]], drain=30, show=lines.append)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        slot = Slot("Back", 0, [], {})
        slot.pid, slot.url = process.pid, "http://127.0.0.1:1"
        slot.waited, slot.heard = 1.0, time.monotonic() - STILL_HTTP_SECONDS - 5
        supervisor.slots[slot.name] = slot
        monkeypatch.setattr(supervisor_module, "_waited", lambda pid: 1.0 + waited)
        supervisor._look(0.0)
        assert (slot.heard is not None) == alive
        if alive:
            process.kill()
    assert bool(lines) is not alive


def test_how_long_a_process_found_no_core() -> None:
    core = min(os.sched_getaffinity(0))
    busy = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    both = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
    try:
        eventually(lambda: all(supervisor_module._waited(one.pid) > 0.5 for one in both), "two that share a core")
    finally:
        for one in both:
            one.kill()
            one.wait()
    assert supervisor_module._waited(both[0].pid) == 0.0


def test_who_leaves_has_time_for_the_longest_request() -> None:
    assert LEAVE_SECONDS >= MAX_LEASE_SECONDS


@contextlib.asynccontextmanager
async def opened(show: Callable[[str], None] = lambda _: None) -> AsyncIterator[Supervisor]:
    """One that keeps services Back and Front, for a minute at most."""
    supervisor = Supervisor([["Back", "Front"]], drain=1, show=show)
    await supervisor.open()
    try:
        async with asyncio.timeout(60):
            yield supervisor
            await supervisor.stop()
    finally:
        supervisor.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


WITH_A_CHILD = ["sh", "-c", "sleep 600 & wait"]
"""As an engine's worker is: a child holds its output, whatever becomes of the worker itself."""


def test_what_is_opened_after_a_death_is_heard_though_a_child_held_the_dead_ones_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pipes, pidfds and connections get the numbers of the pipes that were closed."""
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.25)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async def main() -> None:
        async with opened() as supervisor:
            door = str(supervisor.directory / "door")
            server = await asyncio.start_unix_server(answer, door)
            slots = [Slot(name, 0, WITH_A_CHILD, dict(os.environ), waits_for_ready=False) for name in ("Back", "Front")]
            for slot in slots:
                await supervisor.start(slot)
            for turn in range(3):
                # the first to die is the last to be started again, so that each gets what was the other's
                slots[0].deaths, slots[1].deaths = turn % 2, (turn + 1) % 2
                for slot in sorted(slots, key=lambda one: -one.deaths):
                    assert slot.pid is not None
                    os.kill(slot.pid, signal.SIGKILL)
                    async with asyncio.timeout(5):
                        await until(lambda slot=slot: slot.pid is None)  # type: ignore[misc]
                async with asyncio.timeout(5):
                    reader, writer = await asyncio.open_unix_connection(door)
                    writer.write(b"anybody?\n")
                    assert await reader.readline() == b"anybody?\n"
                    writer.close()
                    failed = asyncio.ensure_future(supervisor.failed())
                    while not all(slot.pid for slot in slots):
                        assert not failed.done(), failed.exception()
                        await asyncio.sleep(0.01)
                    failed.cancel()
            server.close()

    asyncio.run(main())


def test_the_last_words_are_read_though_a_child_holds_the_output() -> None:
    script = "sleep 600 & seq 3000; echo the last word; kill -9 $$"
    lines = until_it_keeps_dying(Slot("Back", 0, ["sh", "-c", script], dict(os.environ)))
    assert lines.count("[Back-0] the last word") == MAX_FIRST_STARTS - 1  # the last time it is the error's to tell


REFUSES_ONCE_IT_RAN = """
import os, socket, sys, time
if os.environ["DYNAMO_RESTARTS"] == "1":
    sys.exit(2)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
    one.sendto(f"MAINPID={os.getpid()}\\nREADY=1".encode(), os.environ["NOTIFY_SOCKET"])
time.sleep(600)
"""


def test_a_configuration_that_worked_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    lines: list[str] = []

    async def main() -> None:
        async with opened(lines.append) as supervisor:
            slot = Slot("Back", 0, [sys.executable, "-c", REFUSES_ONCE_IT_RAN], dict(os.environ))
            await supervisor.start(slot)
            await supervisor.ready()
            assert slot.pid is not None
            os.kill(slot.pid, signal.SIGKILL)
            back = asyncio.create_task(until(lambda: slot.restarts == 2 and slot.ready))
            failed = asyncio.create_task(supervisor.failed())
            await asyncio.wait([back, failed], return_when=asyncio.FIRST_COMPLETED)
            assert not failed.done(), failed.exception()
            failed.cancel()

    asyncio.run(main())
    assert any(f"Back-0 died (exit status {BAD_CONFIG}); starting it again" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (subprocess.SubprocessError("Exception occurred in preexec_fn."), r"Exception occurred in preexec_fn\."),
    ],
    ids=["fork", "preexec"],
)
def test_a_restart_that_gives_no_process_is_a_death_among_others(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    lines: list[str] = []
    tried = 0

    def no_process(*_: Any, **__: Any) -> None:
        nonlocal tried
        tried += 1
        raise error

    async def main() -> None:
        async with opened(lines.append) as supervisor:
            slot = Slot("Back", 0, ["sleep", "600"], dict(os.environ), waits_for_ready=False)
            await supervisor.start(slot)
            assert slot.pid is not None
            failed = asyncio.create_task(supervisor.failed())
            with monkeypatch.context() as patched:
                patched.setattr(circus.process, "Popen", no_process)
                os.kill(slot.pid, signal.SIGKILL)
                await until(lambda: slot.deaths == 3)
            await until(lambda: slot.pid is not None)
            assert not failed.done(), failed.exception()
            failed.cancel()

    asyncio.run(main())
    assert tried == 2
    said = [line for line in lines if "cannot be started" in line]
    assert len(said) == 2
    assert why.replace("\\", "") in said[0]


def test_what_cannot_be_started_at_all_is_an_error_with_its_reason() -> None:
    async def main() -> None:
        async with opened() as supervisor:
            await supervisor.start(Slot("Back", 0, ["/no/such/command"], dict(os.environ)))
            with pytest.raises(GraphFailed, match=r"Back-0 cannot be started: .*No such file.*'/no/such/command'"):
                await supervisor.failed()

    asyncio.run(main())


@pytest.fixture
def adopting() -> Iterator[None]:
    """This process gets the orphans among its descendants, as the first process of a container does."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)
    yield
    ctypes.CDLL(None).prctl(set_child_subreaper, 0)


def fails(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


BROKEN = {
    "the group": (supervisor_module, "_kill_group"),
    "the output": (supervisor_module, "_let_go_of_output"),
    "the process": (circus.process.Process, "stop"),
}


@pytest.mark.parametrize("what", ["the hook", *BROKEN])
def test_a_worker_is_started_again_though_something_breaks_at_its_death(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    lines: list[str] = []

    async def main() -> None:
        async with opened(lines.append) as supervisor:
            slot = Slot("Back", 0, ["sleep", "600"], dict(os.environ), waits_for_ready=False)
            await supervisor.start(slot)
            first = slot.pid
            assert first is not None
            with monkeypatch.context() as patched:
                if what == "the hook":
                    patched.setattr(supervisor, "_on_death", fails)
                else:
                    patched.setattr(*BROKEN[what], fails)
                os.kill(first, signal.SIGKILL)
                await until(lambda: slot.pid not in (None, first))
            assert slot.restarts == 1

    asyncio.run(main())
    assert sum("Too many open files" in line for line in lines) == 1
    assert sum("Back-0 died" in line for line in lines) == 1


def test_a_process_that_cannot_be_watched_is_ended_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    unwatched: list[int] = []
    open_watch = os.pidfd_open

    def no_watch(pid: int) -> int:
        unwatched.append(pid)
        return int(fails())

    async def main() -> None:
        async with opened() as supervisor:
            slot = Slot("Back", 0, ["sleep", "600"], dict(os.environ))
            monkeypatch.setattr(os, "pidfd_open", no_watch)
            await supervisor.start(slot)
            await until(lambda: slot.deaths == 2)
            monkeypatch.setattr(os, "pidfd_open", open_watch)
            await until(lambda: slot.pid is not None)
            assert slot.pid not in unwatched
            assert not any(map(psutil.pid_exists, unwatched))
            os.kill(slot.pid or 0, signal.SIGKILL)
            await until(lambda: slot.deaths == 3)

    asyncio.run(main())
    assert len(unwatched) == 2


def test_a_process_whose_output_cannot_be_read_is_ended_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    told = tmp_path / "told"

    async def main() -> None:
        async with opened() as supervisor:
            command = ["sh", "-c", f"echo $$ >> {told}; exec sleep 600"]
            slot = Slot("Back", 0, command, dict(os.environ), waits_for_ready=False)
            await supervisor.start(slot)
            await until(told.exists)
            with monkeypatch.context() as patched:
                patched.setattr(circus.stream.redirector.Redirector, "add_redirections", fails)
                os.kill(slot.pid or 0, signal.SIGKILL)
                await until(lambda: slot.deaths == 3)
            await until(lambda: slot.pid is not None and str(slot.pid) in told.read_text())
            assert [pid for pid in map(int, told.read_text().split()) if psutil.pid_exists(pid)] == [slot.pid]

    asyncio.run(main())


@pytest.mark.parametrize("steady", [False, True])
def test_a_process_that_is_no_worker_and_keeps_dying_ends_the_graph_unless_it_was_up_for_long_each_time(
    steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "BACK_OFF_FIRST", 0.01)
    monkeypatch.setattr(supervisor_module, "BACK_OFF_CAP", 0.01)
    if steady:
        monkeypatch.setattr(supervisor_module, "STEADY_SECONDS", 0.0)

    async def main() -> None:
        async with opened() as supervisor:
            slot = Slot("nats", 0, ["sh", "-c", "exit 1"], dict(os.environ), waits_for_ready=False)
            await supervisor.start(slot)
            if steady:
                await until(lambda: slot.restarts > MAX_DEATHS)
                assert not supervisor._failure.done()
            else:
                with pytest.raises(GraphFailed, match="nats-0 keeps dying"):
                    await supervisor.failed()
                assert slot.deaths == MAX_DEATHS

    asyncio.run(main())


def test_the_look_at_the_workers_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(supervisor_module, "_reap_orphans", fails)
    lines: list[str] = []

    async def main() -> None:
        async with opened(lines.append):
            await until(lambda: len(lines) > 1)

    asyncio.run(main())
    assert "Too many open files" in lines[-1]


def test_a_worker_that_cannot_be_looked_at_does_not_count_as_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "status", fails)
    assert not supervisor_module._is_stopped(os.getpid())


@pytest.mark.usefixtures("adopting")
def test_adopted_orphans_are_waited_for_and_nobody_elses_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "WATCH_SECONDS", 0.02)

    async def main() -> None:
        async with opened() as supervisor:
            script = "sleep 600 & setsid sleep 600 & wait"  # the latter leads a session, and outlives the group
            slot = Slot("Back", 0, ["sh", "-c", script], dict(os.environ), waits_for_ready=False)
            await supervisor.start(slot)
            assert slot.pid is not None
            worker = psutil.Process(slot.pid)
            await until(lambda: sum(os.getsid(one.pid) == one.pid for one in worker.children()) == 1)
            orphans = worker.children()
            assert len(orphans) == 2
            worker.kill()
            await until(lambda: slot.pid is None)
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
            await until(lambda: not any(psutil.pid_exists(one.pid) for one in orphans))
            await asyncio.sleep(0.1)

    own = subprocess.Popen(["sh", "-c", "exit 7"])
    asyncio.run(main())
    assert own.wait() == 7


def test_who_is_kept_is_waited_for_by_its_keeper_alone() -> None:
    with subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True) as kept:
        os.waitid(os.P_PID, kept.pid, os.WEXITED | os.WNOWAIT)
        supervisor_module._reap_orphans({kept.pid})
        assert kept.wait() == 7


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A supervisor's socket that takes nothing more for now."""
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr(notify_module, "_unsaid", {})
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        one.bind(address)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                other.sendto(b"", address)
        one.setblocking(False)
        yield one


def heard(listener: socket.socket) -> list[set[str]]:
    found: list[set[str]] = []
    try:
        while True:
            found.append(set(listener.recv(4096).decode().split("\n")) - {f"MAINPID={os.getpid()}", ""})
    except BlockingIOError:
        return [one for one in found if one]


def test_a_supervisor_that_stands_still_holds_no_worker_up_and_hears_all_that_counts(listener: socket.socket) -> None:
    began = time.monotonic()
    for _ in range(100):
        notify(WATCHDOG=1)
    notify(STATUS="loading")
    assert time.monotonic() - began < WAIT_SECONDS
    notify(STATUS="ready", READY=1, X_URL="http://x")
    waited = time.monotonic() - began
    assert WAIT_SECONDS <= waited < WAIT_SECONDS + 5
    assert heard(listener) == []
    notify(WATCHDOG=1)
    notify(WATCHDOG=1)
    assert heard(listener) == [{"STATUS=ready", "READY=1", "X_URL=http://x", "WATCHDOG=1"}, {"WATCHDOG=1"}]


def test_what_must_arrive_waits_for_room(listener: socket.socket) -> None:
    reading = threading.Timer(0.2, listener.recv, [4096])
    reading.start()
    notify(STATUS="closing", X_DRAINED=1)
    reading.join()
    assert heard(listener) == [{"STATUS=closing", "X_DRAINED=1"}]
