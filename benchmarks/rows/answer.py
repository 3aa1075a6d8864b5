# SPDX-License-Identifier: Apache-2.0
"""Row 1: a whole answer about one picture, one client, beside plain vLLM and Dynamo's stages; and a graph at rest."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from benchmarks.arms import Arm, agg, ours_agg, ours_disagg, stock
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import Told, ask, chat, picture, session

NUMBER = 1
TITLE = "whole answer, one client"
TOKENS = 16
WARM_UP = 3
IDLE_SECONDS = 10.0
IDLE_REPEATS = 3
QUESTION = "What is in this picture?"


async def measure(model: Path, repeats: int) -> Row:
    """All six arms stand at once; those that spin while nobody asks them are stopped meanwhile."""
    row = Row(NUMBER, TITLE, f"{model.name}, one new picture and {TOKENS} tokens a question, {repeats} repeats")
    with ExitStack() as stack:
        made = [
            agg(model, tuned=False),
            agg(model, tuned=True),
            stock(model, tuned=False),
            stock(model, tuned=True),
            ours_agg(model),
            ours_disagg(model),
        ]
        arms: dict[str, Arm] = {}
        for arm in made:
            arms[arm.name] = stack.enter_context(arm)
            arm.pause()
        told = await _by_turns(list(arms.values()), repeats)
        row.notes += [f"`{command}`" for arm in made for command in arm.commands]
        arms["OURS-disagg"].resume()
        idle = [_share_of_a_core(arms["OURS-disagg"]) for _ in range(IDLE_REPEATS)]
    for name, answers in told.items():
        failed = [one.failed for one in answers if one.failed]
        if failed:
            row.notes.append(f"{name}: {len(failed)} of {len(answers)} failed: {failed[0]}")
    differ = {name: _differing(told["AGG"], answers) for name, answers in told.items()}
    row.notes += [f"{name}: {count} of {repeats} answers are not AGG's" for name, count in differ.items() if count]
    if any(differ[name] for name in ("AGG-tuned", "OURS-agg", "OURS-disagg")):
        row.void = "answers differ from AGG's"
    whole = {name: [1e3 * one.whole for one in answers] for name, answers in told.items()}
    row.samples += [Samples(name, values, "ms") for name, values in whole.items()]
    row.samples.append(Samples("OURS-disagg at rest", [100 * one for one in idle], "% of a core"))
    row.goals += [
        Goal("OURS-agg against AGG", ratios(whole["OURS-agg"], whole["AGG"]), "≤", 1.0),
        Goal("OURS-disagg against AGG", ratios(whole["OURS-disagg"], whole["AGG"]), "≤", 1.2),
        Goal("STOCK against OURS-disagg", ratios(whole["STOCK"], whole["OURS-disagg"]), "≥", 3.5),
        Goal("OURS-disagg at rest", [100 * one for one in idle], "≤", 10.0, "% of a core"),
    ]
    return row


async def _by_turns(arms: list[Arm], repeats: int) -> dict[str, list[Told]]:
    told: dict[str, list[Told]] = {arm.name: [] for arm in arms}
    async with session() as client:
        for repeat in range(WARM_UP + repeats):
            body = chat(QUESTION, [picture(repeat)], tokens=TOKENS)
            for arm in arms:
                arm.resume()
                answer = await ask(client, arm.url, body)
                arm.pause()
                if repeat >= WARM_UP:
                    told[arm.name].append(answer)
    return told


def _differing(right: list[Told], answers: list[Told]) -> int:
    return sum(one.text != other.text for one, other in zip(right, answers, strict=True))


def _share_of_a_core(arm: Arm) -> float:
    """CPU seconds a second, of all processes of an arm that nobody asks anything."""
    before, began = _cpu_seconds(arm), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (_cpu_seconds(arm) - before) / (time.monotonic() - began)


def _cpu_seconds(arm: Arm) -> float:
    total = 0.0
    for process in arm.processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
