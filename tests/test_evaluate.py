# SPDX-License-Identifier: Apache-2.0
"""A sample of every figure that the model cards show, from the weights that are in the repository."""

from __future__ import annotations

import json

import pytest

from models.evaluate import GOALS, evaluate
from tests.toys.running import ROOT

CASES = {"llava": 40, "t5": 200, "image": 12, "together": 20}
SLACK = 0.12
"""A sample of forty of what is right in 95 of 100 has 34 right or more in 99 of 100 samples."""


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", GOALS)
def test_a_sample_is_as_the_card_says(name: str) -> None:
    card = json.loads((ROOT / "models/tiny" / name / "figures.json").read_text())
    for figure, found in evaluate(name, CASES[name]).items():
        assert found["of"] >= CASES[name]
        said = min(found["goal"], card[figure]["right"] / card[figure]["of"])
        assert found["right"] / found["of"] >= said - SLACK, (figure, found)


@pytest.mark.parametrize("name", ["llava", "t5", "image"])
def test_the_card_shows_the_figures_that_were_measured(name: str) -> None:
    card = (ROOT / "models/tiny" / name / "README.md").read_text()
    figures = json.loads((ROOT / "models/tiny" / name / "figures.json").read_text())
    results = (ROOT / "models/tiny" / name / "results.jsonl").read_text().splitlines()
    assert len(results) == sum(found["of"] for found in figures.values())
    assert sum(json.loads(line)["right"] for line in results) == sum(found["right"] for found in figures.values())
    for figure, found in figures.items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| **{figure}** |")]
        assert f"{100 * found['right'] / found['of']:.1f} %" in row


def test_all_weights_together_are_small() -> None:
    weights = [path.stat().st_size for path in (ROOT / "models/tiny").rglob("*.safetensors")]
    assert weights
    assert sum(weights) <= 40e6
