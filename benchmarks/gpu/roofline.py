# SPDX-License-Identifier: Apache-2.0
"""What a device can do, measured: the rate of matrix products and the bandwidth of its memory.

Data sheets state both for a clock that a card does not hold under load, so a model is compared with what the same card
did a minute before. The fastest repeat counts: it is a ceiling, and a slow one says what else the machine was doing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Roofline:
    """``flops``: per second, in ``dtype``. ``bandwidth``: bytes per second, reads and writes together."""

    flops: float
    bandwidth: float
    dtype: str


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """How long each of ``repeats`` calls took, after `WARM_UP` that are not counted.

    On a GPU the calls are queued behind each other and timed there, by events: the device waits for the host only if
    the host is slower.
    """
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        taken = []
        for _ in range(repeats):
            start = perf_counter()
            call()
            taken.append(perf_counter() - start)
        return taken
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in marks]


def measure(device: torch.device, dtype: torch.dtype, repeats: int, *, sides: tuple[int, ...], copied: int) -> Roofline:
    """Args: ``sides``: of the square matrices that are multiplied; the fastest counts. ``copied``: bytes of one copy,
    many times the device's caches."""
    flops = max(_matmul_rate(side, device, dtype, repeats) for side in sides)
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / min(seconds(lambda: target.copy_(source), device, repeats))
    return Roofline(flops, bandwidth, str(dtype).removeprefix("torch."))


def _matmul_rate(side: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    # Not of zeros: they cost a card less power, and it would run faster than with a model's values.
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * side**3 / min(seconds(lambda: torch.mm(left, right, out=out), device, repeats))
