# SPDX-License-Identifier: Apache-2.0
"""The planner's place in a graph. Its policy is not part of this version: it stays at no operation."""

from __future__ import annotations

import dataclasses

from dynamo_epd.sdk import service
from dynamo_epd.sdk.config import ConfigError


@dataclasses.dataclass(frozen=True)
class PlannerConfig:
    """``no_operation``: True starts no process."""

    no_operation: bool = True

    def __post_init__(self) -> None:
        if not self.no_operation:
            raise ConfigError("the planner's policy is not part of this version; leave no-operation at true")


@service(config=PlannerConfig, runs_if=lambda config: not config.no_operation)
class Planner:
    """Every graph links it, so that ``--Planner.no-operation`` is always known."""
