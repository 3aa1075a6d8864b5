# SPDX-License-Identifier: Apache-2.0
"""``dynamo serve``: a graph and its configuration as processes on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlsplit

from dynamo_epd.sdk.config import PLANNER, ConfigError, Document, ServiceSettings, resolve
from dynamo_epd.sdk.gpus import Share, TooFewGpus, gpus_for, visible_gpus
from dynamo_epd.sdk.graph import Graph, load_graph
from dynamo_epd.sdk.nats import SECRET, VARIABLES, split_credentials
from dynamo_epd.sdk.old_sdk import ENVIRONMENT
from dynamo_epd.sdk.operator import check_nats, configuration, placed
from dynamo_epd.sdk.port import HOST, PORT
from dynamo_epd.sdk.service import info_of

if TYPE_CHECKING:
    from dynamo_epd.sdk.scaling import SystemPorts
    from dynamo_epd.sdk.supervisor import Slot

DEFAULT_DRAIN = 30.0
DEFAULT_START = 1800.0
"""Seconds that a worker may take to become ready: a large checkpoint from a slow disk takes many minutes."""
NATS_SLOT = "nats"
MOST_SYSTEM_PORT = 32767
"""Runtime 1.6 reads ``DYN_SYSTEM_PORT`` as a signed 16-bit number, and dies of a larger one."""
MOST_WAITING = 5000
"""Lines for a terminal that takes none."""
LAST_LINES_SECONDS = 2.0
"""For it to take them when the command ends."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first process starts."""

    spec: str
    graph: Graph
    settings: dict[str, ServiceSettings]
    services: list[str]
    """The services that get processes here, callers before what they call."""
    devices: list[str]
    """The GPUs that there are for all of them."""
    shares: dict[str, Share]
    environment: dict[str, str]
    """What every worker gets on top of this process's environment."""
    host: str
    port: int
    working_dir: str

    def as_json(self) -> dict[str, Any]:
        """What ``--dry-run`` prints."""
        return {
            "graph": self.spec,
            "services": {
                name: self.settings[name].as_section() | {"starts": name in self.services}
                for name in self.graph.services
            },
            "environment": {name: "…" if name in SECRET else value for name, value in self.environment.items()},
            "gpus": {worker: share.as_environment() for worker, share in self.shares.items()},
        }


def make_plan(arguments: argparse.Namespace, overrides: list[tuple[str, str, str]]) -> Plan:
    """Reads graph and configuration. Raises ConfigError, and what `load_graph` does."""
    working_dir = str(Path(arguments.working_dir or ".").resolve())
    if not Path(working_dir).is_dir():
        raise ConfigError(f"--working-dir {arguments.working_dir}: no such directory")
    document = Document()
    if arguments.file:
        document.read(arguments.file)
    else:
        document.values = configuration()
    for service, key, text in overrides:
        document.override(service, key, text)
    graph = load_graph(arguments.graph, working_dir)
    settings = placed(resolve(graph, document))
    services = callers_first(graph)
    if arguments.service_name:
        graph.service(arguments.service_name)
        services = [arguments.service_name]
    services = [name for name in services if settings[name].runs and settings[name].workers > 0]
    wanted = {name: settings[name] for name in services}
    _check_system_port(sum(one.workers for one in wanted.values()))
    devices = visible_gpus()
    try:
        shares = gpus_for(wanted, devices)
    except TooFewGpus as error:
        # A configuration for other machines can be looked at on this one; it just cannot be served.
        if not arguments.dry_run:
            raise
        print(f"note: {error}", file=sys.stderr)
        shares = {}
    return Plan(
        spec=arguments.graph,
        graph=graph,
        settings=settings,
        services=services,
        devices=devices,
        shares=shares,
        environment=worker_environment(settings, _elsewhere(arguments.depends, graph), verbose=arguments.verbose),
        host=arguments.host,
        port=arguments.port,
        working_dir=working_dir,
    )


def callers_first(graph: Graph) -> list[str]:
    """Services so that each stands before those it calls; a cycle is cut where it is met."""
    order: list[str] = []
    seen: set[type] = set()

    def visit(service: type) -> None:
        if service in seen:
            return
        seen.add(service)
        for (caller, _), target in graph.edges.items():
            if caller is service:
                visit(target)
        order.insert(0, service.__name__)

    visit(graph.root)
    return order


def stop_groups(graph: Graph, services: list[str]) -> list[list[str]]:
    """``services`` (callers first) in groups that can end together: nobody in a group calls another one of it."""
    depth: dict[str, int] = {}
    for name in services:
        callers = [caller.__name__ for (caller, _), target in graph.edges.items() if target.__name__ == name]
        depth[name] = max((depth[caller] + 1 for caller in callers if caller in depth), default=0)
    return [[name for name in services if depth[name] == level] for level in sorted(set(depth.values()))]


def _elsewhere(given: list[str], graph: Graph) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        service, _, address = text.partition("=")
        if service not in graph.services or address.count("/") != 1:
            raise ConfigError(f"--depends {text}: must be Service=namespace/component of a service of this graph")
        found[service] = address
    return found


def _check_system_port(workers: int) -> None:
    """Raises ConfigError for a first port from which not every worker's could be read."""
    first = os.environ.get("DYN_SYSTEM_PORT", "")
    try:
        last = int(first or -1) + workers - 1
    except ValueError as error:
        raise ConfigError(f"DYN_SYSTEM_PORT={first}: must be a number") from error
    if last > MOST_SYSTEM_PORT:
        raise ConfigError(
            f"DYN_SYSTEM_PORT={first}: {workers} workers take the ports to {last}; the runtime reads none above "
            f"{MOST_SYSTEM_PORT}"
        )


def worker_environment(
    settings: Mapping[str, ServiceSettings], elsewhere: Mapping[str, str], *, verbose: bool
) -> dict[str, str]:
    """What workers get besides this process's environment; what the user has set there stays."""
    defaults = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_REQUEST_PLANE": "nats",
        # A worker that was stopped (SIGSTOP) takes no request; its callers must not wait long to learn that.
        "DYN_NATS_REQUEST_TIMEOUT_SECS": "2",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_LOG": "info" if verbose else "error,request_span=off,_core=off,dynamo_runtime::storage=off,tower_http=off",
        "DYNAMO_LOG": "INFO" if verbose else "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment = {key: os.environ.get(key, value) for key, value in defaults.items()}
    for key in ("DYN_FILE_KV", "ETCD_ENDPOINTS", "DYN_SYSTEM_PORT", "DYN_TCP_RESPONSE_STREAM_HOST"):
        if key in os.environ:
            environment[key] = os.environ[key]
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    split_credentials(given)
    environment |= given
    environment[ENVIRONMENT] = json.dumps({name: one.as_section() for name, one in settings.items()})
    if elsewhere:
        environment["DYNAMO_DEPENDS"] = json.dumps(elsewhere)
    return environment


def serve(arguments: argparse.Namespace, overrides: list[tuple[str, str, str]]) -> int:
    """Runs the command and returns its exit status."""
    plan = make_plan(arguments, overrides)
    if arguments.dry_run:
        print(json.dumps(plan.as_json(), indent=2))
        return 0
    check_nats()
    from dynamo_epd.sdk.nats_server import LocalNats, discovery_dir

    nats = LocalNats(join=bool(arguments.service_name)) if "NATS_SERVER" not in os.environ else None
    if nats is not None:
        plan.environment.update(nats.environment)
    url = plan.environment["NATS_SERVER"]
    if urlsplit(url if "//" in url else f"nats://{url}").hostname in ("127.0.0.1", "localhost", "::1"):
        # Replies come back over TCP to the caller. Where all is on this machine nobody else should reach that port.
        plan.environment.setdefault("DYN_TCP_RESPONSE_STREAM_HOST", "127.0.0.1")
    if plan.environment["DYN_DISCOVERY_BACKEND"] == "file":
        plan.environment.setdefault("DYN_FILE_KV", str(discovery_dir(url) if nats is None else nats.discovery))
        Path(plan.environment["DYN_FILE_KV"]).mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(_run(plan, nats, verbose=arguments.verbose))
    finally:
        if nats is not None:
            nats.close()


async def _run(plan: Plan, nats: Any, *, verbose: bool) -> int:
    from dynamo_epd.sdk.control import SOCKET, Control
    from dynamo_epd.sdk.scaling import Scaling, SystemPorts
    from dynamo_epd.sdk.supervisor import GraphFailed, Slot, Supervisor

    printer = _Printer()
    drain = float(os.environ.get("DYNAMO_DRAIN_SECONDS", DEFAULT_DRAIN))
    supervisor = Supervisor(
        [*stop_groups(plan.graph, plan.services), [NATS_SLOT]],
        drain=drain,
        start=float(os.environ.get("DYNAMO_START_SECONDS", DEFAULT_START)),
        verbose=verbose,
        show=printer.say,
        on_death=lambda slot: _forget(plan, slot.instance),
        on_give_up=lambda slot: scaling.gave_up(slot),
    )
    system_port = int(plan.environment.get("DYN_SYSTEM_PORT") or 0)
    # Without a port of the user's choice each worker gets a free one. -1 stands for none, but the planner reads them.
    with_ports = system_port >= 0 or PLANNER in plan.services
    ports = SystemPorts(system_port if system_port > 0 else None) if with_ports else None
    scaling = Scaling(plan, supervisor, ports, printer.say)
    stop = asyncio.Event()
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        stop.set()
        if signals > 1:
            supervisor.kill()
        else:
            printer.say("stopping: running requests finish first; once more to end at once")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    await supervisor.open()
    control = Control(plan, supervisor.directory, scaling)
    try:
        if nats is not None and nats.owned:
            await supervisor.start(Slot(NATS_SLOT, 0, nats.command, dict(os.environ), waits_for_ready=False))
            supervisor._said_ready.add(NATS_SLOT)
            await nats.answering()
        for slot in slots_of(plan, ports):
            if slot.service == PLANNER:
                slot.environment[SOCKET] = str(control.path)
            await supervisor.start(slot)
        await _until(stop, supervisor.ready())
        if not stop.is_set():
            await control.open()
            urls = [slot.url for slot in supervisor.slots.values() if slot.url]
            printer.say(urls[0] if urls else f"{plan.spec} is up")
            await _until(stop, supervisor.failed())
        await supervisor.stop()
        return 0 if signals < 2 else 1
    except GraphFailed as failure:
        printer.say("\n".join([*failure.tail, f"error: {failure}"]), sys.stderr)
        await supervisor.stop()
        return failure.status
    finally:
        control.close()
        supervisor.close()
        printer.close()


class _Printer:
    """Prints from a thread of its own, in order. Who writes to a terminal that is held (Ctrl-S, a connection that
    stalls), or to a pipe that nobody reads, stands still, and that must not be the loop that keeps the workers.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[TextIO | None, str]] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        with contextlib.suppress(OSError):
            print(end="", flush=True)  # what the graph's module has printed comes first
        threading.Thread(target=self._run, name="printer", daemon=True).start()

    def say(self, text: str, to: TextIO | None = None) -> None:
        """To standard output where nothing else is said. What finds no place among `MOST_WAITING` is left out."""
        try:
            self._waiting.put_nowait((to or sys.stdout, text))
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Waits until all is printed, `LAST_LINES_SECONDS` at most."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, LAST_LINES_SECONDS)

    def _run(self) -> None:
        while True:
            stream, text = self._waiting.get()
            if self._left_out and self._waiting.empty():
                text += f"\n({self._left_out} lines were left out here)"
                self._left_out = 0
            # A terminal that is gone must not keep the graph from being ended; there may have been none at all.
            with contextlib.suppress(OSError, AttributeError):
                rest = f"{text}\n".encode(errors="replace")
                while rest:  # not print(): Python could not end while a thread stands in it
                    rest = rest[os.write(stream.fileno(), rest) :]  # type: ignore[union-attr]
            self._waiting.task_done()


async def _until(stop: asyncio.Event, work: Any) -> None:
    """``work`` to its end, or until told to stop."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for one in (working, stopping):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await one


def slots_of(plan: Plan, ports: SystemPorts | None) -> list[Slot]:
    """One slot per worker that the configuration asks for."""
    workers = [(name, index) for name in plan.services for index in range(plan.settings[name].workers)]
    return [
        slot_for(
            plan, name, index, plan.shares.get(f"{name}-{index}"), ports.take(f"{name}-{index}") if ports else None
        )
        for name, index in workers
    ]


def slot_for(plan: Plan, name: str, index: int, share: Share | None, system_port: int | None) -> Slot:
    """A worker with its own environment. The root service gets the port; other HTTP services a free one."""
    from dynamo_epd.sdk.supervisor import Slot, python

    one = plan.settings[name]
    environment = dict(os.environ) | plan.environment | one.envs
    with_http = [service for service in plan.services if has_http(plan.graph.services[service])]
    if name in with_http:
        environment |= {HOST: plan.host, PORT: str(plan.port if name == with_http[0] else 0)}
    if system_port is not None:
        environment["DYN_SYSTEM_PORT"] = str(system_port)
    if share is not None:
        environment |= share.as_environment()
    elif plan.shares:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = python("dynamo_epd.sdk.worker", plan.spec, "--service-name", name, "--worker-index", str(index))
    return Slot(name, index, [*command, "--working-dir", plan.working_dir], environment)


def has_http(service: type) -> bool:
    """Whether its workers listen for HTTP."""
    info = info_of(service)
    return info.app is not None or bool(info.marked("api"))


def _forget(plan: Plan, instance: str | None) -> None:
    """Takes a dead worker out of the file discovery at once; by itself its entry would stay for its 10 s lease."""
    place = plan.environment.get("DYN_FILE_KV")
    if instance is not None and place is not None:
        for entry in Path(place).rglob(f"*{int(instance):x}"):
            entry.unlink(missing_ok=True)
