# SPDX-License-Identifier: Apache-2.0
"""Row 7: goodput at a fixed rate, four pictures a request, and raw throughput of as many as there are at once.

Goodput is vLLM's (``vllm bench serve --goodput ttft:… tpot:…``): requests a second whose time to first token and whose
time per token after it both stay within a limit. The limits and the rate come from AGG alone on the same machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import aiohttp

from benchmarks.arms import Arm
from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, ratios, shown
from benchmarks.load import Told, ask, at_rate, chat, picture, session, within
from benchmarks.standing import Standing, agree, as_long, clients_share, lost, rotated, turn

NUMBER = 7
TITLE = "goodput, four pictures a request"
ARMS = ("AGG", "STOCK", "OURS-disagg")
TUNED = ("AGG", "AGG-tuned", "STOCK", "STOCK-tuned", "OURS-disagg")
PICTURES = 4
TOKENS = 24
WINDOW = 8.0
"""Seconds during which requests arrive."""
MARGIN = 0.5
"""Seconds that a request is waited for when it can be no good one any more."""
LOAD = 0.8
"""Of the requests a second that AGG answers one after the other."""
SLACK = 3.0
"""A limit is so many times what AGG takes for a request alone."""
BURST = 4
"""Requests at once, for raw throughput: of all but STOCK's, which no goal is set against."""
CALIBRATION = 3


@dataclass(frozen=True)
class Limits:
    """Seconds, both inclusive."""

    first: float
    token: float

    @property
    def too_late(self) -> float:
        """Seconds after which a request is no good one, and is waited for no longer."""
        return self.first + TOKENS * self.token + MARGIN

    def kept(self, told: Told) -> bool:
        """Whether a request counts. One that failed, or said all at once where several tokens were asked for, does
        not."""
        return not told.failed and told.first <= self.first and bool(told.gaps) and per_token(told) <= self.token


def per_token(told: Told) -> float:
    """Seconds a token after the first. A delta may hold several, each of which is one character here."""
    return sum(told.gaps) / (len(told.text) - 1)


@dataclass
class Measured:
    """Of one arm, by repeat."""

    alone: list[Told] = field(default_factory=list)
    windows: list[list[Told]] = field(default_factory=list)
    bursts: list[list[Told]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Requests a second, of each burst."""

    @property
    def loaded(self) -> list[Told]:
        """All that was told under load."""
        return [one for of in (*self.windows, *self.bursts) for one in of]

    def goodput(self, limits: Limits) -> list[float]:
        """Requests a second."""
        return [sum(map(limits.kept, window)) / WINDOW for window in self.windows]


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
        agree(row, {name: of.alone for name, of in measured.items()})
        if row.void:
            return row
        for name in [name for name, of in measured.items() if lost(of.alone)]:
            del arms[name], measured[name]
        limits, rate = calibrated(measured["AGG"].alone)
        for repeat in range(repeats):
            _draw_ahead(rate, repeat)
            for name, arm in rotated(arms, repeat):
                async with turn(client, arm, row):
                    with clients_share(row):
                        await _window(client, arm, rate, limits, repeat, measured[name])
                if not name.startswith("STOCK"):
                    async with turn(client, arm, row):
                        await _burst(client, arm, repeat, measured[name])
    row.setting = (
        f"{SERVED}, {shown(rate)} requests a second for {WINDOW:g} s ({LOAD:g} of what AGG answers one after the other)"
        f", {PICTURES} new pictures and {TOKENS} tokens each, {repeats} repeats; a good one has its first token within "
        f"{shown(1e3 * limits.first)} ms and its tokens every {shown(1e3 * limits.token)} ms, {SLACK:g} times AGG "
        f"alone; after {shown(limits.too_late)} s a request is given up"
    )
    fill(row, measured, limits)
    return row


def calibrated(alone: Sequence[Told]) -> tuple[Limits, float]:
    """The limits, and requests a second."""
    first = SLACK * median(one.first for one in alone)
    token = SLACK * median(map(per_token, alone))
    return Limits(first, token), LOAD / median(one.whole for one in alone)


async def _about(client: aiohttp.ClientSession, arm: Arm, number: int) -> Told:
    return await ask(client, arm.url, chat("What is in these pictures?", _pictures(number), tokens=TOKENS))


def _pictures(number: int) -> list[str]:
    """Those of the ``number``-th request, whichever arm it goes to."""
    return [picture(PICTURES * number + place) for place in range(PICTURES)]


def _draw_ahead(rate: float, repeat: int) -> None:
    """Drawing takes the client milliseconds a picture, which are the servers' while a window runs."""
    for number in range(int(2 * rate * WINDOW) + 1):
        _pictures(80_000 + 1_000 * repeat + number)
    for number in range(BURST):
        _pictures(200_000 + 1_000 * repeat + number)


async def _window(
    client: aiohttp.ClientSession, arm: Arm, rate: float, limits: Limits, repeat: int, of: Measured
) -> None:
    """Every arm sees the same arrivals and pictures."""

    def one(number: int) -> Awaitable[Told]:
        return within(limits.too_late, _about(client, arm, 80_000 + 1_000 * repeat + number))

    of.windows.append(await at_rate(rate, WINDOW, repeat, one))


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
        other = sum(map(_differing, of.windows, right.windows)) + sum(map(_differing, of.bursts, right.bursts))
        if other:
            row.notes.append(f"{name}: {other} of {len(of.loaded)} answers under load are not AGG's")
    ours = measured["OURS-disagg"]
    for name, limit in (("AGG", 2.0), ("STOCK", 1.3), ("AGG-tuned", None), ("STOCK-tuned", None)):
        if name in measured:
            kept_by = measured[name].goodput(limits)
            times = gains(ours.goodput(limits), kept_by)
            if none := kept_by.count(0.0):
                row.notes.append(f"{none} of {len(kept_by)} windows of {name} had no good request: half a one each")
            row.goals.append(Goal(f"OURS-disagg against {name}", times, "≥", limit))
        elif limit is not None:
            row.goals.append(Goal(f"OURS-disagg against {name}", [], "≥", limit))
    for name, least in (("AGG", 0.95), ("AGG-tuned", None)):
        if name in measured:
            faster = ratios(ours.rates, measured[name].rates)
            row.goals.append(Goal(f"raw throughput against {name}", faster, "≥", least))
    asked, kept = (
        sum(map(len, measured["AGG"].windows)) / len(measured["AGG"].windows) / WINDOW,
        median(measured["AGG"].goodput(limits)),
    )
    if kept:
        row.notes.append(f"at this rate no arm can be more than {shown(asked / kept)} times as good as AGG")
    if not measured.keys() >= set(TUNED):
        row.notes.append("beside the tuned arms: `--row 7 --tuned`, which takes minutes more than a report has")


def _differing(window: Sequence[Told], right: Sequence[Told]) -> int:
    pairs = zip(window, right, strict=False)
    return sum(one.text != other.text for one, other in pairs if one.text and other.text)


def gains(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Pair by pair, as `ratios`; a window without a good request counts as one with half a request."""
    return [one / max(other, 0.5 / WINDOW) for one, other in zip(of, to, strict=True)]
