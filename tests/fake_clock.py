# SPDX-License-Identifier: Apache-2.0
"""Time that passes as a test says."""

from __future__ import annotations


class FakeClock:
    """A double of the monotonic clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
