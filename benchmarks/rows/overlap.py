# SPDX-License-Identifier: Apache-2.0
"""Row 8: time to first token about four pictures: how much of their encode the prefill overlaps, by the trace.

The processor waits for all of a prompt's embeddings, since vLLM takes a prompt with all of them: the graph has the
barrier. What there would be to win is measured too: pictures are asked about in pieces, the first one, the first two,
the first three, and the prefix cache makes each piece the next one's beginning while the rest is being encoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import median

import aiohttp

from benchmarks import checkpoints
from benchmarks.arms import Arm, ours_disagg
from benchmarks.checkpoints import SERVED
from benchmarks.figures import Goal, Row, Samples, ratios, shown
from benchmarks.load import Told, ask, chat, picture, session
from benchmarks.standing import Standing, agree, turn
from benchmarks.traces import Span, Traces, new_trace, overlap

NUMBER = 8
TITLE = "time to first token, four pictures"
PICTURES = 4
TOKENS = 8
WARM_UP = 1
QUESTION = "What is in these pictures?"
ENCODE, PREFILL = "EncodeWorker.encode", "PrefillWorker.prefill"


async def measure(standing: Standing, repeats: int) -> Row:
    """One graph whose pictures are encoded one by one, so that there is something to overlap. What AGG says to the same
    questions was heard before."""
    load = f"{PICTURES} new pictures a question, each encoded by itself, one client, {repeats} repeats"
    row = Row(NUMBER, TITLE, f"{SERVED}, {load}")
    kinds = ("whole", "pieces")
    told: dict[str, dict[str, list[Told]]] = {name: {kind: [] for kind in kinds} for name in ("AGG", "OURS-disagg")}
    traces: list[list[Span]] = []
    agg = standing.arms(row, SERVED, ("AGG",))["AGG"]
    async with session() as client:
        async with turn(client, agg, row):
            for repeat in range(WARM_UP, WARM_UP + repeats):
                for kind in kinds:
                    told["AGG"][kind].append(await _whole(client, agg, _pictures(repeat, kind), {}))
        with (
            Traces() as collector,
            ours_disagg(
                checkpoints.directory(SERVED), "--EncodeWorker.max-batch=1", environment=collector.environment
            ) as arm,
        ):
            row.notes += [f"`{command}`" for command in arm.commands]
            for repeat in range(WARM_UP + repeats):
                for kind in kinds if repeat % 2 else kinds[::-1]:
                    trace, headers = new_trace()
                    send = _in_pieces if kind == "pieces" else _whole
                    urls = _pictures(repeat, kind)
                    async with turn(client, arm, row):
                        answer = await send(client, arm, urls, headers)
                    if repeat < WARM_UP:
                        continue
                    told["OURS-disagg"][kind].append(answer)
                    if kind == "whole" and not answer.failed:
                        traces.append(await collector.trace(trace, {ENCODE: PICTURES, PREFILL: 1}))
    for kind in kinds:
        agree(row, {name: of[kind] for name, of in told.items()})
    if not row.void:
        ours = told["OURS-disagg"]
        fill(row, ours["whole"], ours["pieces"], traces)
    return row


def _pictures(repeat: int, kind: str) -> list[str]:
    first = 40_000 + 2 * PICTURES * repeat + (PICTURES if kind == "pieces" else 0)
    return [picture(first + place) for place in range(PICTURES)]


async def _whole(client: aiohttp.ClientSession, arm: Arm, urls: Sequence[str], headers: dict[str, str]) -> Told:
    return await ask(client, arm.url, chat(QUESTION, urls, tokens=TOKENS), headers)


async def _in_pieces(client: aiohttp.ClientSession, arm: Arm, urls: Sequence[str], headers: dict[str, str]) -> Told:
    """The whole question, sent with its beginnings: they prefill what is encoded so far, and say one token."""
    beginnings = [
        asyncio.ensure_future(ask(client, arm.url, chat(QUESTION, urls[:count], tokens=1)))
        for count in range(1, len(urls))
    ]
    told = await _whole(client, arm, urls, headers)
    failed = [one.failed for one in await asyncio.gather(*beginnings) if one.failed]
    return Told("", 0.0, 0.0, failed=failed[0]) if failed else told


def least(prefill: float, pictures: int) -> float:
    """Of the time with a barrier, where each picture's prefill begins with the next one's encode: what is longer runs
    through, of the other one remains. ``prefill``: of a picture, as a multiple of its encode."""
    return (max(1.0, prefill) * pictures + min(1.0, prefill)) / (pictures * (1.0 + prefill))


def decode_steps(encodes: Sequence[Span], told: Told) -> float:
    """How many take as long as the encode of a picture. Those of a request are encoded one after the other, and the
    span of each has its waiting in it: all of them together are shared out."""
    seconds = max(span.ended for span in encodes) - min(span.began for span in encodes)
    return seconds / len(encodes) / median(told.gaps)


def fill(row: Row, whole: Sequence[Told], pieces: Sequence[Told], traces: Sequence[Sequence[Span]]) -> None:
    """The graph's own figure is its time to first token against the same with what overlaps laid end to end."""
    first = [one.first for one in whole]
    encodes = [[span for span in trace if span.name == ENCODE] for trace in traces]
    prefills = [[span for span in trace if span.name == PREFILL] for trace in traces]
    saved = [overlap(of, to) for of, to in zip(encodes, prefills, strict=True)]
    waits = [
        min(span.began for span in to) - min(span.ended for span in of)
        for of, to in zip(encodes, prefills, strict=True)
    ]
    in_pieces = [one.first for one in pieces]
    for name, seconds in (
        ("as the graph serves it", first),
        ("asked in pieces", in_pieces),
        ("encode overlapped by prefill", saved),
        ("from the first embedding to the prefill", waits),
    ):
        row.samples.append(Samples(name, [1e3 * one for one in seconds], "ms"))
    steps = [decode_steps(of, one) for of, one in zip(encodes, whole, strict=True) if one.gaps]
    row.samples.append(Samples("encode of a picture", steps, "decode steps"))
    serial = [one + more for one, more in zip(first, saved, strict=True)]
    row.goals.append(Goal("against the same graph with a barrier", ratios(first, serial), "≤", 0.70))
    floor = least(checkpoints.SIZES[SERVED].prefill_of_encode, PICTURES)
    row.notes.append(
        f"by the operations of this model, overlap can give {shown(floor)} times the time with a barrier at best, "
        "where nothing else takes any"
    )
    row.notes.append(
        f"asked in pieces: {shown(median(ratios(in_pieces, first)))} times the time to first token of the graph, which "
        "is what overlapping would give with this engine as it is, the requests for the pieces included"
    )
    if not any(saved):
        row.notes.append(
            f"in no trace did a prefill begin before the last embedding was there: it began "
            f"{shown(1e3 * median(waits))} ms after the first one"
        )
