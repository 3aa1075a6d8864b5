# SPDX-License-Identifier: Apache-2.0
"""Whether what a stage computes with still works: with a CUDA context that was lost every call fails, for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dynamo_epd.errors import EpdError

IN_A_ROW = 5
"""Refusals do not count, and what a request can do wrong is refused. One batch too large for the memory is no reason to
end, however many fail with it; and to fail fast draws the requests of workers that work."""


class Failures:
    """Counts incidents, until something succeeds. Work that was under way when other work failed fails with it."""

    def __init__(self) -> None:
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

    @property
    def too_many(self) -> bool:
        """The process should end, to be started again."""
        return self._in_a_row >= IN_A_ROW
