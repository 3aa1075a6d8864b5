# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""A toy graph in a directory of its own, to be built and deployed: a door, a store, and what Kubernetes is told."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from typing import Any

from dynamo_epd.sdk import DYNAMO_IMAGE, api, async_on_start, depends, endpoint, service, service_config


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """``gate``: a file without which the store does not open."""

    gate: str = ""
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


@service
class Door:
    store = depends(Store)
    till = depends(Till)
    planner = depends(Planner)

    @api()
    async def buy(self, order: dict[str, Any]) -> dict[str, Any]:
        return {"goods": [one async for one in self.store.fetch(order["what"])]}
