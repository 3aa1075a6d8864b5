# SPDX-License-Identifier: Apache-2.0
"""Which of a worker's lines are shown, and what a process is told. How they are kept and ended: test_serve.py."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from dynamo_epd.sdk.supervisor import MAX_FIRST_STARTS, GraphFailed, Slot, Supervisor, _Output


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


def test_a_process_is_told_how_often_its_worker_was_started_again(tmp_path: Path) -> None:
    told = tmp_path / "told"

    async def main() -> None:
        supervisor = Supervisor([["Back"]], drain=1, show=lambda _: None)
        await supervisor.open()
        try:
            command = ["sh", "-c", f"echo $DYNAMO_RESTARTS >> {told}; exit 1"]
            await supervisor.start(Slot("Back", 0, command, os.environ | {"DYNAMO_RESTARTS": "7"}))
            with pytest.raises(GraphFailed, match="Back-0 keeps dying"):
                async with asyncio.timeout(60):
                    await supervisor.failed()
            await supervisor.stop()
        finally:
            supervisor.close()

    asyncio.run(main())
    assert told.read_text().split() == [str(number) for number in range(MAX_FIRST_STARTS)]


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
