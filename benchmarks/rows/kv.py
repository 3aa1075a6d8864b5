# SPDX-License-Identifier: Apache-2.0
"""Row 9: time to first token of a text, nothing else running: what handing the KV cache over costs."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.figures import Goal, Row, Samples, ratios, shown
from benchmarks.load import Told, ask, chat, session
from benchmarks.standing import WITHOUT_STOCK, Standing, agree, turn

NUMBER = 9
TITLE = "prefill to decode, time to first token of a text"
CHARACTERS = 512
"""Of a prompt; each is a token."""
TOKENS = 8
WARM_UP = 3


async def measure(standing: Standing, repeats: int) -> Row:
    """One client; no two prompts begin alike, so that no prefix cache helps."""
    row = Row(NUMBER, TITLE, f"one client, new texts of {CHARACTERS} tokens, {repeats} repeats")
    arms = standing.arms(row, WITHOUT_STOCK)
    told: dict[str, list[Told]] = {name: [] for name in arms}
    async with session() as client:
        for repeat in range(WARM_UP + repeats):
            text = "".join(random.Random(f"kv {repeat}").choices(string.ascii_lowercase, k=CHARACTERS))
            for name, arm in arms.items():
                async with turn(client, arm):
                    answer = await ask(client, arm.url, chat(text, tokens=TOKENS))
                if repeat >= WARM_UP:
                    told[name].append(answer)
    fill(row, told)
    return row


def fill(row: Row, told: Mapping[str, Sequence[Told]]) -> None:
    agree(row, told)
    first = {name: [1e3 * one.first for one in of] for name, of in told.items()}
    row.samples += [Samples(name, of, "ms") for name, of in first.items()]
    if row.void:
        return
    row.goals.append(Goal("OURS-disagg against AGG", ratios(first["OURS-disagg"], first["AGG"]), "≤", 1.15))
    for name in ("AGG-tuned", "OURS-agg"):
        times = shown(median(ratios(first["OURS-disagg"], first[name])))
        row.notes.append(f"OURS-disagg against {name}: {times} times")
