# SPDX-License-Identifier: Apache-2.0
"""What a report's rows make of their samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.figures import Goal, Row, Samples, percentile, ratios, shown


def row(limit: float = 1.0, void: str = "") -> Row:
    samples = [Samples("ours", [1.0, 3.0, 2.0], "ms"), Samples("theirs", [4.0, 5.0, 90.0], "ms")]
    goal = Goal("ours against theirs", ratios(samples[0].values, samples[1].values), "≤", limit)
    return Row(7, "a title", "a setting", samples, [goal], ["a note"], void, model="a model")


def test_a_goal_is_met_by_the_median_of_its_pairs() -> None:
    assert row(0.25).goals[0].median == 0.25
    assert row(0.25).met and not row(0.24).met
    assert Goal("more", [1.0, 2.0, 9.0], "≥", 2.0).met
    assert not row(9.0, void="answers differ").met, "a void row meets nothing"
    assert not Row(1, "t", "s").met, "nor does one without a goal"


@pytest.mark.parametrize(
    ("goal", "judged", "met", "text"),
    [
        (Goal("g", [1.0, 1.0, 2.0], "≤", 1.0, "encodes"), 1.0, True, "1.00 encodes (1.00 … 2.00); goal"),
        (
            Goal("g", [1.0, 1.0, 2.0], "≤", 1.0, "encodes", worst=True),
            2.0,
            False,
            "2.00 encodes at worst (median 1.00,",
        ),
        (Goal("g", [3.0, 4.0, 5.0], "≥", 3.0, worst=True), 3.0, True, "3.00 times at worst (median 4.00, 3.00 … 5.00)"),
        (Goal("g", [0.5, 1.0, 1.0], "<", 1.0, worst=True), 1.0, False, "1.00 times at worst (median 1.00, 0.5 … 1.00)"),
    ],
)
def test_what_is_right_or_wrong_is_judged_by_its_worst_value(goal: Goal, judged: float, met: bool, text: str) -> None:
    assert (goal.judged, goal.met) == (judged, met) and str(goal).startswith(text)


def test_a_worst_value_that_was_not_measured_is_not_met() -> None:
    goal = Goal("g", [], "≤", 1.0, worst=True)
    assert not goal.met and str(goal).startswith("not measured")


def test_a_void_row_without_goals_says_why_in_the_table(tmp_path: Path) -> None:
    text = report.write([Row(9, "t", "s", void="a | b")], "a command", tmp_path)
    assert "| 9 | t |  | a / b | void |" in text and "**Void: a | b.**" in text


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("share", "value"), [(0.01, 1), (0.5, 5), (0.51, 6), (0.99, 10), (1.0, 10)])
def test_a_percentile_was_measured(share: float, value: float) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], share) == value


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (12345.6, "12,346"), (float("inf"), "inf")]
)
def test_figures_are_short(value: float, text: str) -> None:
    assert shown(value) == text


def test_a_report_says_which_goals_are_missed(tmp_path: Path) -> None:
    text = report.write([row(0.2), row(9.0, void="answers differ")], "python -m benchmarks --row 7", tmp_path)
    assert (
        "| 7 | a title: ours against theirs | a model | 0.25 times (0.0222 … 0.6); goal ≤ 0.2 times | **no** |" in text
    )
    assert "| void |" in text and "**Void: answers differ.**" in text
    assert text.count("The goal: goodput (TTFT and ITL limits), 4 images a request: ≥ 2.0x AGG, ≥ 1.3x STOCK;") == 2
    assert "| theirs | 5.00 (4.00 … 90.00) ms |" in text and "- a note" in text
    written = json.loads((tmp_path / "report.json").read_text())
    assert [one["met"] for one in written["rows"]] == [False, False]
    assert written["machine"]["cores"] >= 1 and written["machine"]["versions"]["nixl"]
    assert (tmp_path / "row-7.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.md").read_text() == text
