# SPDX-License-Identifier: Apache-2.0
"""What this project wants of a GPU. Apart, so that whoever names the goals needs no torch for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuGoal:
    """At least so many ``times``."""

    what: str
    times: float
    measured_by: str = ""
    """A command; empty where nothing measures it yet."""

    @property
    def missing(self) -> str:
        """Why a report without a GPU has no figure of it."""
        return (
            f"this run uses no GPU; `{self.measured_by}` measures it" if self.measured_by else "nothing measures it yet"
        )


COMMAND = "python -m benchmarks.gpu"
COLOCATED = GpuGoal("five pictures, encode and decode on one card against aggregated: time to first token", 1.8)
FASTER = GpuGoal("FLUX's transformer, a step, compiled against eager in float32", 2.3, COMMAND)
OF_MATMUL = GpuGoal(
    "ViT-L and T5-XXL in their best batches, the lesser of the two, of the measured matmul rate", 0.7, COMMAND
)
GOALS = (COLOCATED, FASTER, OF_MATMUL)
