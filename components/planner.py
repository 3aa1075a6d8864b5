# SPDX-License-Identifier: Apache-2.0
"""The planner: gives each stage the workers that its own queue asks for. Every graph links it; by default it rests."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from typing import Any

from dynamo_epd.planning.policy import Limits, State, decide, mean_queue
from dynamo_epd.sdk import async_on_start, dynamo_context, liveness, on_shutdown, service, service_config
from dynamo_epd.sdk.config import ConfigError

log = logging.getLogger(__name__)

AFTER_REFUSAL_SECONDS = 30.0
"""A stage for which no other number could be had is left alone for so long."""
STARTING_SECONDS = 60.0
"""In which it is no news that the graph cannot be looked at."""
CONCURRENCY = {"EncodeWorker": 4, "PrefillWorker": 2, "DecodeWorker": 16, "ImageWorker": 4, "EmbedWorker": 32}
"""Where the configuration does not say: guesses for stages that batch. What a worker really runs at once in the time of
one request is for a load test to find; too high a guess is mended by the measured queue time, one worker at a time."""


@dataclasses.dataclass(frozen=True)
class PlannerConfig:
    """Keys of the ``Planner`` section."""

    no_operation: bool = True
    """While it is true no process is started."""
    interval: float = 1.0
    """Seconds from one look to the next."""
    stages: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Service → what it is held to: see Planner.stages. `dynamo scale` keeps to ``min`` and ``max`` too."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval <= 60:
            raise ConfigError("Planner.interval must be from 0.1 to 60 seconds")
        for stage in self.stages:
            self.limits(stage)

    def limits(self, stage: str) -> Limits:
        """What a stage is held to. Raises ConfigError for keys that there are not, and for values that cannot be."""
        given: dict[str, Any] = {key.replace("-", "_"): value for key, value in self.stages.get(stage, {}).items()}
        for key in ("min", "max", "concurrency"):
            if key in given and given[key] == int(given[key]):
                given[key] = int(given[key])
        try:
            return Limits(**({"concurrency": CONCURRENCY.get(stage, 1)} | given))
        except TypeError as error:
            known = ", ".join(field.name.replace("_", "-") for field in dataclasses.fields(Limits))
            raise ConfigError(f"Planner.stages.{stage} has keys that nothing reads; it may have {known}") from error
        except ValueError as error:
            raise ConfigError(f"Planner.stages.{stage}: {error}") from error


@service(config=PlannerConfig, runs_if=lambda config: not config.no_operation)
class Planner:
    """Looks at every stage once per interval. Services that report no stage (see `Metrics.stage`) are left alone."""

    def __init__(self) -> None:
        self.config = service_config(PlannerConfig)
        self.states: dict[str, State] = {}
        self.held_until: dict[str, float] = {}

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.metrics import Metrics
        from dynamo_epd.planning.doors import DoorClosed, door_of
        from dynamo_epd.planning.observing import Observer

        try:
            self.door = door_of(os.environ)
        except DoorClosed as closed:
            raise ConfigError(f"Planner: {closed}") from closed
        self.observer = Observer()
        self.metrics = Metrics(dynamo_context["namespace"], "Planner", "").planner()
        self.planning = asyncio.create_task(self._plan())

    async def _plan(self) -> None:
        from dynamo_epd.planning.doors import DoorClosed

        trouble, start = "", time.monotonic()
        while True:
            began = time.monotonic()
            try:
                await self.look()
                trouble = ""
            except DoorClosed as closed:  # also while the graph starts: its door opens when all of it is there
                if (self.states or began - start > STARTING_SECONDS) and str(closed) != trouble:
                    trouble = str(closed)
                    log.warning("cannot look at the graph: %s", trouble)
            await asyncio.sleep(max(0.05, began + self.config.interval - time.monotonic()))

    async def look(self) -> None:
        """One look at all stages, and what follows. Raises DoorClosed when the graph cannot be looked at."""
        from dynamo_epd.planning.doors import DoorClosed

        observed = await self.observer.look(await self.door.services())
        now = time.monotonic()
        for stage, seen in observed.items():
            state = self.states.get(stage, State())
            self.states[stage], decision = decide(state, seen, now, self.config.limits(stage))
            self.metrics.looked(
                stage,
                ready=seen.ready,
                target=seen.replicas if decision is None else decision.replicas,
                queue_seconds=mean_queue(self.states[stage], now) or 0.0,
            )
            if decision is None or now < self.held_until.get(stage, 0.0):
                continue
            try:
                await self.door.scale(stage, decision.replicas, decision.reason)
            except DoorClosed as closed:
                self.held_until[stage] = now + AFTER_REFUSAL_SECONDS
                log.warning("%s stays at %d workers, not %d: %s", stage, seen.replicas, decision.replicas, closed)
            else:
                self.metrics.decided(stage, seen.replicas, decision.replicas)

    @liveness
    def plans(self) -> bool:
        """A planner whose loop has ended is started again."""
        return not self.planning.done()

    @on_shutdown
    async def stop(self) -> None:
        if hasattr(self, "planning"):
            self.planning.cancel()
            await self.observer.close()
