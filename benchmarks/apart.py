# SPDX-License-Identifier: Apache-2.0
"""What our way is set against in rows that need no graph, in a process of its own.

Each thread that calls torch has its own pool of OpenMP's threads. Where all pools of a process have more threads than
there are cores, libgomp lets none of them wait at work for what comes next, and each way would make the other slower.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks.load import settled

BOUND = 600.0
"""Seconds that one call may take."""

Call = Callable[..., tuple[float, Any]]

_held: Any = None


@contextmanager
def apart(make: Callable[..., Any], *arguments: Any) -> Iterator[Call]:
    """Yields a function that calls a method, by name, of what ``make(*arguments)`` has made there. It returns the
    seconds that the method took and what it returned. What is passed must be possible to pickle."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (make, arguments)) as process:
        yield lambda method, *given: process.submit(_called, method, given).result(BOUND)


def _begin(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _held
    _held = make(*arguments)
    settled()


def _called(method: str, given: tuple[Any, ...]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = getattr(_held, method)(*given)
    return time.perf_counter() - began, found
