# SPDX-License-Identifier: Apache-2.0
"""What was found, as one JSON object, as Markdown tables, and as values for the configurations."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import diffusers
import torch
import transformers

from benchmarks.gpu.goals import COLOCATED, FASTER, OF_MATMUL, GpuGoal
from benchmarks.gpu.sweep import Run, Setup, Swept

NOT_MEASURED = "No figures of a GPU have been recorded in this project yet."
"""To be taken out by whoever records a table, as is the same sentence in `__main__`."""
COLUMNS = ["mode", "batch", "items/s", "ms", "TFLOP/s", "of matmul", "GB/s", "of bandwidth", "nearer bound"]
COLUMNS += ["peak GiB", "note"]
ENOUGH = 0.97
"""Of the best throughput: the smallest batch with this much is proposed. A larger one only makes waits longer."""
WORTH = 1.05
"""Times eager's throughput: less does not pay for minutes of compiling."""


def as_json(swept: Sequence[Swept], setup: Setup, *, toy: bool, command: str) -> dict[str, Any]:
    return {
        "status": status(setup, toy=toy),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": device_name(setup.device),
        "sizes": "toy" if toy else "real",
        "dtype": setup.roofline.dtype,
        "compile_mode": setup.compile_mode,
        "repeats": setup.repeats,
        "versions": versions(),
        "matmul_flops_per_second": setup.roofline.flops,
        "bandwidth_bytes_per_second": setup.roofline.bandwidth,
        "models": [one.as_json() for one in swept],
        "goals": goals(swept, setup, toy=toy),
        "settings": [line for one in swept for line in settings(one)] if proposes(setup, toy=toy) else [],
    }


def markdown(swept: Sequence[Swept], setup: Setup, *, toy: bool) -> str:
    lines = [
        f"**{status(setup, toy=toy)}**",
        "",
        f"{device_name(setup.device)}; {setup.roofline.dtype}; compiled: {setup.compile_mode}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + f"; median of {setup.repeats}.",
        f"Measured on it: {setup.roofline.flops / 1e12:.4g} TFLOP/s in matrix products, "
        f"{setup.roofline.bandwidth / 1e9:.4g} GB/s in copies.",
    ]
    for one in swept:
        work = one.tower.work
        lines += [
            "",
            f"### {one.tower.title}",
            "",
            f"{one.parameters / 1e6:.6g} M parameters, {one.parameter_bytes / 1e9:.4g} GB; "
            f"one item is a {one.tower.item}, {work.flops / 1e9:.6g} GFLOP.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(_row(run) for run in one.runs),
            *_base(one),
        ]
    lines += ["", "### Goals", "", *(f"- {line}" for line in goals(swept, setup, toy=toy))]
    if proposes(setup, toy=toy):
        lines += ["", "### Values for the configurations", ""]
        lines += [f"- {line}" for one in swept for line in settings(one)]
    return "\n".join(lines)


def settings(swept: Swept) -> list[str]:
    """What was found best, by the key it is for. Batches are eager ones: encode and embed workers compile nothing."""
    tower = swept.tower
    eager = [run for run in swept.runs if run.mode == "eager" and run.items_per_second]
    compiled = [run for run in swept.runs if run.mode == "compiled" and run.items_per_second]
    if tower.setting == "ImageWorker.compile":
        alone = {run.mode: run.items_per_second for run in (*compiled, *eager) if run.batch == min(tower.batches)}
        if len(alone) < 2:
            return []
        times = (alone["compiled"] or 0.0) / (alone["eager"] or 1.0)
        return [f"`{tower.setting}: {str(times >= WORTH).lower()}` ({tower.configs}): {times:.3g} times eager"]
    if not eager:
        return []
    best = max(run.items_per_second or 0.0 for run in eager)
    run = next(run for run in eager if (run.items_per_second or 0.0) >= ENOUGH * best)
    share = (run.items_per_second or 0.0) / best
    return [f"`{tower.setting}: {run.batch * tower.unit}` ({tower.configs}): {share:.0%} of the best throughput"]


def goals(swept: Sequence[Swept], setup: Setup, *, toy: bool) -> list[str]:
    """What this project wants of a GPU: each met, not met, or not measured and why."""
    found = {one.tower.name: one for one in swept}
    unfit = "" if proposes(setup, toy=toy) else "toy sizes" if toy else "there is no GPU here"
    nothing = None, unfit
    return [
        _judged(COLOCATED, None, unfit or "this benchmark serves no graph"),
        _judged(FASTER, *(nothing if unfit else _faster(found.get("flux")))),
        _judged(OF_MATMUL, *(nothing if unfit else _of_matmul(found))),
    ]


def _judged(goal: GpuGoal, times: float | None, why: str) -> str:
    if times is None:
        return f"{goal.what} ≥ {goal.times:g} times: not measured: {why}"
    return f"{goal.what} ≥ {goal.times:g} times: {'met' if times >= goal.times else 'not met'}: {times:.3g} times"


def _faster(flux: Swept | None) -> tuple[float | None, str]:
    """By compiling and precision together, or why that is not known."""
    if flux is None:
        return None, "flux was not run"
    alone = (run for run in flux.runs if (run.mode, run.batch) == ("compiled", min(flux.tower.batches)))
    compiled, base = next(alone, None), flux.base
    for what, run in (("compiled", compiled), ("eager in float32", base)):
        if run is None or not run.items_per_second:
            return None, f"{what}: {run.note if run else 'it was not run'}"
    assert compiled and compiled.items_per_second and base and base.items_per_second
    return compiled.items_per_second / base.items_per_second, ""


def _of_matmul(found: Mapping[str, Swept]) -> tuple[float | None, str]:
    """The lesser of both models' best. Eager ones: encode and embed workers compile nothing."""
    best: list[float] = []
    for name in ("clip", "t5"):
        if name not in found:
            return None, f"{name} was not run"
        eager = [run for run in found[name].runs if run.mode == "eager"]
        shares = [run.of_matmul for run in eager if run.of_matmul]
        if not shares:
            return None, f"{name}: {eager[0].note}"
        best.append(max(shares))
    return min(best), ""


def proposes(setup: Setup, *, toy: bool) -> bool:
    """Whether settings for GPUs can be learned from this."""
    return setup.device.type == "cuda" and not toy


def status(setup: Setup, *, toy: bool) -> str:
    if toy:
        return f"Toy sizes: this shows that the benchmark runs, and nothing else. {NOT_MEASURED}"
    if setup.device.type == "cuda":
        return f"Real sizes on a GPU. {NOT_MEASURED} These may become the first."
    return f"Real sizes on a CPU. {NOT_MEASURED}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {capability}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "diffusers": diffusers.__version__}
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def _base(swept: Swept) -> list[str]:
    """Lines on what compiling and precision are set against, where it was run."""
    run = swept.base
    if run is None:
        return []
    found = run.note if run.seconds is None else f"{1e3 * run.seconds[0]:.4g} ms"
    return ["", f"Eager in float32, batch {run.batch}, as torch has it (no TF32 unless asked for): {found}."]


def _row(run: Run) -> str:
    cells = [run.mode, str(run.batch)]
    if run.seconds is None:
        cells += [""] * (len(COLUMNS) - 3) + [run.note.replace("|", "/")]
        return f"| {' | '.join(cells)} |"
    assert run.items_per_second and run.flops and run.bandwidth and run.bound
    cells += [f"{run.items_per_second:.4g}", f"{1e3 * run.seconds[0]:.4g}"]
    cells += [
        f"{run.flops / 1e12:.4g}",
        f"{run.of_matmul:.1%}",
        f"{run.bandwidth / 1e9:.4g}",
        f"{run.of_bandwidth:.1%}",
    ]
    cells += [run.bound, "" if run.peak_bytes is None else f"{run.peak_bytes / 2**30:.3g}"]
    note = "" if run.compile_seconds is None else f"first call {run.compile_seconds:.3g} s"
    cells.append(note + (f", {run.graph_breaks} graph breaks" if run.graph_breaks else ""))
    return f"| {' | '.join(cells)} |"
