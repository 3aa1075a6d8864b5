# SPDX-License-Identifier: Apache-2.0
"""Replays the recorded trace with the planner's policy and with static peak provisioning, side by side.

``python -m benchmarks.planner.replay`` writes ``results.json`` and ``replay.png`` beside ``trace.json``, and the table
of ``README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.recorded import put
from dynamo_epd.planning.simulator import Replay, Simulator, static_peak
from dynamo_epd.planning.traces import Trace, read_trace

HERE = Path(__file__).resolve().parent
BIN_SECONDS = 30
QUANTILES = (0.5, 0.95, 0.99)
TIGHT_SECONDS = 10.0
"""A limit for pictures far below the trace's own, shown beside it."""


def replay(trace: Trace) -> tuple[Replay, Replay]:
    """(planned, static peak)"""
    return Simulator(trace).run(), Simulator(trace, static_peak(trace)).run()


def summary(trace: Trace, planned: Replay, static: Replay) -> dict[str, Any]:
    """What ``results.json`` has."""
    burst = trace.burst.from_seconds
    grown = next(one for one in planned.decisions if one.time >= burst and one.after > one.before)
    return {
        "requests": planned.finished.total(),
        "service_times_measured": trace.service_times.measured,
        "attainment_ratio": round(planned.attainment() / static.attainment(), 5),
        "replica_seconds_ratio": round(planned.replica_seconds.total() / static.replica_seconds.total(), 4),
        "longest_from_cause_to_decision_seconds": max(one.time - one.cause for one in planned.decisions),
        "burst_to_first_growth": {"stage": grown.stage, "seconds": grown.time - burst},
        "decisions": len(planned.decisions),
        "static_workers": static_peak(trace),
        "planned": _arm(trace, planned),
        "static": _arm(trace, static),
    }


def _arm(trace: Trace, done: Replay) -> dict[str, Any]:
    kinds = {}
    for kind in trace.kinds:
        took = sorted(done.seconds[kind])
        kinds[kind] = {
            "attainment": round(done.attainment(kind), 5),
            f"within_{TIGHT_SECONDS:g}_s": round(sum(one <= TIGHT_SECONDS for one in took) / len(took), 5),
            **{f"p{q * 100:g}_seconds": round(took[int(len(took) * q)], 3) for q in QUANTILES},
        }
    return {
        "attainment": round(done.attainment(), 5),
        "replica_seconds": {stage: round(done.replica_seconds[stage]) for stage in trace.limits},
        "kinds": kinds,
    }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """What ``README.md`` shows of a `summary`, as lines of Markdown."""
    yield "| kind | planned | static peak | planned ÷ static |"
    yield "|---|---|---|---|"
    planned, static = result["planned"], result["static"]
    both = {"all": (planned, static)} | {
        kind: (planned["kinds"][kind], static["kinds"][kind]) for kind in planned["kinds"]
    }
    for kind, arms in both.items():
        ours, peak = (arm["attainment"] for arm in arms)
        yield f"| {kind} | {ours:.4f} | {peak:.4f} | {ours / peak:.4f} |"
    yield ""
    yield f"The planner pays for {result['replica_seconds_ratio']:.0%} of static peak's workers."


def draw(trace: Trace, planned: Replay, static: Replay, file: Path) -> None:
    """Arrivals, workers of each stage, and attainment over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=100, layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 1))
    minutes = [second / 60 for second in range(0, int(trace.seconds), BIN_SECONDS)]
    for kind in trace.kinds:
        above.plot(minutes, [trace.rate(kind, minute * 60) for minute in minutes], label=kind)
    above.set_ylabel("arrivals per second")
    above.legend(loc="upper right", ncols=len(trace.kinds))
    times = sorted(planned.samples)
    for place, (stage, peak) in enumerate(static_peak(trace).items()):
        counts = [planned.samples[time][stage][0] for time in times]
        middle.step([time / 60 for time in times], counts, color=f"C{place}", where="post", label=stage)
        middle.axhline(peak, color=f"C{place}", linestyle=":", linewidth=1)
    middle.set_ylabel("workers (dotted: static peak)")
    middle.legend(loc="upper right", title="planned")
    for done, name, line in ((static, "static peak", ":"), (planned, "planned", "-")):
        below.plot(minutes, _attained(done, len(minutes)), line, label=name)
    below.set_ylabel("share within its limit")
    below.set_xlabel("minutes")
    below.set_ylim(-0.02, 1.05)
    below.legend(loc="lower right")
    for axes in (above, middle, below):
        axes.axvspan(
            trace.burst.from_seconds / 60,
            (trace.burst.from_seconds + trace.burst.seconds) / 60,
            color="0.92",
            zorder=0,
        )
    times_are = "measured" if trace.service_times.measured else "placeholders"
    burst = f"grey: pictures {trace.burst.factor:g} times as often"
    figure.suptitle(f"{planned.finished.total()} requests; service times are {times_are}; {burst}")
    figure.savefig(file)


def _attained(done: Replay, count: int) -> list[float]:
    totals, within = [0] * count, [0] * count
    for arrived, well in done.ends:
        place = min(int(arrived // BIN_SECONDS), count - 1)
        totals[place] += 1
        within[place] += well
    return [good / total if total else 1.0 for good, total in zip(within, totals, strict=True)]


def main() -> None:
    trace = read_trace(HERE / "trace.json")
    planned, static = replay(trace)
    result = summary(trace, planned, static)
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(trace, planned, static, HERE / "replay.png")
    put("replay", "\n".join([*table(result), ""]), HERE / "README.md")
    print(json.dumps({name: value for name, value in result.items() if name not in ("planned", "static")}, indent=2))


if __name__ == "__main__":
    main()
