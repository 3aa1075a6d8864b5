# SPDX-License-Identifier: Apache-2.0
"""The same answer: two families, both graphs, 400 requests each, against one plain engine asked one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.questions import Said, ask_all, assert_same, difference, question
from tests.reference import NAME, Reference, plain_engine
from tests.serving import serve, untrained

ALONE = [question(seed) for seed in range(400_000, 400_200)]
AT_ONCE = [question(seed) for seed in range(400_200, 400_400)]
CROWD = 16


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> Path:
    return untrained(request.param)


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Reference]:
    with plain_engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(plain: Reference) -> dict[int, Said]:
    """Answers to all questions, asked one by one, by the question's place."""
    return dict(enumerate(ask_all(plain.url, ALONE + AT_ONCE, model=NAME)))


@pytest.mark.parametrize("shape", ["agg", "disagg"])
def test_every_answer_is_that_of_the_plain_engine(
    shape: str, model: Path, expected: dict[int, Said], capsys: pytest.CaptureFixture[str]
) -> None:
    want = list(expected.values())
    with serve(f"graphs.{shape}:Frontend", f"configs/tiny-{shape}.yaml", model=model) as graph:
        rounds: list[tuple[str, list[dict[str, Any]], list[Said], int]] = [
            ("alone, cold", ALONE, want[:200], 1),
            ("at once, cold", AT_ONCE, want[200:], CROWD),
            ("alone, from caches", AT_ONCE, want[200:], 1),
            ("at once, from caches", ALONE, want[:200], CROWD),
        ]
        for name, questions, answers, at_once in rounds:
            got = ask_all(graph.url, questions, at_once)
            with capsys.disabled():
                print(f"\n{model.name}, {shape}, {name}: {_summary(answers, got)}")
            assert_same(answers, got)


def test_the_plain_engine_itself_at_16_at_once(
    model: Path, plain: Reference, expected: dict[int, Said], capsys: pytest.CaptureFixture[str]
) -> None:
    """For comparison: what batching alone does to the plain engine's answers."""
    got = ask_all(plain.url, ALONE, CROWD, model=NAME)
    with capsys.disabled():
        print(f"\n{model.name}, plain engine, at once: {_summary(list(expected.values())[:200], got)}")
    assert len(got) == len(ALONE)


def _summary(expected: list[Said], got: list[Said]) -> str:
    found = [difference(want, have) for want, have in zip(expected, got, strict=True)]
    near = sum(one is not None and one.startswith("near tie") for one in found)
    return f"{found.count(None)} equal, {near} near ties, {len(found) - found.count(None) - near} others"
