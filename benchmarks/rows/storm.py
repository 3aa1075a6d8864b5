# SPDX-License-Identifier: Apache-2.0
"""Row 6: the pace of a running text stream while questions about pictures arrive, beside its pace without them.

Questions come at one rate for all arms of a repeat, so that whoever decodes more slowly is not asked less. It follows
AGG's pace on this machine, one every so many tokens as its last stream went without them: at a rate that is written
down here a stream that is over soon would meet too few of them, and its 99th percentile would see no stall of any
length.

The goal is the median of ratios pair by pair, as in every row. The percentile of all repeats' gaps together is shown
beside it and is no goal: it rests on more stalls, but on one figure, and the hundredth of all gaps that it looks at may
all come from one repeat that something else disturbed, on one side of the pair alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import aiohttp

from benchmarks.arms import Arm
from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, percentile, ratios, shown
from benchmarks.load import Told, ask, chat, picture, session
from benchmarks.standing import Standing, agree, as_long, clients_share, rotated, turn

NUMBER = 6
TITLE = "a text stream during an image storm"
TOKENS, WARM_UP_TOKENS = 512, 128
EVERY = 50
"""Tokens of AGG's stream without a storm for which there is one question about a new picture in one; they wait for
nobody. Two gaps in a hundred may stall, then, where one in a hundred is looked for. At twice the rate AGG could not
always keep up, and a question waited for longer than anyone listens."""
RATE = 3.0
"""Questions a second where AGG was not heard without a storm yet: in the first turn, which does not count."""
QUESTION_TOKENS = 1
SHARE = 0.99
ARMS = ("AGG", "OURS-disagg")
DRAWN = 96
"""Pictures of a storm that are drawn before it: those of a stream at a quarter of AGG's pace without one."""


@dataclass(frozen=True)
class Pace:
    """Of one stream: without a storm, and in one of so many questions."""

    quiet: Told
    stormy: Told
    storm: list[Told]


async def measure(standing: Standing, repeats: int) -> Row:
    """Each turn streams the same text twice, without and with the storm, which changes places."""
    load = f"{SERVED}, a stream of {TOKENS} tokens, a question about a new picture in the time of {EVERY} of AGG's "
    load += f"tokens without them, at one rate for all arms of a repeat, {repeats} repeats"
    row = Row(NUMBER, f"{TITLE}, p{100 * SHARE:g} inter-token latency", load, open_loop=True)
    arms = standing.arms(row, SERVED, ARMS)
    paces: dict[str, list[Pace]] = {name: [] for name in arms}
    quiet: Told | None = None
    async with session() as client:
        for repeat in range(1 + repeats):
            for number in range(DRAWN):  # ahead: it takes the client milliseconds a picture
                picture(_picture(repeat, number))
            rate = rate_of(quiet)
            for name, arm in rotated(arms, repeat):
                async with turn(client, arm, row):
                    pace = await _one(client, arm, repeat, row, rate)
                if name == "AGG":
                    quiet = pace.quiet
                if repeat:
                    paces[name].append(pace)
    fill(row, paces)
    row.notes.append("AGG is not beside its tuned arm here: a report has no time for its start and its streams")
    return row


async def _one(client: aiohttp.ClientSession, arm: Arm, repeat: int, row: Row, rate: float) -> Pace:
    """``rate``: questions a second."""
    body = chat(f"Tell me story number {repeat}.", tokens=TOKENS if repeat else WARM_UP_TOKENS)

    async def about(number: int) -> Told:
        question = chat("What is in it?", [picture(_picture(repeat, number))], tokens=QUESTION_TOKENS)
        return await ask(client, arm.url, question)

    async def in_storm() -> tuple[Told, list[Told]]:
        over = asyncio.Event()
        with clients_share(row):
            storm = asyncio.ensure_future(until(over, rate, repeat, about))
            told = await ask(client, arm.url, body)
            over.set()
            return told, await storm

    if repeat % 2:
        stormy, storm = await in_storm()
        return Pace(await ask(client, arm.url, body), stormy, storm)
    return Pace(await ask(client, arm.url, body), *await in_storm())


def rate_of(quiet: Told | None) -> float:
    """Questions a second, from the pace of AGG's stream without them."""
    if quiet is None or quiet.failed or not quiet.gaps:
        return RATE
    return 1.0 / (EVERY * median(quiet.gaps))


def _picture(repeat: int, number: int) -> int:
    return 60_000 + 1_000 * repeat + number


async def until(over: asyncio.Event, rate: float, seed: int, one: Callable[[int], Awaitable[Told]]) -> list[Told]:
    """Poisson arrivals that wait for nobody, the first at once, until ``over`` is set; then what they were told."""
    chance = random.Random(seed)
    begun: list[asyncio.Future[Told]] = []
    while not over.is_set():
        begun.append(asyncio.ensure_future(one(len(begun))))
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), chance.expovariate(rate))
    return list(await asyncio.gather(*begun))


def fill(row: Row, paces: Mapping[str, Sequence[Pace]]) -> None:
    """Void where a question failed, quiet streams differ, or an answer in a storm is too long or too short. Other words
    are noted: in a storm batches differ, and with them the last bits."""
    agree(row, {name: [pace.quiet for pace in of] for name, of in paces.items()})
    as_long(row, {name: [pace.stormy for pace in of] for name, of in paces.items()}, TOKENS)
    as_long(row, {name: [one for pace in of for one in pace.storm] for name, of in paces.items()}, QUESTION_TOKENS)
    for name, of in paces.items():
        failed = [one.failed for pace in of for one in (pace.stormy, *pace.storm) if one.failed]
        if failed:
            row.void = row.void or f"{name}: {len(failed)} questions of the storm failed: {failed[0]}"
        other = sum(pace.quiet.text != pace.stormy.text for pace in of)
        asked = sum(len(pace.storm) for pace in of) / len(of)
        seconds = sum(pace.stormy.whole for pace in of) / len(of)
        every = f", one every {shown(TOKENS / asked)} tokens" if asked else ""
        every += f", {shown(asked / seconds)} a second" if seconds else ""
        row.notes.append(f"{name}: {shown(asked)} questions in a storm{every}")
        if other:
            row.notes.append(f"{name}: {other} of {len(of)} streams said something else in the storm")
    if row.void:
        return
    for name, of in paces.items():
        quiet = [1e3 * percentile(pace.quiet.gaps, SHARE) for pace in of]
        stormy = [1e3 * percentile(pace.stormy.gaps, SHARE) for pace in of]
        row.samples += [Samples(f"{name}, quiet", quiet, "ms"), Samples(f"{name}, in the storm", stormy, "ms")]
        limit = 1.10 if name == "OURS-disagg" else None
        row.goals.append(Goal(f"{name}, in the storm against quiet", ratios(stormy, quiet), "≤", limit))
        of_all = [
            percentile([gap for one in those for gap in one.gaps], SHARE)
            for those in ([pace.stormy for pace in of], [pace.quiet for pace in of])
        ]
        row.goals.append(Goal(f"{name}, the same of all repeats' gaps together", ratios(of_all[:1], of_all[1:])))
