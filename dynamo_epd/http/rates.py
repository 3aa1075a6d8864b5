# SPDX-License-Identifier: Apache-2.0
"""How much one tenant may ask: requests a minute, and requests at once.

Each process counts for itself. Where several workers of a frontend share the port, a tenant may get as many times the
limit as there are workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dynamo_epd.errors import RateLimited

MINUTE = 60.0
CRUMB = 1e-6
"""Of a request, lost to rounding: who waits as long as he was told must get it."""
MOST_TENANTS = 4096
"""Of whom a count is kept. The idle ones, who have all of their minute, are forgotten first and lose nothing by it."""


@dataclass
class _Count:
    left: float
    """Requests of this minute: a bucket that fills by and by."""
    at: float
    running: int = 0


class Rates:
    """``per_minute`` requests may come in a burst; then one every 60/``per_minute`` seconds. None sets no limit."""

    def __init__(
        self, per_minute: int | None = None, at_once: int | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._per_minute = per_minute
        self._at_once = at_once
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    @contextmanager
    def counted(self, tenant: str, told: dict[str, str]) -> Iterator[None]:
        """Counts one request until it is over. Puts into ``told`` the headers that say how much is left.

        Raises RateLimited, which counts for nothing, with the seconds after which another try will pass.
        """
        if self._per_minute is None and self._at_once is None:
            yield
            return
        count = self._count(tenant)
        told |= self._headers(count)
        if self._at_once is not None and count.running >= self._at_once:
            raise RateLimited(
                f"Rate limit reached for requests at once: Limit {self._at_once}. Please try again when one is over.",
                retry_after=1.0,
            )
        if self._per_minute is not None:
            if count.left < 1 - CRUMB:
                wait = (1 - count.left) * MINUTE / self._per_minute
                raise RateLimited(
                    f"Rate limit reached for requests per minute (RPM): Limit {self._per_minute}. "
                    f"Please try again in {_duration(wait)}.",
                    retry_after=wait,
                )
            count.left -= 1
            told |= self._headers(count)
        count.running += 1
        try:
            yield
        finally:
            count.running -= 1

    def _count(self, tenant: str) -> _Count:
        now, most = self._clock(), float(self._per_minute or 0)
        count = self._counts.get(tenant)
        if count is None:
            if len(self._counts) >= MOST_TENANTS:
                self._forget(now)
            count = self._counts[tenant] = _Count(most, now)
        count.left = min(most, count.left + (now - count.at) * most / MINUTE)
        count.at = now
        return count

    def _forget(self, now: float) -> None:
        self._counts = {tenant: one for tenant, one in self._counts.items() if one.running or now - one.at < MINUTE}

    def _headers(self, count: _Count) -> dict[str, str]:
        if self._per_minute is None:
            return {}
        return {
            "x-ratelimit-limit-requests": str(self._per_minute),
            "x-ratelimit-remaining-requests": str(max(0, math.floor(count.left + CRUMB))),
            "x-ratelimit-reset-requests": _duration((self._per_minute - count.left) * MINUTE / self._per_minute),
        }


def _duration(seconds: float) -> str:
    """As OpenAI writes them: ``350ms``, ``8.64s``, ``1m30s``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE:
        return f"{round(seconds, 2):g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
