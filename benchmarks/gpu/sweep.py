# SPDX-License-Identifier: Apache-2.0
"""One model through both modes and all its batch sizes. What cannot be run is said in its row; the sweep goes on."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters

from benchmarks.gpu.roofline import Roofline, seconds
from benchmarks.gpu.towers import Tower, materialise, weight_bytes

MODES = ("eager", "compiled")
CAPTURE = "capture"
"""The compile mode that captures the graph and makes no code of it: it needs no compiler on the machine."""


@dataclass(frozen=True)
class Run:
    """One mode at one batch size. The figures are None where ``note`` says why there are none.

    Attributes:
        seconds: of one forward: median, least and most.
        flops, bandwidth: per second, by `towers`' count of work and of bytes.
        of_matmul, of_bandwidth: these as shares of what the device did in `roofline`.
        bound: ``arithmetic`` or ``bandwidth``: whose share is larger, so whose floor is nearer.
        peak_bytes: the most device memory that was in use, on a GPU.
        compile_seconds: the first call's, compiling included.
        graph_breaks: places where the compiled mode fell back to Python.
        failed: it was something else than memory.
    """

    mode: str
    batch: int
    note: str = ""
    failed: bool = False
    seconds: tuple[float, float, float] | None = None
    items_per_second: float | None = None
    flops: float | None = None
    of_matmul: float | None = None
    bandwidth: float | None = None
    of_bandwidth: float | None = None
    bound: str | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    graph_breaks: int | None = None


@dataclass(frozen=True)
class Swept:
    """A tower's runs. ``parameters``, ``parameter_bytes`` and ``read_bytes`` (of them in one forward) are 0 where the
    weights did not fit. ``base``: eager in float32 at the smallest batch, without shares; only where the goal counts
    precision."""

    tower: Tower
    parameters: int = 0
    parameter_bytes: int = 0
    read_bytes: int = 0
    runs: list[Run] = field(default_factory=list)
    base: Run | None = None

    def as_json(self) -> dict[str, Any]:
        tower = self.tower
        return {
            "name": tower.name,
            "title": tower.title,
            "item": tower.item,
            "parameters": self.parameters,
            "parameter_bytes": self.parameter_bytes,
            "read_bytes_per_forward": self.read_bytes,
            "flops_per_item": tower.work.flops,
            "activations_per_item": tower.work.values,
            "runs": [asdict(run) for run in self.runs],
            "base": self.base and asdict(self.base),
        }


@dataclass(frozen=True)
class Setup:
    """Where and how to measure. ``compile_mode``: `CAPTURE`, or a mode of torch.compile's inductor."""

    device: torch.device
    dtype: torch.dtype
    roofline: Roofline
    repeats: int
    compile_mode: str


def sweep(tower: Tower, setup: Setup) -> Swept:
    """Every mode and batch size of ``tower``, and its base where it has one. It is off the device again afterwards."""
    say(f"{tower.name}: {tower.title}")
    swept = _every(tower, setup, MODES, tower.batches)
    if not tower.precision:
        return swept
    smallest = min(tower.batches)
    if setup.dtype == torch.float32:
        base = next(run for run in swept.runs if (run.mode, run.batch) == ("eager", smallest))
    else:
        say("  in float32:")
        (base,) = _every(tower, replace(setup, dtype=torch.float32), ("eager",), (smallest,)).runs
    # The floors were measured in the other precision: shares of them would say nothing.
    return replace(swept, base=replace(base, of_matmul=None, of_bandwidth=None, bound=None))


def _every(tower: Tower, setup: Setup, modes: Sequence[str], batches: Sequence[int]) -> Swept:
    try:
        model = materialise(tower, setup.device, setup.dtype)
    except torch.OutOfMemoryError:
        model = None
    if model is None:
        note = "out of memory: the weights do not fit"
        say(f"  {note}")
        free(setup.device)
        return Swept(tower, runs=[Run(mode, batch, note) for mode in modes for batch in batches])
    sizes = [(one.numel(), one.element_size()) for one in model.parameters()]
    read, runs = weight_bytes(model), []
    for mode in modes:
        for batch in batches:
            run = _run(tower, model, mode, batch, setup, read)
            runs.append(run)
            say(f"  {mode}, {batch}: " + (run.note or f"{run.items_per_second:.4g} items/s, {run.of_matmul:.0%}"))
    del model
    free(setup.device)
    return Swept(tower, sum(count for count, _ in sizes), sum(count * size for count, size in sizes), read, runs)


def free(device: torch.device) -> None:
    """Gives back what nothing refers to any more. Compiled code goes first: its CUDA graphs hold memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def say(line: str) -> None:
    """A line of progress: hours can pass before the table."""
    print(line, file=sys.stderr, flush=True)


def _run(tower: Tower, model: torch.nn.Module, mode: str, batch: int, setup: Setup, read_bytes: int) -> Run:
    try:
        return _timed(tower, model, mode, batch, setup, read_bytes)
    except torch.OutOfMemoryError:
        run = Run(mode, batch, "out of memory")
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        cause = getattr(error, "inner_exception", error)  # the outer one names no more than the backend
        line = next(iter(str(cause).strip().splitlines()), "")
        run = Run(mode, batch, f"cannot be compiled: {type(cause).__name__}: {line}", failed=True)
    free(setup.device)  # not before the error is gone: its frames hold the tensors
    return run


@torch.inference_mode()
def _timed(tower: Tower, model: torch.nn.Module, mode: str, batch: int, setup: Setup, read_bytes: int) -> Run:
    device, roofline = setup.device, setup.roofline
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    given = tower.inputs(batch, device, setup.dtype)
    compile_seconds = graph_breaks = None
    call: Callable[..., object] = model
    if mode == "compiled":
        call = _compiled(model, setup.compile_mode)
        start = perf_counter()
        # Of the ninth form of one function torch makes no code otherwise, and runs it eagerly without a word.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            call(**given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        compile_seconds = perf_counter() - start
        graph_breaks = sum(counters["graph_break"].values())
    taken = seconds(lambda: call(**given), device, setup.repeats)
    middle = median(taken)
    flops = batch * tower.work.flops / middle
    bandwidth = (read_bytes + batch * tower.work.values * setup.dtype.itemsize) / middle
    shares = flops / roofline.flops, bandwidth / roofline.bandwidth
    return Run(
        mode,
        batch,
        seconds=(middle, min(taken), max(taken)),
        items_per_second=batch / middle,
        flops=flops,
        of_matmul=shares[0],
        bandwidth=bandwidth,
        of_bandwidth=shares[1],
        bound="arithmetic" if shares[0] >= shares[1] else "bandwidth",
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        compile_seconds=compile_seconds,
        graph_breaks=graph_breaks,
    )


def _compiled(model: torch.nn.Module, mode: str) -> Callable[..., object]:
    """For one batch size: what was made for others is forgotten."""
    torch._dynamo.reset()
    counters.clear()
    if mode == CAPTURE:
        return torch.compile(model, backend="eager", dynamic=False)
    return torch.compile(model, mode=mode, dynamic=False)
