# SPDX-License-Identifier: Apache-2.0
"""Row 5: time to first token about a picture that was seen before, beside a text prompt of the same length.

Both prompts begin with words that nobody has said, so that no prefix cache helps; what is known is the picture. Prefill
workers that are as free as each other take turns. The first question of a turn is not timed, the second shows the
picture; the question about it and the text come last, in one order or the other, and in half of the turns a text that
counts for nothing comes before them. So either order is asked at either worker: at the one that has seen the picture
and at the one that has not, which have a goal each. One median of both would lie between them, and say of neither how
long it takes.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

import aiohttp

from benchmarks.arms import Arm
from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import Told, ask, chat, picture, prompt_tokens, session
from benchmarks.standing import Standing, agree, rotated, turn

NUMBER = 5
TITLE = "time to first token, picture seen before"
TOKENS = 8
WARM_UP = 1
QUESTIONS = ("What is in it?", "Which colour?!")
"""As long as each other."""
TWO = "OURS-disagg-2"
"""It has two prefill workers."""
LEAST = 12
"""Repeats: six at each of two workers, in either order as often."""
OURS = ("OURS-disagg", TWO, "OURS-agg")
ARMS = ("AGG", *OURS)
FIRST, SEEN, TEXT = "new picture", "seen before", "text of the same length"
BETWEEN = "between"
"""A text that is not timed: it changes the worker whose turn it is."""


async def measure(standing: Standing, repeats: int) -> Row:
    """Every arm is asked about each picture twice, and about a text. ``repeats``: no fewer than `LEAST`."""
    repeats = max(LEAST, repeats)
    load = f"{SERVED}, one client, {repeats} repeats, a picture and another question about it, one worker a stage"
    load += f" but two prefill workers of {TWO}"
    row = Row(NUMBER, TITLE, load)
    arms = standing.arms(row, SERVED, ARMS)
    async with session() as client:
        length = await filler(client, arms["OURS-disagg"])
        lengths = {
            await prompt_tokens(client, arm.url, asked(kind, 10**6 - 1, length))
            for arm in (arms[name] for name in OURS)
            for kind in (SEEN, TEXT)
        }
        row.setting += f", prompts of {max(lengths)} tokens"
        if len(lengths) > 1:
            row.void = f"prompts of different lengths: {sorted(lengths)}"
        told = await by_turns(client, arms, length, repeats, row)
    for kind in (FIRST, SEEN, TEXT):
        agree(row, {name: of[kind] for name, of in told.items()})
    fill(row, told)
    return row


async def by_turns(
    client: aiohttp.ClientSession, arms: Mapping[str, Arm], length: int, repeats: int, row: Row
) -> dict[str, dict[str, list[Told]]]:
    """arm → kind → answers."""
    told: dict[str, dict[str, list[Told]]] = {name: {FIRST: [], SEEN: [], TEXT: []} for name in arms}
    for repeat in range(WARM_UP + repeats):
        kinds, _ = order_of(repeat)
        bodies = {kind: asked(kind, repeat, length) for kind in kinds}
        for name, arm in rotated(arms, repeat):
            async with turn(client, arm, row):
                for kind in kinds:
                    answer = await ask(client, arm.url, bodies[kind])
                    if repeat >= WARM_UP and kind != BETWEEN:
                        told[name][kind].append(answer)
    return told


def order_of(repeat: int) -> tuple[list[str], bool]:
    """The questions of a turn, and whether the picture is asked about again at the worker that has not seen it."""
    seen_first, between = bool(repeat % 2), bool(repeat // 2 % 2)
    last = (SEEN, TEXT) if seen_first else (TEXT, SEEN)
    return [FIRST, *([BETWEEN] if between else []), *last], seen_first != between


async def filler(client: aiohttp.ClientSession, arm: Arm) -> int:
    """Characters that make the text as long as the prompt with the picture: a character is a token."""
    seen = await prompt_tokens(client, arm.url, asked(SEEN, 10**6 - 1, 0))
    return seen - await prompt_tokens(client, arm.url, asked(TEXT, 10**6 - 1, 0))


def asked(kind: str, repeat: int, length: int) -> dict[str, Any]:
    """A body whose first words no other has."""
    chance = random.Random(f"{kind} {repeat}")
    words = "".join(chance.choices(string.ascii_lowercase, k=16))
    if kind in (TEXT, BETWEEN):
        return chat(words + "".join(chance.choices(string.ascii_lowercase, k=length)) + QUESTIONS[1], tokens=TOKENS)
    return chat(QUESTIONS[kind == SEEN], [picture(50_000 + repeat)], tokens=TOKENS, before=words)


def fill(row: Row, told: Mapping[str, Mapping[str, list[Told]]]) -> None:
    """Samples and goals of answers that were all given."""
    first = {
        name: {kind: [1e3 * one.first for one in of] for kind, of in kinds.items()} for name, kinds in told.items()
    }
    row.samples += [Samples(f"{name}, {kind}", of, "ms") for name, kinds in first.items() for kind, of in kinds.items()]
    if row.void:
        return
    for name in OURS:
        times = ratios(first[name][SEEN], first[name][TEXT])
        if name == TWO:
            other, same = (
                [one for at, one in enumerate(times, WARM_UP) if order_of(at)[1] is elsewhere]
                for elsewhere in (True, False)
            )
            row.goals.append(Goal(f"{name}, at the other prefill worker, against text", other, "≤", 1.10))
            row.goals.append(Goal(f"{name}, at the same prefill worker, against text", same, "≤", 1.10))
        else:
            row.goals.append(Goal(f"{name}, against text", times, "≤", 1.10))
