# SPDX-License-Identifier: Apache-2.0
"""The loop that the recipes train with."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from models import training


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + nn.functional.silu(self.linear(rows)) * 0.5


@pytest.mark.usefixtures("compiling")
@pytest.mark.skipif(shutil.which("g++") is None, reason="layers are compiled by a C++ compiler")
def test_a_fused_layer_computes_and_learns_the_same() -> None:
    torch.manual_seed(0)
    layer = Layer()
    found = []
    for length in (3, 5, 9):
        rows = torch.randn(length, 8)
        layer.zero_grad()
        value = layer(rows)
        value.square().sum().backward()
        assert layer.linear.weight.grad is not None
        found.append((rows, value.detach(), layer.linear.weight.grad.clone()))
    training.fuse([layer])
    for rows, value, gradient in found:
        layer.zero_grad()
        fused = layer(rows)
        fused.square().sum().backward()
        torch.testing.assert_close(fused.detach(), value)
        torch.testing.assert_close(layer.linear.weight.grad, gradient)


def test_without_a_compiler_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer = Layer()
    training.fuse([layer])
    assert "forward" not in vars(layer)


def test_a_run_that_ended_early_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(work: Path, *, until: int = -1) -> nn.Module:
        monkeypatch.setattr(training, "WORK", work)
        torch.manual_seed(0)
        layer = Layer()
        steps = itertools.count()

        def loss(chance: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
            if next(steps) == until:
                raise KeyboardInterrupt
            rows = torch.tensor([[chance.random() for _ in range(8)] for _ in range(4)])
            return (layer(rows) - rows.flip(-1)).square().mean(), {}

        return training.Run("layer", layer, 12, 1e-2, average=0.9).train(loss)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", until=5)
    resumed = trained(tmp_path / "broken")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
