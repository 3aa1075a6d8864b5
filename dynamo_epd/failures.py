# SPDX-License-Identifier: Apache-2.0
"""Whether what a stage computes with still works: with a CUDA context that was lost every call fails, for good, and a
kernel that hangs lets its call never end."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from dynamo_epd.errors import EpdError

IN_A_ROW = 5
"""Refusals do not count, and what a request can do wrong is refused. One batch too large for the memory is no reason to
end, however many fail with it; and to fail fast draws the requests of workers that work."""


class Hung(Exception):
    """A thread does not come back. Nothing ends it but the end of its process, which must not wait for it."""


class Failures:
    """Counts incidents, until something succeeds. Work that was under way when other work failed fails with it.

    ``silence``: seconds in which nothing may be heard of work that is under way, before it counts as hung. By default
    any.
    """

    def __init__(self, silence: float = math.inf) -> None:
        self._silence = silence
        self._lock = threading.Lock()
        self._under_way = 0
        self._heard = monotonic()
        self._in_a_row = 0
        self._incidents = 0
        """In all: by these, work that was under way knows that its incident has been counted."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the work alone: who merely waited when other work failed is not part of that incident."""
        incidents = self._incidents
        try:
            yield
        except EpdError:
            raise
        except Exception:
            if incidents == self._incidents:
                self._incidents += 1
                self._in_a_row += 1
            raise
        self._in_a_row = 0

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Around the work where it is done, which may be its thread: whoever asked for it may leave, and it hangs on.

        One that fails is not heard of: others could be refused for as long as one hangs.
        """
        with self._lock:
            if not self._under_way:
                self.heard()
            self._under_way += 1
        try:
            yield
            self.heard()
        finally:
            with self._lock:
                self._under_way -= 1

    def heard(self) -> None:
        """Some of the work is done: what is under way goes on. Any thread may say so."""
        self._heard = monotonic()

    @property
    def too_many(self) -> bool:
        """The process should end, to be started again."""
        return self._in_a_row >= IN_A_ROW

    def alive(self) -> bool:
        """What a stage answers that is asked whether it lives. Raises `Hung` where not even its end is to be had."""
        if self._under_way and monotonic() - self._heard > self._silence:
            raise Hung(f"nothing has been heard for {self._silence:g} s of what is computed")
        return not self.too_many
