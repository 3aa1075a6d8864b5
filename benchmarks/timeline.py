# SPDX-License-Identifier: Apache-2.0
"""One request across all stages: when each began and ended, by the spans that every graph exports.

    python -m benchmarks.timeline                                       # the tiny model, a question about one picture
    python -m benchmarks.timeline --model llava-s16 --pictures 4
    python -m benchmarks.timeline --record                              # and puts it into benchmarks/README.md

Serves the disaggregated graph and asks it a few times. Shown is the request that took the median time: as a table, as
`timeline.png`, and as `timeline.json` in Chrome's trace format, which Perfetto and chrome://tracing open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.arms import WORK, ours_disagg
from benchmarks.checkpoints import SERVED, TINY
from benchmarks.figures import shown
from benchmarks.load import Told, ask, chat, picture, session
from benchmarks.recorded import keep
from benchmarks.report import headline, machine
from benchmarks.room import lacking, rest
from benchmarks.traces import Span, Traces, new_trace

WARM_UP, AMONG = 3, 5
"""Questions that no trace is made of, and those of which the median one is shown."""
FIRST_PICTURE = 500_000
MOST_PICTURES = 8
SETTLE_SECONDS = 1.0
"""After the spans that there must be, for those that may be: several times what an exporter gathers spans for."""
QUESTION = "What is in this picture?"
STAGES = {
    "POST /v1/chat/completions": 1,
    "Processor.chat": 1,
    "PrefillWorker.prefill": 1,
    "DecodeWorker.generate": 1,
    "llm_request": 2,
}
"""Spans of every request, and how many."""
ENCODE = "EncodeWorker.encode"
"""One for each picture."""
CLIENT = "the client"


@dataclass(frozen=True)
class Asked:
    """One question of this client: `began` by the clock that the spans have."""

    trace: str
    began: float
    told: Told

    def spans(self) -> list[Span]:
        """What the client itself saw."""
        first, end = self.began + self.told.first, self.began + self.told.whole
        return [
            Span(self.trace, "waits for the first token", self.began, first, CLIENT),
            Span(self.trace, "waits for the others", first, end, CLIENT),
        ]


async def measure(model: str, pictures: int, tokens: int) -> tuple[list[Span], list[str]]:
    """The spans of one request, and the commands of the graph. Raises RuntimeError where one is not answered, and
    TimeoutError where spans do not come."""
    asked: list[Asked] = []
    with Traces() as collector, ours_disagg(checkpoints.directory(model), environment=collector.environment) as arm:
        async with session() as client:
            for number in range(WARM_UP + AMONG):
                first = FIRST_PICTURE + number * MOST_PICTURES
                body = chat(QUESTION, [picture(first + place) for place in range(pictures)], tokens=tokens)
                trace, headers = new_trace()
                began = time.time()
                told = await ask(client, arm.url, body, headers if number >= WARM_UP else None)
                if told.failed:
                    raise RuntimeError(told.failed)
                asked.append(Asked(trace, began, told))
        middle = sorted(asked[WARM_UP:], key=lambda one: one.told.whole)[AMONG // 2]
        await collector.trace(middle.trace, STAGES | {ENCODE: pictures})
        await asyncio.sleep(SETTLE_SECONDS)
        return [*middle.spans(), *await collector.trace(middle.trace, {})], arm.commands


def lanes(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """Lines of a drawing, each with its service: one for each name of its spans, and further ones where such overlap.
    The services are in the order in which they begin."""
    found: dict[str, list[list[Span]]] = {}
    for span in in_order(spans):
        own = found.setdefault(span.service, [])
        lane = next((one for one in own if one[-1].name == span.name and one[-1].ended <= span.began), None)
        if lane is None:
            own.append([span])
        else:
            lane.append(span)
    return [(service, lane) for service, own in found.items() for lane in own]


def in_order(spans: Sequence[Span]) -> list[Span]:
    """By when they begin; of those that begin together the longest first."""
    return sorted(spans, key=lambda one: (one.began, -one.ended))


def chrome(spans: Sequence[Span], about: Mapping[str, Any]) -> dict[str, Any]:
    """As Chrome's trace format has it: complete events in microseconds since the first one; a service is a process."""
    start = min(span.began for span in spans)
    processes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for thread, (service, lane) in enumerate(lanes(spans), 1):
        place = {"pid": processes.setdefault(service, len(processes) + 1), "tid": thread}
        events.append({"ph": "M", "name": "process_name", "args": {"name": service}, **place})
        events += [
            {
                "ph": "X",
                "name": span.name,
                "ts": round(1e6 * (span.began - start), 1),
                "dur": round(1e6 * (span.ended - span.began), 1),
                "args": {"trace": span.trace},
                **place,
            }
            for span in lane
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "metadata": dict(about)}


def table(spans: Sequence[Span]) -> Iterator[str]:
    """Lines of Markdown. Spans lie within each other: their shares are no sum."""
    start, end = min(span.began for span in spans), max(span.ended for span in spans)
    yield "| service | span | begins after ms | takes ms | of the whole |"
    yield "|---|---|---|---|---|"
    for span in in_order(spans):
        seconds = span.ended - span.began
        after, takes = shown(1e3 * (span.began - start)), shown(1e3 * seconds)
        yield f"| {span.service} | {span.name} | {after} | {takes} | {seconds / (end - start):.0%} |"


def plot(spans: Sequence[Span], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start, lines = min(span.began for span in spans), lanes(spans)
    colours = {service: f"C{place}" for place, service in enumerate(dict.fromkeys(service for service, _ in lines))}
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.35 * len(lines)), layout="constrained")
    for line, (service, lane) in enumerate(lines):
        for span in lane:
            after = 1e3 * (span.began - start)
            axes.barh(line, 1e3 * (span.ended - span.began), left=after, height=0.8, color=colours[service], alpha=0.6)
            axes.text(after, line, f" {span.name}", va="center", fontsize=7)
    axes.set_yticks(range(len(lines)), [service for service, _ in lines])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=(TINY, SERVED), default=TINY)
    parser.add_argument("--pictures", type=int, choices=range(MOST_PICTURES + 1), default=1, help="of the question")
    parser.add_argument("--tokens", type=int, choices=range(2, 257), default=16, metavar="2..256", help="of the answer")
    parser.add_argument("--record", action="store_true", help="put what is said into benchmarks/README.md")
    parser.add_argument("--output", type=Path, default=WORK / "report")
    options = parser.parse_args(given)
    if why := lacking(arms=False):
        print(f"benchmarks.timeline: {why}", file=sys.stderr)
        return 2
    rest()
    about, command = machine(), shlex.join(["python", "-m", "benchmarks.timeline", *given])
    try:
        spans, commands = asyncio.run(measure(options.model, options.pictures, options.tokens))
    except (RuntimeError, TimeoutError) as error:
        print(f"benchmarks.timeline: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    files = [options.output / f"timeline.{kind}" for kind in ("json", "png")]
    made = chrome(spans, {"command": command, "machine": about, "serves": commands})
    files[0].write_text(json.dumps(made, indent=1) + "\n")
    plot(spans, files[1])
    how = f"{options.model}, {options.pictures} pictures and {options.tokens} tokens, the median of {AMONG} requests"
    drawn = "![each stage of one request, over its milliseconds](timeline.png)"
    text = "\n".join([headline(command, about, how), "", *table(spans), "", drawn, ""])
    print(text, end="")
    if options.record:
        keep("timeline", text, files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
