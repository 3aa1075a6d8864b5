# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights: whoever writes one has everybody's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import untrained


@pytest.mark.parametrize("family", sorted(untrained.WRITERS))
def test_a_checkpoint_is_the_same_whatever_was_drawn_before(family: str, tmp_path: Path) -> None:
    written = []
    for seed in (1, 2):
        directory = tmp_path / str(seed) / family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained.write(family, directory)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        written.append({path.relative_to(directory): path.read_bytes() for path in files})
    first, second = written
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert any(name.suffix == ".safetensors" for name in first)
