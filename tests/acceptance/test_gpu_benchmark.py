# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.gpu` on a CPU: toy runs of many models, each in both modes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import report, sweep
from tests.test_gpu_benchmark import NAMES, SETUP, has_reported, tower

pytestmark = pytest.mark.usefixtures("compiling")


def test_the_toy_run_reports_every_model_in_both_modes(tmp_path: Path) -> None:
    has_reported(NAMES, tmp_path)


def test_precision_counts_where_its_goal_does() -> None:
    """On a CPU bfloat16 may be slower: that both were run is shown, and not which one is faster."""
    swept = sweep.sweep(tower("flux"), replace(SETUP, dtype=torch.bfloat16))
    assert swept.base is not None and (swept.base.mode, swept.base.batch) == ("eager", 1)
    assert swept.base.items_per_second and swept.base.of_matmul is None, "the floors are another precision's"
    assert swept.base.seconds != swept.runs[0].seconds and swept.parameter_bytes == 2 * swept.parameters
    assert "Eager in float32, batch 1" in report.markdown([swept], SETUP, toy=True)
    alike = sweep.sweep(tower("flux"), SETUP)
    assert alike.base is not None and alike.base.seconds == alike.runs[0].seconds, "it was run already"
    assert sweep.sweep(tower("clip"), SETUP).base is None
