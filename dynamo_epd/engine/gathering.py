# SPDX-License-Identifier: Apache-2.0
"""Fewer messages for the same tokens: those that an engine makes sooner than anyone can see leave it together."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from vllm.v1.engine import EngineCoreOutputs


class Gathering(queue.Queue[tuple[int, EngineCoreOutputs] | bytes]):
    """An EngineCore's output queue, whose one reader, the thread that sends, leaves tokens in it for a while.

    What says more than tokens is read at once, with all that came before it: a request's first output and its last,
    the reply to a call. So is what comes ``seconds`` or more after the last time; other tokens wait until then. None is
    merged with another: the worker that is sent several at once makes one delta of them, as it does whenever its engine
    is ahead of it.

    A message for each step wakes a thread beside the one that computes, a thread of the worker, and the processor, the
    frontend and the client for each delta. On two cores, where the tiny model's step takes a millisecond, that made
    steps longer (``make bench ROW=1``). Steps that take longer than ``seconds`` are sent one by one.
    """

    _seconds: float
    _due: float
    _urgent: threading.Event
    _together: int

    def _put(self, item: tuple[int, EngineCoreOutputs] | bytes) -> None:
        super()._put(item)
        if not _patient(item):
            self._urgent.set()

    def get(self, block: bool = True, timeout: float | None = None) -> tuple[int, EngineCoreOutputs] | bytes:
        if self._together:
            self._together -= 1
            return super().get(block, timeout)
        # Not by waiting for an item: each `put` would wake this thread, which wants the interpreter.
        self._urgent.wait(max(0.0, self._due - time.monotonic()))
        item = super().get(block, timeout)
        self._urgent.clear()
        self._together = self.qsize()
        self._due = time.monotonic() + self._seconds
        return item


def gather(outputs: queue.Queue[tuple[int, EngineCoreOutputs] | bytes], seconds: float) -> None:
    """Makes ``outputs`` a `Gathering`, with what lies in it: vLLM makes it before it loads any plugin, and whoever has
    it may be about to put something in."""
    urgent = threading.Event()
    urgent.set()
    vars(outputs).update(_seconds=seconds, _due=0.0, _urgent=urgent, _together=0)
    outputs.__class__ = Gathering


def _patient(item: tuple[int, EngineCoreOutputs] | bytes) -> bool:
    if isinstance(item, bytes):
        return False
    said: Any = item[1]
    if any(value is not None for value in (said.utility_output, said.wave_complete, said.start_wave)):
        return False
    return not any(output.finished or output.prefill_stats is not None for output in said.outputs)
