# SPDX-License-Identifier: Apache-2.0
"""Row 9: time to first token of a text, nothing else running: what handing the KV cache over costs."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence

from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import Told, ask, chat, session
from benchmarks.standing import WITHOUT_STOCK, Standing, agree, rotated, turn

NUMBER = 9
TITLE = "prefill to decode, time to first token of a text"
CHARACTERS = 512
"""Of a prompt; each is a token."""
TOKENS = 8
WARM_UP = 2


async def measure(standing: Standing, repeats: int) -> Row:
    """One client; no two prompts begin alike, so that no prefix cache helps."""
    row = Row(NUMBER, TITLE, f"{SERVED}, one client, new texts of {CHARACTERS} tokens, {repeats} repeats by turns")
    arms = standing.arms(row, SERVED, WITHOUT_STOCK)
    told: dict[str, list[Told]] = {name: [] for name in arms}
    async with session() as client:
        for repeat in range(WARM_UP + repeats):
            text = "".join(random.Random(f"kv {repeat}").choices(string.ascii_lowercase, k=CHARACTERS))
            for name, arm in rotated(arms, repeat):
                async with turn(client, arm, row):
                    answer = await ask(client, arm.url, chat(text, tokens=TOKENS))
                if repeat >= WARM_UP:
                    told[name].append(answer)
    fill(row, told)
    return row


def fill(row: Row, told: Mapping[str, Sequence[Told]]) -> None:
    agree(row, told)
    first = {name: [1e3 * one.first for one in of] for name, of in told.items()}
    row.samples += [Samples(name, of, "ms") for name, of in first.items()]
    row.notes.append(
        "the decode engine pulls the KV cache once prefill is over, as vLLM's NixlConnector does: one that was pushed "
        "while prefill runs, to an engine that was asked at the same time, could come sooner"
    )
    if row.void:
        return
    for name, limit in (("AGG", 1.15), ("AGG-tuned", None), ("OURS-agg", None)):
        row.goals.append(Goal(f"OURS-disagg against {name}", ratios(first["OURS-disagg"], first[name]), "≤", limit))
