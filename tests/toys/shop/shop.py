# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""A toy graph in a directory of its own, to be built and deployed: a door, a store, and what Kubernetes is told."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo_epd.sdk import DYNAMO_IMAGE, api, async_on_start, depends, endpoint, service, service_config


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """``gate``: a file without which the store does not open. ``line``: a directory; as long as it is there, who
    fetches something stands in it."""

    gate: str = ""
    line: str = ""
    shelves: int = 3


@service(
    config=StoreConfig,
    image=DYNAMO_IMAGE,
    resources={"cpu": "2", "memory": "4Gi", "gpu": 0.5},
    envs=[{"name": "PAINT", "value": "red"}],
    labels={"street": "main"},
)
class Store:
    @async_on_start
    async def open(self) -> None:
        gate = service_config(StoreConfig).gate
        while gate and not os.path.exists(gate):  # noqa: ASYNC240 - a moment
            await asyncio.sleep(0.05)

    @endpoint()
    async def fetch(self, what: str) -> AsyncIterator[str]:
        from goods.words import label  # only here: the build must find it all the same

        line = service_config(StoreConfig).line
        if line and os.path.isdir(line):  # noqa: ASYNC240 - a moment
            Path(line, what).touch()  # noqa: ASYNC240
        while line and os.path.isdir(line):  # noqa: ASYNC240
            await asyncio.sleep(0.05)
        yield label(what)


@service(dynamo={"component_type": "prefill"}, image="example/till:1.2.3", kubernetes_overrides={"cmd": ["till"]})
class Till:
    @endpoint()
    async def generate(self, what: str) -> AsyncIterator[str]:
        yield what


@dataclasses.dataclass(frozen=True)
class PlannerConfig:
    no_operation: bool = True


@service(config=PlannerConfig, runs_if=lambda config: not config.no_operation)
class Planner:
    pass


@dataclasses.dataclass(frozen=True)
class DoorConfig:
    patience: float = 0.0

    @property
    def request_seconds(self) -> float:
        return self.patience


@service(config=DoorConfig)
class Door:
    store = depends(Store)
    till = depends(Till)
    planner = depends(Planner)

    @api()
    async def buy(self, order: dict[str, Any]) -> dict[str, Any]:
        return {"goods": [one async for one in self.store.fetch(order["what"])]}
