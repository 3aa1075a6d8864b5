# SPDX-License-Identifier: Apache-2.0
"""The loop that the recipes train with. Its compiled layers: acceptance/test_fused_layers.py."""

from __future__ import annotations

import itertools
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from models import training
from tests.toys.running import ROOT


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + nn.functional.silu(self.linear(rows)) * 0.5


@pytest.mark.usefixtures("threads_as_before")
def test_recipes_at_work_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    monkeypatch.setattr(training, "_at_work", [])
    monkeypatch.setattr(training, "keep_memory", lambda: None)  # it cannot be undone in this process
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda _: set(range(4)))
    training.share_cores("one")
    training.take_cores()
    assert torch.get_num_threads() == 4
    hold = "from pathlib import Path; from models import training; training.WORK = Path({!r}); "
    code = hold.format(str(tmp_path)) + "training.share_cores('two'); print('there', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "there\n"
        training.take_cores()
        assert torch.get_num_threads() == 2
        other.communicate("\n")
    training.take_cores()
    assert torch.get_num_threads() == 4, "the other one has ended"


def test_a_long_run_takes_the_cores_that_another_recipe_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    asked = []
    monkeypatch.setattr(training, "take_cores", lambda: asked.append(1))
    layer = Layer()
    training.Run("layer", layer, 3, 1e-2).train(lambda _: (layer(torch.ones(1, 8)).sum(), {}))
    assert len(asked) == 1 + 3, "at the start, and with each save"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(("kept", "less"), [("pass", False), ("training.keep_memory()", True)])
def test_what_is_freed_is_kept_for_what_is_allocated_next(kept: str, less: bool) -> None:
    code = f"""
import resource
import torch
from models import training
{kept}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults() * resource.getpagesize())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert (int(done.stdout) < 64 << 20) is less


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_compiler_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer = Layer()
    training.fuse([layer])
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_that_ended_early_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: bool
) -> None:
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

        return training.Run("layer", layer, 12, 1e-2, average=0.9, layers=[layer] if muon else []).train(loss)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", until=5)
    resumed = trained(tmp_path / "broken")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    torch.manual_seed(0)
    layer = Layer()
    before = {name: one.detach().clone() for name, one in layer.named_parameters()}
    rows = torch.randn(16, 8)
    run = training.Run("layer", layer, 1, 1e-2, layers=[layer])
    run.train(lambda _: ((layer(rows) - rows.flip(-1)).square().mean(), {}))
    step = {name: (one.detach() - before[name]) / 1e-2 for name, one in layer.named_parameters()}
    # Muon's update is nearly orthogonal, whatever the gradient's scale and rank: all directions are moved alike.
    lengths = torch.linalg.svdvals(step["linear.weight"]) / (0.2 * 8**0.5)
    assert lengths.min() > 0.5 and lengths.max() < 1.5
    # AdamW's first one is the gradient's sign.
    torch.testing.assert_close(step["linear.bias"].abs(), torch.ones(8), atol=0.02, rtol=0)
