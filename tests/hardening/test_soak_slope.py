# SPDX-License-Identifier: Apache-2.0
"""What `soak` makes of series whose growth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hardening import report as report_module
from tests.hardening.report import Report
from tests.hardening.soak import CANNOT_BE_TOLD, EVERY, GROWS, HOUR, LASTING, MIB, WARM_UP, Bounds, Series, slope, told

BOUNDS = Bounds(mib=20, descriptors=5, threads=5)
AT = np.arange(0, HOUR, EVERY)
NOISE = np.random.default_rng(7).normal(size=len(AT))
"""Of 1 MiB, the same in every run."""
MIDDLE = (1 + WARM_UP) / 2
"""Of what is judged, as a share of the run."""


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Report]:
    monkeypatch.setattr(report_module, "DIRECTORY", tmp_path)
    monkeypatch.setattr(report_module, "ROOT", tmp_path)
    with Report("judged") as one:
        yield one


def series(mib: Any, descriptors: Any = 40, threads: Any = 20, at: Any = AT, name: str = "one") -> Series:
    def all_of(values: Any) -> list[int]:
        return [int(value) for value in np.broadcast_to(values, len(at))]

    memory = all_of(np.asarray(mib) * MIB)
    return Series(name, list(map(float, at)), memory, all_of(descriptors), all_of(threads))


def grown(an_hour: float) -> Any:
    return an_hour * AT / HOUR


def step(height: float, share: float = MIDDLE) -> Any:
    return np.where(share * HOUR <= AT, height, 0)


def test_the_slope_of_a_line_is_its_own_and_has_no_error() -> None:
    assert slope(AT, 100 + grown(30)) == pytest.approx((30, 0), abs=1e-6)
    assert slope(AT, np.full(len(AT), 100)) == (0, 0)


def test_the_slope_of_noise_lies_within_twice_its_error_and_shrinks_with_samples() -> None:
    found, error = slope(AT, 100 + grown(30) + NOISE)
    assert abs(found - 30) < 2 * error
    assert error == pytest.approx(1 / np.sqrt(len(AT) / 12), rel=0.2)  # of a line through even samples of an hour
    assert slope(AT[::10], NOISE[::10])[1] > 2 * error


@pytest.mark.parametrize(
    ("mib", "said"),
    [
        (lambda: 200, []),
        (lambda: 200 + NOISE, []),
        (lambda: 200 + NOISE + grown(10), []),
        (lambda: 200 + NOISE + grown(60), [f"one MiB: {GROWS}"]),
        (lambda: 200 + NOISE - grown(60), []),
        (lambda: 200 + 50 * NOISE, [f"one MiB: {CANNOT_BE_TOLD}"]),
        (lambda: 1000 + 50 * NOISE + grown(20), [f"one MiB: {CANNOT_BE_TOLD}"]),
        (lambda: 1000 + 50 * NOISE + grown(600), [f"one MiB: {GROWS}"]),
        (lambda: 200 + NOISE + step(5), []),
        (lambda: 200 + NOISE + step(50), [f"one MiB: {GROWS}"]),
        (lambda: 200 + NOISE + step(500, share=WARM_UP / 2), []),
    ],
    ids=[
        "flat", "noise", "a small leak", "a leak", "shrinking", "much noise", "a leak in much noise",
        "a leak beyond much noise", "a small step", "a step", "a step in the warm-up",
    ],
)  # fmt: skip
def test_what_is_told_of_memory(report: Report, mib: Callable[[], Any], said: list[str]) -> None:
    assert told([series(mib())], report, HOUR, BOUNDS) == said


@pytest.mark.parametrize("what", ["descriptors", "threads"])
def test_what_is_told_of_descriptors_and_threads(report: Report, what: str) -> None:
    many: dict[str, Any] = {what: 40 + grown(12)}
    assert told([series(200, **many)], report, HOUR, BOUNDS) == [f"one {what}: {GROWS}"]
    noisy: dict[str, Any] = {what: 400 + 20 * NOISE}
    assert told([series(200, **noisy)], report, HOUR, BOUNDS) == [f"one {what}: {CANNOT_BE_TOLD}"]
    once: dict[str, Any] = {what: 40 + step(1)}
    assert told([series(200, **once)], report, HOUR, BOUNDS) == []


def test_whoever_lived_too_short_is_named_and_everybody_else_judged(report: Report) -> None:
    lasting = HOUR * (1 - WARM_UP - LASTING) - EVERY
    leak, late = 200 + grown(60), lasting <= AT
    short, long = AT[lasting + 3 * EVERY < AT], AT[late]
    found = [
        series(leak[-len(short) :], at=short, name="short"),
        series(leak[-len(long) :], at=long, name="late"),
        series(leak[: len(AT) // 2], at=AT[: len(AT) // 2], name="ended"),
    ]
    assert told(found, report, HOUR, BOUNDS) == [f"late MiB: {GROWS}", f"ended MiB: {GROWS}"]
    assert [one["process"] for one in report._found["slopes"]] == ["late", "ended"]
    (named,) = report._found["not_judged"]
    assert named.startswith("short (")


def test_a_run_in_which_nobody_lived_long_enough_proves_nothing(report: Report) -> None:
    assert told([series(200, at=AT[:3])], report, HOUR, BOUNDS)


def test_what_has_no_descriptors_is_judged_by_its_memory(report: Report) -> None:
    shared = Series("/dev/shm", list(AT), [int(value) for value in (200 + grown(60)) * MIB])
    assert told([shared], report, HOUR, BOUNDS) == [f"/dev/shm MiB: {GROWS}"]
