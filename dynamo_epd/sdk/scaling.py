# SPDX-License-Identifier: Apache-2.0
"""The number of workers of a running service: what may change it, what each worker holds, and giving that back.

A grow takes the lowest index that is free; a shrink those who are not ready, then the highest. A worker that leaves
keeps its index, its port and its GPUs until it has drained; then the next one may have them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from dynamo_epd.sdk.config import PLANNER, ConfigError
from dynamo_epd.sdk.gpus import Share
from dynamo_epd.sdk.serve import MOST_SYSTEM_PORT, Plan, slot_for
from dynamo_epd.sdk.supervisor import Slot, Supervisor

MAX_WORKERS = 64
"""Of one service on one machine, where the configuration sets no lower bound."""
FREE_PORTS = 20000, MOST_SYSTEM_PORT + 1
"""Above, Linux gives ports to clients anyway."""
AFTER_FAILURE_SECONDS = 60.0
"""A service one of whose added workers did not come up gets no other one for so long."""


class ScalingRefused(Exception):
    """That number of workers cannot be. The message is one line for whoever asked."""


class SystemPorts:
    """A system port for each worker: in a row from ``first``, or any free ones of this host."""

    def __init__(self, first: int | None):
        self._first = first
        self._taken: dict[str, int] = {}

    def take(self, worker: str) -> int:
        """Raises ScalingRefused when there is none left that the runtime reads."""
        taken = set(self._taken.values())
        if self._first is None:
            port = _free_port(taken)
        elif (port := next((one for one in range(self._first, MOST_SYSTEM_PORT + 1) if one not in taken), 0)) == 0:
            raise ScalingRefused(f"no free system port from {self._first} to {MOST_SYSTEM_PORT}")
        self._taken[worker] = port
        return port

    def of(self, worker: str) -> int | None:
        return self._taken.get(worker)

    def give_back(self, worker: str) -> None:
        self._taken.pop(worker, None)


def _free_port(taken: set[int]) -> int:
    """From another place in the range for each process that looks: two graphs that start together do not meet."""
    first, last = FREE_PORTS
    for step in range(last - first):
        port = first + (os.getpid() * 61 + step) % (last - first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in taken:
                return port
    raise ScalingRefused("no free system port")


class Scaling:
    """What `dynamo scale` and the planner ask of a graph that runs under ``supervisor``."""

    def __init__(
        self,
        plan: Plan,
        supervisor: Supervisor,
        ports: SystemPorts | None,
        show: Callable[[str], None],
    ):
        self._plan, self._supervisor, self._ports, self._show = plan, supervisor, ports, show
        self._shares = dict(plan.shares)
        self._failed: dict[str, float] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    def status(self) -> dict[str, Any]:
        """Service → its workers: ``index``, ``ready``, ``leaving``, and ``metrics``, ``url``, ``pid``, each or None."""
        return {
            name: [
                {
                    "index": slot.index,
                    "ready": slot.ready and slot.ending is None,
                    "leaving": slot.ending is not None,
                    "metrics": self._metrics(slot),
                    "url": slot.url,
                    "pid": slot.pid,
                }
                for slot in self._slots(name)
            ]
            for name in self._plan.services
        }

    async def resize(self, service: str, count: int, why: str) -> int:
        """Starts workers, or lets some drain, until ``count`` stay; returns how many there were.

        Neither is waited for. ``why`` is shown. Raises ScalingRefused, and then nothing has changed.
        """
        async with self._one_at_a_time:
            if self._supervisor.stopping:
                raise ScalingRefused("the graph is being stopped")
            staying = self._staying(service)
            before = len(staying)
            self._check(service, before, count)
            indices = self._free_indices(service, count - before)
            shares = self._shares_for(service, indices)
            ports = self._ports_for(service, indices)
            if count != before:
                self._show(f"{service}: {before} → {count} workers ({why})")
            for index in indices:
                name = f"{service}-{index}"
                if (share := shares.get(name)) is not None:
                    self._shares[name] = share
                slot = slot_for(self._plan, service, index, share, ports.get(name))
                slot.added = True
                await self._supervisor.start(slot)
            for slot in staying[count:]:
                task = asyncio.create_task(self._leave(slot))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
            return before

    def gave_up(self, slot: Slot) -> None:
        """For the supervisor: an added worker did not come up."""
        self._failed[slot.service] = time.monotonic()
        self._give_back(slot)

    async def _leave(self, slot: Slot) -> None:
        await self._supervisor.remove(slot)
        self._give_back(slot)
        self._show(f"{slot.name} has left")

    def _give_back(self, slot: Slot) -> None:
        self._shares.pop(slot.name, None)
        if self._ports is not None:
            self._ports.give_back(slot.name)

    def _slots(self, service: str) -> list[Slot]:
        slots = [slot for slot in self._supervisor.slots.values() if slot.service == service]
        return sorted(slots, key=lambda slot: slot.index)

    def _staying(self, service: str) -> list[Slot]:
        """Who is to stay longest comes first: where one that keeps dying stayed for one that serves, nobody would."""
        staying = [slot for slot in self._slots(service) if slot.ending is None]
        return sorted(staying, key=lambda slot: not slot.ready)

    def _metrics(self, slot: Slot) -> str | None:
        port = None if self._ports is None else self._ports.of(slot.name)
        return None if port is None else f"http://127.0.0.1:{port}/metrics"

    def _check(self, service: str, before: int, count: int) -> None:
        if service not in self._plan.services:
            raise ScalingRefused(f"{service} does not run here; there is {', '.join(self._plan.services)}")
        least, most = bounds_of(self._plan, service)
        if count < least:
            raise ScalingRefused(
                f"{service} keeps at least {least} of its workers: {bound_key(service, 'min')} says more"
            )
        if count > most:
            raise ScalingRefused(f"{service} may have at most {most} workers: {bound_key(service, 'max')} says more")
        if count <= before:
            return
        since = time.monotonic() - self._failed.get(service, float("-inf"))
        if since < AFTER_FAILURE_SECONDS:
            left = AFTER_FAILURE_SECONDS - since
            raise ScalingRefused(f"a worker of {service} did not come up; wait {left:.0f} s before another try")

    def _free_indices(self, service: str, more: int) -> list[int]:
        taken = {slot.index for slot in self._slots(service)}
        return [index for index in range(len(taken) + max(0, more)) if index not in taken][: max(0, more)]

    def _shares_for(self, service: str, indices: list[int]) -> dict[str, Share]:
        request = float(self._plan.settings[service].resources.get("gpu") or 0)
        if not indices or not request or not any(name.startswith(f"{service}-") for name in self._plan.shares):
            return {}
        held = dict(self._shares)
        found: dict[str, Share] = {}
        for index in indices:
            share = free_share(request, self._plan.devices, held)
            if share is None:
                leaving = any(slot.ending is not None for slot in self._supervisor.slots.values())
                hint = "; a worker that drains still has its own" if leaving else ""
                raise ScalingRefused(f"too few GPUs: {service}-{index} finds none left{hint}")
            found[f"{service}-{index}"] = held[f"{service}-{index}"] = share
        return found

    def _ports_for(self, service: str, indices: list[int]) -> dict[str, int]:
        """Raises ScalingRefused, and takes none then."""
        found: dict[str, int] = {}
        if self._ports is None:
            return found
        try:
            for index in indices:
                found[f"{service}-{index}"] = self._ports.take(f"{service}-{index}")
        except ScalingRefused:
            for name in found:
                self._ports.give_back(name)
            raise
        return found


def bounds_of(plan: Plan, service: str) -> tuple[int, int]:
    """The fewest and the most workers of a service: ``Planner.stages`` says it, switched on or not."""
    if service == PLANNER:
        return 1, 1
    settings = plan.settings.get(PLANNER)
    stages: Mapping[str, Mapping[str, float]] = getattr(settings.config, "stages", {}) if settings else {}
    given = stages.get(service, {})
    return int(given.get("min", 1)), int(given.get("max", MAX_WORKERS))


def bound_key(service: str, key: str) -> str:
    return f"{PLANNER}.stages.{service}.{key}"


def free_share(request: float, devices: list[str], held: Mapping[str, Share]) -> Share | None:
    """Cards that nobody of ``held`` has; for a fraction also the rest of a card that is shared already."""
    used: dict[str, float] = {}
    for share in held.values():
        for device in share.devices:
            used[device] = used.get(device, 0.0) + share.fraction
    if request >= 1:
        free = [device for device in devices if device not in used]
        return Share(tuple(free[: int(request)])) if len(free) >= request else None
    # a card in use first: whole ones stay free for whom only a whole one will do
    for device in sorted(devices, key=lambda one: one not in used):
        if used.get(device, 0.0) + request <= 1 + 1e-9:
            return Share((device,), request)
    return None


def split_assignments(texts: list[str]) -> dict[str, int]:
    """``Service=N`` → numbers. Raises ConfigError."""
    found: dict[str, int] = {}
    for text in texts:
        service, _, number = text.partition("=")
        if not service or not number.isdecimal() or len(number) > 4:
            raise ConfigError(f"{text}: must be Service=N, with the number of workers")
        found[service] = int(number)
    return found
