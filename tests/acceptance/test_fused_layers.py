# SPDX-License-Identifier: Apache-2.0
"""What the recipes compile of a model. Half a minute: a compiler works on it, forwards and backwards."""

from __future__ import annotations

import shutil

import pytest
import torch

from models import training
from tests.test_training import Layer


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
