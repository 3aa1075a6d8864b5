# SPDX-License-Identifier: Apache-2.0
"""Row 1: a whole answer about one picture, one client, beside plain vLLM and Dynamo's stages; and a graph at rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from benchmarks.arms import Arm
from benchmarks.checkpoints import TINY
from benchmarks.figures import Goal, Row, Samples, Sense, ratios
from benchmarks.load import Told, ask, chat, picture, session
from benchmarks.standing import Standing, agree, lost, note_masks, rotated, turn

NUMBER = 1
TITLE = "whole answer, one client"
ARMS = ("AGG", "AGG-tuned", "STOCK", "STOCK-tuned", "OURS-agg", "OURS-disagg")
TOKENS = 16
WARM_UP = 2
PAIRS = 5
"""Of answers, at least, that a ratio is taken from."""
IDLE_SECONDS = 3.0
IDLE_REPEATS = 5
RESTING = ("OURS-agg", "OURS-disagg")
"""Arms whose rest a goal is set for."""
QUESTION = "What is in this picture?"


async def measure(standing: Standing, repeats: int) -> Row:
    """All six arms stand at once; those that spin while nobody asks them are stopped meanwhile."""
    row = Row(NUMBER, TITLE, f"{TINY}, one new picture and {TOKENS} tokens a question, {repeats} repeats by turns")
    arms = standing.arms(row, TINY, ARMS)
    told: dict[str, list[Told]] = {name: [] for name in arms}
    async with session() as client:
        for repeat in range(WARM_UP + repeats):
            body = chat(QUESTION, [picture(repeat)], tokens=TOKENS)
            for name, arm in rotated(arms, repeat):
                if lost(told[name]):
                    told[name].append(told[name][-1])
                    continue
                async with turn(client, arm, row):
                    told[name].append(await ask(client, arm.url, body))
    note_masks(row, arms)
    resting = await at_rest([arm for arm in arms.values() if not arm.spins])
    fill(row, {name: answers[WARM_UP:] for name, answers in told.items()}, resting)
    return row


def fill(row: Row, told: Mapping[str, Sequence[Told]], resting: Mapping[str, Sequence[float]]) -> None:
    """Samples and goals. ``resting``: shares of a core, by arm."""
    agree(row, told)
    for name, answers in told.items():
        row.samples.append(Samples(name, [1e3 * one.whole for one in answers if not one.failed], "ms"))
    shares = {name: [100 * one for one in of] for name, of in resting.items()}
    row.samples += [Samples(f"{name} at rest", of, "% of a core") for name, of in shares.items()]
    if row.void:
        return
    goals: tuple[tuple[str, str, Sense, float], ...] = (
        ("OURS-agg", "AGG", "≤", 1.0),
        ("OURS-disagg", "AGG", "≤", 1.2),
        ("STOCK", "OURS-disagg", "≥", 3.5),
    )
    for of, to, sense, limit in goals:
        row.goals.append(Goal(f"{of} against {to}", compared(told, of, to), sense, limit))
        of, to = (name if name.startswith("OURS") else f"{name}-tuned" for name in (of, to))
        if beside := compared(told, of, to):
            row.goals.append(Goal(f"{of} against {to}", beside))
    rest = {name: of for name, of in shares.items() if name in RESTING}
    row.goals += [Goal(f"{name} at rest", of, "<", 10.0, "% of a core") for name, of in rest.items()]


def compared(told: Mapping[str, Sequence[Told]], of: str, to: str) -> list[float]:
    """Ratios of the repeats in which both have answered; none where those are fewer than `PAIRS`, or an arm is not
    there."""
    both = zip(told.get(of, ()), told.get(to, ()), strict=False)
    pairs = [(one.whole, other.whole) for one, other in both if not (one.failed or other.failed)]
    return ratios(*zip(*pairs, strict=True)) if len(pairs) >= PAIRS else []


async def at_rest(arms: Sequence[Arm]) -> dict[str, list[float]]:
    """CPU seconds a second of all processes of arms that nobody asks anything, some times over."""
    shares: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(IDLE_REPEATS):
        before, began = {arm.name: _cpu_seconds(arm) for arm in arms}, time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        seconds = time.monotonic() - began
        for arm in arms:
            shares[arm.name].append((_cpu_seconds(arm) - before[arm.name]) / seconds)
    return shares


def _cpu_seconds(arm: Arm) -> float:
    total = 0.0
    for process in arm.processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
