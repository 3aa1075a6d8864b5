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
from benchmarks.standing import START, Standing, agree, turn

NUMBER = 1
TITLE = "whole answer, one client"
TOKENS = 16
WARM_UP = 2
IDLE_SECONDS = 5.0
IDLE_REPEATS = 5
RESTING = ("OURS-agg", "OURS-disagg")
QUESTION = "What is in this picture?"


async def measure(standing: Standing, repeats: int) -> Row:
    """All six arms stand at once; those that spin while nobody asks them are stopped meanwhile."""
    row = Row(NUMBER, TITLE, f"{TINY}, one new picture and {TOKENS} tokens a question, {repeats} repeats by turns")
    arms = standing.arms(row, TINY, tuple(START))
    told: dict[str, list[Told]] = {name: [] for name in arms}
    lost: dict[str, Told] = {}
    async with session() as client:
        for repeat in range(WARM_UP + repeats):
            body = chat(QUESTION, [picture(repeat)], tokens=TOKENS)
            for name, arm in arms.items():
                if name in lost:
                    answer = lost[name]
                else:
                    async with turn(client, arm, row):
                        answer = await ask(client, arm.url, body)
                if answer.failed and name.startswith("STOCK"):
                    lost[name] = answer  # nothing is said against it, nor waited for
                if repeat >= WARM_UP:
                    told[name].append(answer)
    fill(row, told, await at_rest([arms[name] for name in RESTING]))
    return row


def fill(row: Row, told: Mapping[str, Sequence[Told]], resting: Mapping[str, Sequence[float]]) -> None:
    """Samples and goals. ``resting``: shares of a core, by arm."""
    left_out = agree(row, told)
    whole = {name: [1e3 * one.whole for one in answers] for name, answers in told.items() if name not in left_out}
    row.samples += [Samples(name, values, "ms") for name, values in whole.items()]
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
        both = of in whole and to in whole
        row.goals.append(Goal(f"{of} against {to}", ratios(whole[of], whole[to]) if both else [], sense, limit))
        of, to = (name if name.startswith("OURS") else f"{name}-tuned" for name in (of, to))
        if of in whole and to in whole:
            row.goals.append(Goal(f"{of} against {to}", ratios(whole[of], whole[to])))
    row.goals += [Goal(f"{name} at rest", of, "<", 10.0, "% of a core") for name, of in shares.items()]


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
