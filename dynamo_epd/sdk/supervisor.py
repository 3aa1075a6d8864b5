# SPDX-License-Identifier: Apache-2.0
"""Keeps the processes of a graph running on one machine, and ends them without leaving anything.

One circus `Watcher` per worker spawns the process in a session of its own, reads its output, and ends it: SIGTERM, a
bound, SIGKILL. The watchers run without circus' Arbiter. That one restarts at once and without end (no back-off, no
count), cannot tell a worker that is ready from one that loads, polls for dead children once a second, installs its own
signal handlers, and opens a ZeroMQ socket on which anyone local may start commands. So what follows a death is decided
here. A worker slot is one watcher, so slots can come and go while the graph runs.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
from circus.process import Process
from circus.watcher import Watcher

from dynamo_epd.sdk.notify import LEAVE
from dynamo_epd.sdk.port import HOST, PORT, SHARED_PORT, hold

BACK_OFF_FIRST, BACK_OFF_CAP = 0.5, 30.0
STEADY_SECONDS = 30.0
"""A worker that was ready this long has its earlier deaths forgiven."""
MAX_FIRST_STARTS = 3
MAX_DEATHS = 5
"""Deaths in a row, without having been ready, that end the graph: of a worker never ready yet, and of one that was and
has nobody beside it. One whose service others still give is started again for ever."""
MOST_PATIENCE = 8
"""How many times as long as at first a start may take: each that was ended for its time gives the next twice that."""
KILL_GRACE = 20.0
"""Seconds beyond the drain bound before a worker's process group is killed."""
LEAVE_SECONDS = 3600.0
"""In which a worker that leaves while the graph goes on finishes what it has; no request has a longer deadline. If it
stands still meanwhile it is ended as ever."""
PROGRESS_SECONDS = 5.0
DUMP_SECONDS = 2.0
"""For a worker that did not come up to say where it stands, before it is killed."""
WATCH_SECONDS = 1.0
STILL_SECONDS = 60.0
"""A ready worker that was not heard for so long is killed and started again. Others pass it over long before."""
STILL_HTTP_SECONDS = 5.0
"""The same for one that listens for HTTP: nobody passes it over, the kernel goes on giving it connections. Where it is
stopped, and not just slow, two looks will do."""
LATE_SECONDS = 0.25
"""A timer that rings later than this: this process stood still itself, and can say nothing of the others."""
TAIL_LINES = 40
LAST_WORDS = 15
"""Lines of a worker that died that are shown while it is started again."""
BAD_CONFIG = 2
PIPE_BYTES = 64 * 1024
"""All that Linux keeps of a pipe that nobody reads."""


class GraphFailed(Exception):
    """A process keeps dying. ``tail``: its last lines."""

    def __init__(self, message: str, tail: list[str], status: int = 1):
        super().__init__(message)
        self.tail = tail
        self.status = status


class _NotSpawned(Exception):
    """There is no new process. The message says why."""


class _Process(Process):
    """circus would keep the reason to itself and try four times more at once, or let the error out of the watcher."""

    def spawn(self) -> None:
        """Raises _NotSpawned."""
        self.watcher.spawned = None
        try:
            super().spawn()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise _NotSpawned(str(error)) from error
        self.watcher.spawned = self


class _Watcher(Watcher):
    _process_class = _Process
    spawned: _Process | None = None
    """By the last try. circus keeps no process whose output it cannot read, and leaves it running."""

    def end_unkept(self) -> None:
        """Ends what the last try has spawned and circus does not keep."""
        unkept, self.spawned = self.spawned, None
        if unkept is None or unkept.pid in self.processes:
            return
        if unkept.is_alive():
            os.killpg(unkept.pid, signal.SIGKILL)
            os.waitpid(unkept.pid, 0)
        if self.stream_redirector is not None:
            self.stream_redirector.remove_redirections(unkept)
        unkept.close_output_channels()


@dataclasses.dataclass
class Slot:
    """One process to be kept: its command, and what is known of the one that runs now."""

    service: str
    index: int
    command: list[str]
    environment: dict[str, str]
    waits_for_ready: bool = True
    watcher: Watcher = None
    pid: int | None = None
    ready: bool = False
    ever_ready: bool = False
    status: str = "starting"
    url: str | None = None
    instance: str | None = None
    deaths: int = 0
    """In a row."""
    patience: int = 1
    """How many times as long as the first its next start may take."""
    restarts: int = 0
    """Since the graph was served, or the worker added: its processes are told, and report it."""
    started: float = 0.0
    ready_at: float = 0.0
    added: bool = False
    """Started while the graph was up: one that does not come up is taken back, and the graph goes on."""
    ending: asyncio.Future[Any] | None = None
    """Its end has been asked for: it drains, or is gone."""
    drained: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """It has finished what it accepted; its process still closes what it holds."""
    due: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Where it leaves, it has no longer time for that: it has drained, its process is gone, or the graph ends."""
    stopped: int = 0
    """Looks in a row that found its process stopped."""
    heard: float | None = None
    """When its event loop last said that it turns; None before it is ready and from its drain on."""
    waited: float = 0.0
    """What `_waited` said of it then."""
    tail: collections.deque[str] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))

    @property
    def name(self) -> str:
        return f"{self.service}-{self.index}"


_LEVEL = re.compile(r"(?:^|[\s\[])(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL|INF|WRN|ERR|FTL)(?:\s|:|\])")
"""Python's levels and, in three letters, nats-server's."""
_REQUEST_LINE = "INFO dynamo_epd.request"
_WITHOUT_LEVEL = ("Exception in thread", "Thread 0x", "Current thread 0x")
"""Python's own words: a thread that died, and faulthandler's stacks."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Output:
    """A worker's output as lines: all are kept for its last words, those worth reading are shown."""

    def __init__(self, slot: Slot, show: Callable[[str], None], verbose: bool):
        self._slot, self._show, self._verbose = slot, show, verbose
        self._rest = b""
        self._showing = False

    def __call__(self, data: dict[str, Any]) -> None:
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + data["data"])
        if len(self._rest) > 64 * 1024:
            lines, self._rest = [self._rest], b""
        for raw in lines:
            self._line(_COLOUR.sub("", raw.decode(errors="replace")).rstrip())

    def _line(self, line: str) -> None:
        if not line:
            return
        self._slot.tail.append(line)
        level = _LEVEL.search(line[:80])
        if level:  # a line without a level belongs to the one before it (tracebacks)
            self._showing = level[1] not in ("DEBUG", "INFO", "INF") or line.startswith(_REQUEST_LINE)
        elif line.startswith(_WITHOUT_LEVEL):
            self._showing = True
        if self._verbose or self._showing:
            self._show(f"[{self._slot.name}] {line}")


class Supervisor:
    """Runs slots until told to stop or until one keeps dying.

    ``order`` lists groups of services so that each stands before those it calls: groups are stopped one after another.
    ``on_death`` is told of every slot whose process has ended, ``on_give_up`` of one that was added and is taken back
    because it does not come up. ``drain`` and ``start`` in seconds: a worker that is not ready after ``start`` dumps
    its stacks and is started again.
    """

    def __init__(
        self,
        order: list[list[str]],
        *,
        drain: float,
        start: float = 1800.0,
        verbose: bool = False,
        show: Callable[[str], None] = print,
        on_death: Callable[[Slot], None] = lambda _: None,
        on_give_up: Callable[[Slot], None] = lambda _: None,
    ):
        self.slots: dict[str, Slot] = {}
        self.directory: Path
        """For this user alone, and gone with the graph: sockets lie in it."""
        self._order = order
        self._drain = drain
        self._start_seconds = start
        self._verbose = verbose
        self._show = show
        self._on_death = on_death
        self._on_give_up = on_give_up
        self._failure: asyncio.Future[Any]
        self.stopping = False
        """Read by those who would change the slots: it is too late for that."""
        self._notify: socket.socket
        self._held: dict[tuple[str, int], socket.socket] = {}
        """The ports of services with HTTP: while workers come and go they are nobody else's."""
        self._pending: set[asyncio.Task[None]] = set()
        self._said_ready: set[str] = set()
        self._changed: asyncio.Event

    async def open(self) -> None:
        """Opens the socket that workers report to. Must precede `start`."""
        logging.getLogger("circus").setLevel(logging.CRITICAL)
        self._changed = asyncio.Event()
        self._failure = asyncio.get_running_loop().create_future()
        _remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=f"dynamo-{os.getpid()}-"))
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(self.directory / "notify"))
        asyncio.get_running_loop().add_reader(self._notify, self._read_notice)
        self._later(self._watch())

    async def start(self, slot: Slot) -> None:
        """Starts the slot's process and keeps it from now on. Nothing is started once the graph is being stopped.

        Raises ConfigError when the port that it is to listen at belongs to somebody else.
        """
        if self.stopping:
            return
        self._share_port(slot)
        self.slots[slot.name] = slot
        environment = slot.environment | {
            "NOTIFY_SOCKET": str(self.directory / "notify"),
            "DYNAMO_SUPERVISOR_PID": str(os.getpid()),
            "DYNAMO_RESTARTS": "0",
        }
        slot.watcher = _Watcher(
            slot.name,
            # circus formats "$(...)" and "((...))" in commands; ours has neither and is split by shlex again
            cmd=shlex.join(slot.command),
            env=environment,
            singleton=True,
            respawn=False,
            stop_signal=signal.SIGTERM,
            graceful_timeout=self._drain + KILL_GRACE,
            copy_env=False,
            close_child_stdin=True,
            hooks={"after_reap": (self._reaped, True)},
        )
        output = _Output(slot, self._show, self._verbose)
        slot.watcher.stdout_stream = output
        slot.watcher.stderr_stream = output
        await self._spawn(slot)

    def _share_port(self, slot: Slot) -> None:
        """Workers of one service share a port, also when there is only one yet; for port 0 a free one is held."""
        port = slot.environment.get(PORT)
        if port is None:
            return
        key = (slot.service if port == "0" else "", int(port))
        if key not in self._held:
            self._held[key] = hold(slot.environment.get(HOST, "127.0.0.1"), int(port))
        slot.environment |= {PORT: str(self._held[key].getsockname()[1]), SHARED_PORT: "1"}

    async def _spawn(self, slot: Slot) -> None:
        slot.ready, slot.status, slot.started, slot.url = False, "starting", time.monotonic(), None
        slot.heard, slot.stopped = None, 0
        slot.drained.clear()
        slot.due.clear()
        how = "cannot be started"
        try:
            await slot.watcher.start()
        except _NotSpawned as error:
            how += f": {error}"
        slot.pid = next(iter(slot.watcher.processes), None)
        if slot.pid is None:
            slot.watcher.end_unkept()
            if self.stopping or slot.ending is not None:
                return
            if slot.restarts:  # it ran before: what there is too little of now may be there again soon
                self._once_more(slot, how)
            else:
                self._fail(slot, f"{slot.name} {how}")
            return
        if slot.waits_for_ready:
            self._later(self._overdue(slot, slot.pid))
        else:
            slot.ready = slot.ever_ready = True
            slot.ready_at = time.monotonic()
        try:
            watch = os.pidfd_open(slot.pid)
        except OSError as error:  # nobody would hear of its end
            self._show(f"{slot.name} cannot be watched and is ended: {error}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.pid, signal.SIGKILL)
            self._bury(slot, slot.pid)
        else:
            asyncio.get_running_loop().add_reader(watch, self._ended, slot, slot.pid, watch)

    def _ended(self, slot: Slot, pid: int, watch: int) -> None:
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)
        self._bury(slot, pid)

    def _bury(self, slot: Slot, pid: int) -> None:
        slot.due.set()
        if self.stopping or slot.ending is not None:
            return
        process = slot.watcher.processes.get(pid)
        if process is not None:
            with self._survived(f"the last output of {slot.name}"):
                _let_go_of_output(slot.watcher, process)
            with self._survived(f"the end of {slot.name}"):
                slot.watcher.reap_process(pid)
        if slot.pid == pid:  # circus has not come so far as to call it
            self._reaped(watcher=slot.watcher, process_pid=pid, exit_code=None)

    @contextlib.contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """An error in here is shown, and what follows is done all the same: circus or the event loop would keep the
        error to itself, and a worker would be missing for ever."""
        try:
            yield
        except Exception as error:
            self._show(f"{what}: {error!r}")

    def _reaped(self, *, watcher: Watcher, process_pid: int, exit_code: int | None, **_: Any) -> bool:
        """circus' hook: the process is gone. Its group goes too: engines fork children that outlive it."""
        with self._survived(f"the processes that {watcher.name} has left"):
            _kill_group(process_pid)
        slot = self.slots.get(watcher.name)
        if slot is not None and slot.pid == process_pid:
            slot.pid, slot.ready = None, False
            with self._survived(f"what follows the death of {slot.name}"):
                self._on_death(slot)
            if not self.stopping and slot.ending is None:
                self._after_death(slot, exit_code)
        return True

    def _after_death(self, slot: Slot, exit_code: int | None) -> None:
        # Of one that was ready the configuration did work: a file is being changed, a disk is full for now.
        if exit_code == BAD_CONFIG and not slot.ever_ready:
            self._fail(slot, f"{slot.name}: wrong configuration", BAD_CONFIG)
        else:
            if exit_code is None:
                how = "nobody knows how"
            else:
                how = f"signal {-exit_code}" if exit_code < 0 else f"exit status {exit_code}"
            self._once_more(slot, how)

    def _once_more(self, slot: Slot, how: str) -> None:
        """What follows a death, and a restart that gave no process."""
        steady = slot.ready_at > slot.started and time.monotonic() - slot.ready_at > STEADY_SECONDS
        # one whose readiness is not waited for counts as ready from its start on, which says nothing
        was_ready = steady or (slot.waits_for_ready and slot.ready_at > slot.started)
        slot.deaths = 1 if steady else slot.deaths + 1
        slot.status = "died"
        if not was_ready and self._is_lost(slot):
            self._fail(slot, f"{slot.name} keeps dying ({how})")
        else:
            delay = min(BACK_OFF_CAP, BACK_OFF_FIRST * 2 ** (slot.deaths - 1))
            self._show(f"{slot.name} died ({how}); starting it again in {delay:g} s")
            for line in [] if self._verbose else list(slot.tail)[-LAST_WORDS:]:
                self._show(f"[{slot.name}] {line}")
            self._later(self._restart(slot, delay))

    def _is_lost(self, slot: Slot) -> bool:
        """Whether it is not to be tried again, and the graph is nothing without it."""
        if slot.ever_ready:
            beside = [one for one in self._slots_of(slot.service) if one.ready and one.ending is None]
            return slot.deaths >= MAX_DEATHS and not beside
        return slot.deaths >= MAX_FIRST_STARTS

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _overdue(self, slot: Slot, pid: int) -> None:
        """A start that stands still must not be waited for for ever. Beside load it may only be slow."""
        patience = self._start_seconds * slot.patience
        await asyncio.sleep(patience)
        if slot.pid != pid or slot.ready:
            return
        slot.patience = min(2 * slot.patience, MOST_PATIENCE)
        self._show(f"{slot.name} has not come up in {patience:g} s; where it stands:")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGUSR1)  # `worker.main` and the engines' plugin answer it with their stacks
            await asyncio.sleep(DUMP_SECONDS)
            if slot.pid == pid:
                os.kill(pid, signal.SIGKILL)

    async def _watch(self) -> None:
        """Ends workers that stand still: stopped, or their event loop stuck. Buries orphans."""
        while True:
            due = time.monotonic() + WATCH_SECONDS
            await asyncio.sleep(WATCH_SECONDS)
            late = time.monotonic() - due
            with self._survived("a look at the workers"):
                self._look(late)

    def _look(self, late: float) -> None:
        watchers = [slot.watcher for slot in self.slots.values() if slot.watcher is not None]
        _reap_orphans({pid for watcher in watchers for pid in watcher.processes})
        for slot in self.slots.values():
            if slot.heard is None or slot.pid is None:
                continue
            if late > LATE_SECONDS:
                slot.heard += late + WATCH_SECONDS
            still = time.monotonic() - slot.heard
            slot.stopped = slot.stopped + 1 if slot.url and _is_stopped(slot.pid) else 0
            most = STILL_HTTP_SECONDS if slot.url else STILL_SECONDS
            if still > most:
                still -= _waited(slot.pid) - slot.waited
            if still > most or slot.stopped >= 2:
                self._show(f"{slot.name} has stood still for {still:.0f} s")
                slot.heard = None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, signal.SIGKILL)

    async def _restart(self, slot: Slot, delay: float) -> None:
        await asyncio.sleep(delay)
        if not self.stopping and slot.ending is None:
            slot.restarts += 1
            slot.watcher.env["DYNAMO_RESTARTS"] = str(slot.restarts)
            await self._spawn(slot)

    def _fail(self, slot: Slot, message: str, status: int = 1) -> None:
        if slot.added and not slot.ever_ready:
            if slot.ending is None:
                self._later(self._give_up(slot, message))
        elif not self._failure.done():
            self._failure.set_exception(GraphFailed(message, list(slot.tail), status))

    async def _give_up(self, slot: Slot, message: str) -> None:
        for line in [] if self._verbose else list(slot.tail)[-LAST_WORDS:]:
            self._show(f"[{slot.name}] {line}")
        self._show(f"{message}; it is taken back")
        await self.remove(slot)
        self._on_give_up(slot)

    def _read_notice(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self._notify.recv(4096).decode(errors="replace")
                self._noticed(dict(line.split("=", 1) for line in text.splitlines() if "=" in line))

    def _noticed(self, fields: dict[str, str]) -> None:
        slot = next((one for one in self.slots.values() if str(one.pid) == fields.get("MAINPID")), None)
        if slot is None:
            return
        slot.status = fields.get("STATUS", slot.status)
        if fields.get("READY") == "1":
            if slot.ever_ready:
                self._show(f"{slot.name} is back")
            elif slot.added:
                self._show(f"{slot.name} ready")
            slot.ready = slot.ever_ready = True
            slot.ready_at, slot.patience = time.monotonic(), 1
            slot.url, slot.instance = fields.get("X_URL"), fields.get("X_INSTANCE")
        if "READY" in fields or "WATCHDOG" in fields:
            slot.heard, slot.waited = time.monotonic(), _waited(slot.pid or 0)
        if "STOPPING" in fields:
            slot.heard = None
        if "X_DRAINED" in fields:
            slot.drained.set()
            slot.due.set()
        self._changed.set()

    def _slots_of(self, service: str) -> list[Slot]:
        return [one for one in self.slots.values() if one.service == service]

    async def ready(self) -> None:
        """Returns when every slot has been ready once, telling of each service and every few seconds what is missing.

        Raises GraphFailed when one keeps dying.
        """
        begun = said = time.monotonic()
        while True:
            waiting: list[str] = []
            for service in reversed([name for group in self._order for name in group]):
                slots = self._slots_of(service)
                missing = [one for one in slots if not one.ever_ready]
                if missing:
                    waiting.append(f"{service} ({missing[0].status})" if len(slots) == 1 else _count(slots))
                elif slots and service not in self._said_ready:
                    self._said_ready.add(service)
                    workers = "" if len(slots) == 1 else f", {len(slots)} workers"
                    self._show(f"{service} ready ({time.monotonic() - begun:.1f} s{workers})")
            if not waiting:
                return
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                self._show(f"  {said - begun:.0f} s: waiting for {', '.join(waiting)}")
            self._changed.clear()
            changed: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([changed, self._failure], timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if self._failure.done():
                self._failure.result()

    async def failed(self) -> None:
        """Waits for the graph to fail; raises GraphFailed then."""
        await asyncio.shield(self._failure)

    async def remove(self, slot: Slot) -> None:
        """Lets one worker finish what it has, and forgets it: from now on it is not started again, however it ends.

        That takes `LEAVE_SECONDS` at most, and no longer than the drain bound once the graph is being stopped.
        """
        if slot.ending is None:
            slot.ending = asyncio.create_task(self._leave(slot))
        await asyncio.shield(slot.ending)
        self.slots.pop(slot.name, None)

    async def _leave(self, slot: Slot) -> None:
        if slot.ready and slot.pid is not None:
            os.kill(slot.pid, LEAVE)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(slot.due.wait(), LEAVE_SECONDS)
        await slot.watcher.stop()

    async def _stop(self, slot: Slot) -> None:
        if slot.watcher is None:
            return
        slot.due.set()
        if slot.ending is None:
            slot.ending = asyncio.ensure_future(slot.watcher.stop())
        await asyncio.shield(slot.ending)  # asked for twice, circus would wait for the process in this loop

    async def stop(self) -> None:
        """Callers first, then what they call as soon as they have drained, each within the drain bound. Processes that
        are no workers end last: workers lean on them until they are gone."""
        self.stopping = True
        for task in list(self._pending):
            task.cancel()
        ending: list[asyncio.Task[None]] = []
        for group in self._order:
            slots = [slot for service in group for slot in self._slots_of(service)]
            if not all(slot.waits_for_ready for slot in slots):
                await asyncio.gather(*ending)
            ends = [asyncio.create_task(self._stop(slot)) for slot in slots]
            await asyncio.gather(*map(_drained, slots, ends))
            ending += ends
        await asyncio.gather(*ending)

    def kill(self) -> None:
        """Ends every process group at once."""
        self.stopping = True
        for slot in self.slots.values():
            if slot.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(slot.pid, signal.SIGKILL)

    def close(self) -> None:
        """Whatever went before: no process, no socket, no file stays."""
        self.kill()
        for slot in self.slots.values():
            if slot.pid is not None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(slot.pid, 0)
        asyncio.get_running_loop().remove_reader(self._notify)
        self._notify.close()
        for held in self._held.values():
            held.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        if not self._failure.done():
            self._failure.cancel()
        elif not self._failure.cancelled():
            self._failure.exception()


async def _drained(slot: Slot, end: asyncio.Task[None]) -> None:
    """Or gone: a worker that was not ready yet has nothing to finish."""
    drained = asyncio.create_task(slot.drained.wait())
    await asyncio.wait([drained, end], return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP or a terminal; not by a debugger, which stops a process for a moment and often."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except (psutil.Error, OSError):  # psutil lets those through that are about this process, which has no descriptor
        return False


def _waited(pid: int) -> float:
    """Seconds in which its main thread, which turns the event loop, could have run and found no core: others had them,
    and it does not stand still for that (the second number of ``/proc/PID/schedstat``, sched-stats.rst)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # it has ended, or this kernel does not count that
        return 0.0


def _let_go_of_output(watcher: Watcher, process: Process) -> None:
    """Reads what is left of it, and takes its pipes out of the loop.

    Children that outlive the process hold the other ends, so no end of file has done that. circus, which closes ours
    next, does not: whatever gets their numbers (pipes, a pidfd, a connection) would never be heard in this loop.
    """
    try:
        for name, pipe in watcher.stream_redirector.get_process_pipes(process):
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                watcher.stream_redirector.redirect[name]({"data": os.read(pipe.fileno(), PIPE_BYTES)})
    finally:
        watcher.stream_redirector.remove_redirections(process)


def _reap_orphans(kept: set[int]) -> None:
    """Waits for dead children that were adopted: the first process of a container gets those of a dead worker, and
    they would stay as zombies until no process can be started.

    Whom this process has started itself is ``kept``, or of its session: somebody else waits for those.
    """
    try:
        dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        dead = None
    if dead is None:  # as nearly always: to list the children means to read of every process there is
        return
    with contextlib.suppress(psutil.Error, OSError):  # what cannot be looked at now can be in a second
        for child in psutil.Process().children():
            own = child.pid in kept or os.getsid(child.pid) == os.getsid(0)
            if child.status() == psutil.STATUS_ZOMBIE and not own:
                os.waitpid(child.pid, os.WNOHANG)


def _kill_group(group: int) -> None:
    """Ends every process of a group whose leader is gone.

    multiprocessing's resource tracker is left to end by itself, as it does once the others are gone: killed with them
    it would leave their semaphores in shared memory.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # psutil lets some of the former through
            if os.getpgid(process.pid) == group and "multiprocessing.resource_tracker" not in " ".join(
                process.cmdline()
            ):
                process.kill()


def _remove_leftovers() -> None:
    """Sockets of supervisors that were killed with -9. A socket's path must be short, so they lie in the temp dir."""
    for directory in Path(tempfile.gettempdir()).glob("dynamo-*-*"):
        with contextlib.suppress(PermissionError, ValueError, OSError):
            try:
                os.kill(int(directory.name.split("-")[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(directory, ignore_errors=True)


def _count(slots: list[Slot]) -> str:
    return f"{slots[0].service} ({sum(one.ever_ready for one in slots)} of {len(slots)})"


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
