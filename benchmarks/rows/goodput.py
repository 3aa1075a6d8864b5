# SPDX-License-Identifier: Apache-2.0
"""Row 7: goodput at fixed rates, four pictures a request, and raw throughput of as many as there are at once.

Goodput is vLLM's (``vllm bench serve --goodput ttft:… tpot:…``), requests a second whose time to first token and whose
time per token after it both stay within a limit, and more is asked of a good one: the 95th percentile of the gaps
between its own tokens stays within the same limit as their mean. What separate stages win is stalls, and one of many
tokens' time is little in a mean. The limits come from AGG alone on the same machine, where nothing stalls and mean and
percentile are much the same: hence one limit for both.

Requests come at several rates, from one that AGG can do to twice what it can, and the best goodput of a repeat counts:
at one rate alone nobody could be better than all that were sent. Even if AGG keeps all at the lowest, one that keeps
all at the highest is more than twice as good; the most that was possible in a repeat is shown beside the goal. The
rates come from AGG too. Who kept no request at a rate is not asked at a higher one in that repeat, and at the highest,
which few can win by, who did not keep most at the one below. Who kept none alone and none in the first repeat is not
asked under load again, and counts as one that keeps none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import mean, median

import aiohttp

from benchmarks.arms import Arm
from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, percentile, ratios, shown
from benchmarks.load import Told, ask, at_rate, chat, picture, session, within
from benchmarks.standing import Standing, agree, as_long, clients_share, lost, note_masks, rotated, turn

NUMBER = 7
TITLE = "goodput, four pictures a request"
ARMS = ("AGG", "STOCK", "OURS-disagg")
TUNED = ("AGG", "AGG-tuned", "STOCK", "STOCK-tuned", "OURS-disagg")
PICTURES = 4
TOKENS = 24
WINDOW = 3.5
"""Seconds during which requests arrive, at each rate."""
MARGIN = 0.5
"""Seconds that a request is waited for when it can be no good one any more."""
LOADS = (0.8, 1.3, 2.0)
"""Of the requests a second that AGG answers one after the other; the largest comes last, for it leaves work behind."""
NEEDED = (0.0, 0.0, 0.5)
"""Share of the requests at the rate below of which more must have been kept, at each of `LOADS`."""
SLACK = 3.0
"""A limit is so many times what AGG takes for a request alone."""
TAIL = 0.95
"""Of a request's gaps, that are within the limit: one of 23 may be longer, two may not."""
BURST = 4
"""Requests at once, for raw throughput: of all but STOCK's, which no goal is set against."""
CALIBRATION = 3


@dataclass(frozen=True)
class Limits:
    """Seconds, both inclusive. ``token``: of the mean gap, and of nearly every one."""

    first: float
    token: float

    @property
    def too_late(self) -> float:
        """Seconds after which a request is no good one, and is waited for no longer."""
        return self.first + TOKENS * self.token + MARGIN

    def kept(self, told: Told) -> bool:
        """Whether a request counts. One that failed, or said all at once where several tokens were asked for, does
        not. The mean is judged beside the percentile, which sees no single stall, however long."""
        if told.failed or not told.gaps:
            return False
        longest = max(per_token(told), percentile(told.gaps, TAIL))
        return told.first <= self.first and longest <= self.token


def per_token(told: Told) -> float:
    """Seconds a token after the first. A delta may hold several, each of which is one character here."""
    return sum(told.gaps) / (len(told.text) - 1)


@dataclass
class Measured:
    """Of one arm, by repeat."""

    alone: list[Told] = field(default_factory=list)
    windows: list[list[list[Told]]] = field(default_factory=list)
    """Of each repeat, one at each of `LOADS`; empty where it was not asked."""
    bursts: list[list[Told]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Requests a second, of each burst."""

    @property
    def loaded(self) -> list[Told]:
        """All that was told under load."""
        return [one for of in (*chain(*self.windows), *self.bursts) for one in of]

    def good(self, limits: Limits) -> list[list[float]]:
        """Good requests a second, of each repeat at each rate."""
        return [[sum(map(limits.kept, window)) / WINDOW for window in windows] for windows in self.windows]

    def goodput(self, limits: Limits) -> list[float]:
        """Of each repeat, at the best rate."""
        return list(map(max, self.good(limits)))

    def together(self, limits: Limits) -> float:
        """Goodput of all repeats together, at the best rate of all."""
        return max(map(mean, zip(*self.good(limits), strict=True)))

    def hopeless(self, limits: Limits) -> bool:
        """Whether it kept no request so far, neither alone nor under load: it is far behind."""
        return bool(self.windows) and not any(map(limits.kept, [*self.alone, *chain(*chain(*self.windows))]))


async def measure(standing: Standing, repeats: int, names: Sequence[str] = ARMS) -> Row:
    """First each arm alone, which warms it up and shows its answers; then windows and bursts by turns."""
    row = Row(NUMBER, TITLE, f"{SERVED}, {PICTURES} new pictures and {TOKENS} tokens a request", open_loop=True)
    arms = standing.arms(row, SERVED, names)
    measured = {name: Measured() for name in arms}
    async with session() as client:
        for name, arm in arms.items():
            async with turn(client, arm, row):
                told: list[Told] = []
                for number in range(1 + CALIBRATION):
                    told.append(told[-1] if lost(told) else await _about(client, arm, 70_000 + number))
                measured[name].alone = told[1:]
        note_masks(row, arms)
        agree(row, {name: of.alone for name, of in measured.items()})
        if row.void:
            return row
        for name in [name for name, of in measured.items() if lost(of.alone)]:
            del arms[name], measured[name]
        limits, capacity = calibrated(measured["AGG"].alone)
        rates = [load * capacity for load in LOADS]
        for repeat in range(repeats):
            _draw_ahead(rates, repeat)
            for name, arm in rotated(arms, repeat):
                if measured[name].hopeless(limits):
                    measured[name].windows.append([[] for _ in rates])
                else:
                    async with turn(client, arm, row):
                        with clients_share(row):
                            await _windows(client, arm, rates, limits, repeat, measured[name])
                if not name.startswith("STOCK"):
                    async with turn(client, arm, row):
                        await _burst(client, arm, repeat, measured[name])
    row.setting = (
        f"{SERVED}, {', '.join(map(shown, rates))} requests a second for {WINDOW:g} s each "
        f"({', '.join(map(str, LOADS))} of what AGG answers one after the other), the best of which counts; the higher "
        f"ones where more than {' and '.join(map('{:.0%}'.format, NEEDED[1:]))} was kept at the one below; "
        f"{PICTURES} new pictures and {TOKENS} tokens each, {repeats} repeats; a good one has its first token within "
        f"{shown(1e3 * limits.first)} ms and its tokens every {shown(1e3 * limits.token)} ms, {SLACK:g} times AGG "
        f"alone, in the mean and in {TAIL:.0%} of its gaps; after {shown(limits.too_late)} s a request is given up"
    )
    fill(row, measured, limits)
    return row


def calibrated(alone: Sequence[Told]) -> tuple[Limits, float]:
    """The limits, and the requests a second that one after the other makes."""
    first = SLACK * median(one.first for one in alone)
    token = SLACK * median(map(per_token, alone))
    return Limits(first, token), 1.0 / median(one.whole for one in alone)


async def _about(client: aiohttp.ClientSession, arm: Arm, number: int) -> Told:
    return await ask(client, arm.url, chat("What is in these pictures?", _pictures(number), tokens=TOKENS))


def _pictures(number: int) -> list[str]:
    """Those of the ``number``-th request, whichever arm it goes to."""
    return [picture(PICTURES * number + place) for place in range(PICTURES)]


def _number(repeat: int, place: int, number: int) -> int:
    """Of a request: the ``number``-th at the ``place``-th rate."""
    return 80_000 + 2_000 * repeat + 500 * place + number


def _draw_ahead(rates: Sequence[float], repeat: int) -> None:
    """Drawing takes the client milliseconds a picture, which are the servers' while a window runs."""
    for place, rate in enumerate(rates):
        for number in range(int(2 * rate * WINDOW) + 1):
            _pictures(_number(repeat, place, number))
    for number in range(BURST):
        _pictures(200_000 + 1_000 * repeat + number)


async def _windows(
    client: aiohttp.ClientSession, arm: Arm, rates: Sequence[float], limits: Limits, repeat: int, of: Measured
) -> None:
    """One at each rate, where enough was kept at the one below. Every arm sees the same arrivals and pictures."""
    told: list[list[Told]] = []
    for place, rate in enumerate(rates):
        if told and sum(map(limits.kept, told[-1])) <= NEEDED[place] * len(told[-1]):
            told.append([])
            continue

        def one(number: int, place: int = place) -> Awaitable[Told]:
            return within(limits.too_late, _about(client, arm, _number(repeat, place, number)))

        told.append(await at_rate(rate, WINDOW, repeat * len(rates) + place, one))
    of.windows.append(told)


async def _burst(client: aiohttp.ClientSession, arm: Arm, repeat: int, of: Measured) -> None:
    began = time.perf_counter()
    told = await asyncio.gather(*(_about(client, arm, 200_000 + 1_000 * repeat + number) for number in range(BURST)))
    of.rates.append(BURST / (time.perf_counter() - began))
    of.bursts.append(told)


def fill(row: Row, measured: Mapping[str, Measured], limits: Limits) -> None:
    """A request that fails under load is not good, and makes a throughput that counts it worthless: void if it is
    ours or AGG's, and so is one that says more or less than was asked for."""
    for name, of in measured.items():
        row.samples.append(Samples(f"{name}, goodput", of.goodput(limits), "requests/s"))
        for load, good in zip(LOADS, zip(*of.good(limits), strict=True), strict=True):
            row.samples.append(Samples(f"{name}, good ones at {load:g} of AGG's rate", list(good), "requests/s"))
    for name, of in measured.items():
        if of.rates:
            row.samples.append(Samples(f"{name}, {BURST} at once", of.rates, "requests/s"))
        failed = [one.failed for one in of.loaded if one.failed]
        if failed:
            row.notes.append(f"{name}: {len(failed)} requests failed under load: {failed[0]}")
            if not name.startswith("STOCK"):
                row.void = row.void or f"requests to {name} failed"
    as_long(row, {name: of.loaded for name, of in measured.items()}, TOKENS)
    right = measured["AGG"]
    for name, of in measured.items():
        # Noted alone: in batches of other sizes the last bits differ.
        pairs = ((chain(*of.windows), chain(*right.windows)), (of.bursts, right.bursts))
        other = sum(sum(map(_differing, answers, rights)) for answers, rights in pairs)
        if other:
            row.notes.append(f"{name}: {other} of {len(of.loaded)} answers under load are not AGG's")
    ours = measured["OURS-disagg"]
    for name, limit in (("AGG", 2.0), ("STOCK", 1.3), ("AGG-tuned", None), ("STOCK-tuned", None)):
        if name in measured:
            kept_by = measured[name].goodput(limits)
            times = gains(ours.goodput(limits), kept_by)
            if none := kept_by.count(0.0):
                row.notes.append(f"{none} of {len(kept_by)} repeats of {name} had no good request: half a one each")
            if spared := sum(not any(windows) for windows in measured[name].windows):
                row.notes.append(f"{name} was not asked in {spared} of them: it had kept none before, alone or loaded")
            row.goals.append(Goal(f"OURS-disagg against {name}", times, "≥", limit))
            together = gains([ours.together(limits)], [measured[name].together(limits)], len(kept_by))
            row.goals.append(Goal(f"OURS-disagg against {name}, all repeats' requests together", together))
        elif limit is not None:
            row.goals.append(Goal(f"OURS-disagg against {name}", [], "≥", limit))
    for name, least in (("AGG", 0.95), ("AGG-tuned", None)):
        if name in measured:
            faster = ratios(ours.rates, measured[name].rates)
            row.goals.append(Goal(f"raw throughput against {name}", faster, "≥", least))
    sent = [
        max(len(window) for of in arms for window in of) / WINDOW
        for arms in zip(*(of.windows for of in measured.values()), strict=True)
    ]
    row.goals.append(Goal("the most that was possible against AGG", gains(sent, right.goodput(limits))))
    if not measured.keys() >= set(TUNED):
        row.notes.append("not set against the tuned arms: `--row 7 --tuned` does, in minutes more than a report has")


def _differing(window: Sequence[Told], right: Sequence[Told]) -> int:
    pairs = zip(window, right, strict=False)
    return sum(one.text != other.text for one, other in pairs if one.text and other.text)


def gains(of: Sequence[float], to: Sequence[float], windows: int = 1) -> list[float]:
    """Pair by pair, as `ratios`; what is without a good request counts as if it had half a one. ``windows``: of which
    each figure is the mean."""
    return [one / max(other, 0.5 / WINDOW / windows) for one, other in zip(of, to, strict=True)]
