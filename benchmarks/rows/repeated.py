# SPDX-License-Identifier: Apache-2.0
"""Row 5: time to first token about a picture that was seen before, beside a text prompt of the same length.

Both prompts begin with words that nobody has said, so that no prefix cache helps; what is known is the picture. Prefill
workers that are as free as each other take turns: in a turn of four questions, the first of which is not timed, the
third and the fourth are about the picture by turns, and so every other time at the worker that has not seen it.
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
OURS = ("OURS-disagg", "OURS-disagg-2", "OURS-agg")
"""The second has two prefill workers."""
ARMS = ("AGG", *OURS)
FIRST, SEEN, TEXT = "new picture", "seen before", "text of the same length"


async def measure(standing: Standing, repeats: int) -> Row:
    """Every arm is asked about each picture twice, and about a text; the last two change places."""
    load = f"{SERVED}, one client, {repeats} repeats, a picture and another question about it, one worker a stage"
    load += " but two prefill workers of OURS-disagg-2"
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
        bodies = {kind: asked(kind, repeat, length) for kind in (FIRST, SEEN, TEXT)}
        for name, arm in rotated(arms, repeat):
            async with turn(client, arm, row):
                for kind in (FIRST, *((SEEN, TEXT) if repeat % 2 else (TEXT, SEEN))):
                    answer = await ask(client, arm.url, bodies[kind])
                    if repeat >= WARM_UP:
                        told[name][kind].append(answer)
    return told


async def filler(client: aiohttp.ClientSession, arm: Arm) -> int:
    """Characters that make the text as long as the prompt with the picture: a character is a token."""
    seen = await prompt_tokens(client, arm.url, asked(SEEN, 10**6 - 1, 0))
    return seen - await prompt_tokens(client, arm.url, asked(TEXT, 10**6 - 1, 0))


def asked(kind: str, repeat: int, length: int) -> dict[str, Any]:
    """A body whose first words no other has."""
    chance = random.Random(f"{kind} {repeat}")
    words = "".join(chance.choices(string.ascii_lowercase, k=16))
    if kind == TEXT:
        return chat(words + "".join(chance.choices(string.ascii_lowercase, k=length)) + QUESTIONS[1], tokens=TOKENS)
    return chat(QUESTIONS[kind == SEEN], [picture(50_000 + repeat)], tokens=TOKENS, before=words)


def fill(row: Row, told: Mapping[str, Mapping[str, list[Told]]]) -> None:
    """Samples and goals of answers that were all given."""
    first = {
        name: {kind: [1e3 * one.first for one in of] for kind, of in kinds.items()} for name, kinds in told.items()
    }
    row.samples += [Samples(f"{name}, {kind}", of, "ms") for name, kinds in first.items() for kind, of in kinds.items()]
    if not row.void:
        row.goals += [
            Goal(f"{name}, against text", ratios(first[name][SEEN], first[name][TEXT]), "≤", 1.10) for name in OURS
        ]
